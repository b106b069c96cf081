"""The frozen T5 encoder of Imagen, in any of its kinds: T5, T5 v1.1, Flan-T5, mT5, umT5, ByT5."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from imagen_lightning.text.cleaning import clean_caption
from imagen_lightning.text.common import CutCounter, masked_mean, padded_length
from imagen_lightning.text.identity import PROBES, digest_tokens, digest_weights
from imagen_lightning.types import InputError, Text, TextEncoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}  # ByT5 is a "t5"
_SENTENCE_END = re.compile(r"\.\s|(?<!:)\n(?=[A-Z])")


class T5TextEncoder(TextEncoder):
    """A T5 encoder's last hidden states (Imagen, arXiv 2205.11487, section 2.1).

    Nothing is loaded or asked of the network before `dim`, `name` or the encoder itself is used, so a manifest that
    names one can be read anywhere. Files come from the folder given, else from Hugging Face's cache, else from its hub;
    code from the hub is never run. The weights stay on the device last asked for, outside of the stage that uses them.

    `name` is the hub name (with "@revision" where one is given) or, for a local folder, the folder's own name and eight
    digits of its config.json's SHA-256, never the path before it: copies of a folder on different machines count as the
    same encoder. "+clean" follows where captions are cleaned, "+padded" where padding is attended to. To move a cascade
    whose encoder is a local folder, copy that folder too and let `name_or_path` in the manifest say where it lies;
    nothing else changes.

    Args:
        name_or_path: "google/t5-v1_1-xxl", or a folder with config.json, weights and tokenizer files.
        max_tokens: captions of more tokens are cut there (the end mark stays), counted in `num_cut`, and a warning
            says so.
        dtype: "float32", "bfloat16" or "float16", in which the weights are held and computed with; states are float32
            whichever it is. T5 v1.1 and its descendants were trained in bfloat16 and may overflow in float16.
        clean_captions: read captions through `clean_caption`.
        revision: branch, tag or commit on the hub.
        padding: "masked", or "attended" as DeepFloyd IF was trained: every caption is padded to max_tokens (IF: 77), T5
            does not attend to the padding, but its states at the padding are kept, and there is no mask.

    Raises:
        InputError: max_tokens below 1, an unknown dtype or padding; later, at first use, a folder or hub model that
            cannot be had, is incomplete, or is no T5.
    """

    def __init__(
        self,
        name_or_path: str,
        max_tokens: int = 128,
        dtype: str = "float32",
        clean_captions: bool = False,
        revision: str | None = None,
        padding: str = "masked",
    ) -> None:
        if max_tokens < 1:
            raise InputError(f"T5TextEncoder needs max_tokens of at least 1, not {max_tokens}")
        if dtype not in _DTYPES:
            raise InputError(f"T5TextEncoder dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
        if padding not in ("masked", "attended"):
            raise InputError(f"T5TextEncoder padding {padding!r} is unknown; use 'masked' or 'attended'")
        self.name_or_path = str(name_or_path)
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.clean_captions = clean_captions
        self.revision = revision
        self.padding = padding
        self._cut = CutCounter()
        self._device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> T5TextEncoder:
        return self  # EMA deep-copies the stage; frozen weights of gigabytes are shared instead

    @property
    def num_cut(self) -> int:
        """Captions cut so far."""
        return self._cut.num_cut

    @cached_property
    def name(self) -> str:
        settings = ("+clean" if self.clean_captions else "") + ("+padded" if self.padding == "attended" else "")
        if self._folder is None:
            return self.name_or_path + (f"@{self.revision}" if self.revision else "") + settings
        try:
            digest = hashlib.sha256((self._folder / "config.json").read_bytes()).hexdigest()
        except OSError:
            raise InputError(f"text encoder folder {self.name_or_path!r} has no config.json") from None
        return f"{self._folder.resolve().name}-{digest[:8]}{settings}"

    @cached_property
    def dim(self) -> int:
        return int(self._config.d_model)

    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Text:
        """Encodes B captions on `device`, without gradients.

        Returns:
            states (B, L, D) float32 with L the longest caption's number of tokens rounded up to a multiple of 8 (at
            most max_tokens), zero where padded; mask (B, L); pooled (B, D), the masked mean. T5 has relative positions
            and does not attend to padding: a caption's states do not depend on L or its neighbours, but for rounding.
            Where padding is attended to, L is max_tokens, the mask None, and no state is zeroed.

        Raises:
            InputError: the model cannot be loaded (see the class), or overflows in float16.
        """
        rows = self._tokenize(captions)
        attended = self.padding == "attended"
        length = self.max_tokens if attended else padded_length(max(map(len, rows), default=1), 8, self.max_tokens)
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        mask = mask.to(device)
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            hidden = self._on(device)(input_ids=ids.to(device), attention_mask=mask.long()).last_hidden_state
        states = hidden.float() if attended else hidden.float().masked_fill(~mask.unsqueeze(-1), 0.0)
        if self.dtype == "float16" and not states.isfinite().all():
            raise InputError(f"text encoder {self.name_or_path!r} overflows in float16; set dtype bfloat16 or float32")
        kept = None if attended else mask
        return Text(states, kept, masked_mean(states, kept))

    def identity(self) -> dict[str, str]:
        """Beside name and length: cleaning, padding, precision, and digests of the tokenizer at work and the weights.

        The weights' is "" where their files are not at hand; they are never loaded for it.
        """
        probes = self._tokenizer(self._readable(PROBES), verbose=False)["input_ids"]
        folder = self._folder or _cached_folder(self.name_or_path, self.revision)
        try:
            weights = digest_weights(folder) if folder is not None else ""
        except OSError as error:
            raise InputError(f"weights of text encoder {self.name_or_path!r} cannot be read: {error}") from None
        return {
            **super().identity(),
            "cleaning": "clean_caption" if self.clean_captions else "none",
            "padding": self.padding,
            "tokenizer": digest_tokens(probes),
            "weights": weights,
            "precision": self.dtype,
        }

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        if self.padding == "attended" or not captions:
            return [self.max_tokens] * len(captions)
        rows = self._tokenizer(self._readable(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [len(row) for row in rows]

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token numbers of each caption, at most max_tokens, the end mark last."""
        texts = self._readable(captions)
        if not texts:
            return []
        rows = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        full = [text for text, row in zip(texts, rows) if len(row) == self.max_tokens]
        whole = self._tokenizer(full, verbose=False)["input_ids"] if full else []
        num_cut = sum(len(row) > self.max_tokens for row in whole)
        self._cut.add(num_cut, len(texts), limit=f"{self.max_tokens} tokens; a larger max_tokens reads more")
        return rows

    def _readable(self, captions: Sequence[str]) -> list[str]:
        """The captions as the tokenizer gets them."""
        # A lone surrogate, which a broken decoder leaves in a str, would end the tokenizer.
        texts = [caption.encode("utf-8", errors="replace").decode("utf-8") for caption in captions]
        return [clean_caption(text) for text in texts] if self.clean_captions else texts

    def _on(self, device: torch.device | str) -> Any:
        device = torch.device(device)
        if device != self._device:
            self._model.to(device)
            self._device = device
        return self._model

    @cached_property
    def _folder(self) -> Path | None:
        """The local folder, or None for a name on the hub."""
        path = Path(self.name_or_path).expanduser()
        if path.is_dir():
            return path
        if self.name_or_path.startswith(("/", ".", "~")) or self.name_or_path.count("/") > 1:
            raise InputError(
                f"text encoder folder {self.name_or_path!r} does not exist; give the folder that holds config.json, "
                f"weights and tokenizer, or a hub name such as 'google/t5-v1_1-small'"
            )
        return None

    @cached_property
    def _config(self) -> Any:
        config = self._load("config.json", _transformers().AutoConfig.from_pretrained)
        if config.model_type not in _ENCODERS:
            raise InputError(
                f"text encoder {self.name_or_path!r} is a {config.model_type!r} model; give any kind of T5"
            )
        return config

    @cached_property
    def _tokenizer(self) -> Any:
        self._config  # noqa: B018  (a model of another kind is named as such before its tokenizer fails)
        return self._load("tokenizer", _read_tokenizer)

    @cached_property
    def _model(self) -> Any:
        model_class = getattr(_transformers(), _ENCODERS[self._config.model_type])
        options = {"dtype": _DTYPES[self.dtype], "output_loading_info": True}
        model, report = self._load("weights", model_class.from_pretrained, **options)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise InputError(
                f"weights of text encoder {self.name_or_path!r} lack {len(missing)} tensors ({missing[0]}, …): the "
                f"file is incomplete or belongs to another model; fetch it again"
            )
        return model.eval().requires_grad_(False)

    def _load(self, what: str, load: Callable[..., Any], **options: Any) -> Any:
        """Calls a `from_pretrained`: in the folder, or in the cache and then on the hub; errors become one line."""
        from safetensors import SafetensorError

        source = str(self._folder or self.name_or_path)
        options |= {"trust_remote_code": False} | ({"revision": self.revision} if self.revision else {})
        try:
            try:
                return load(source, local_files_only=True, **options)
            except OSError:
                if self._folder is not None:
                    raise
                _reach_hub(source, self.revision)
                return load(source, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = _first_sentence(error)
            if self._folder is not None:
                message = f"cannot read the {what} of text encoder folder {source!r}: {reason}"
            else:
                message = (
                    f"cannot get the {what} of text encoder {source!r} from the cache or from Hugging Face: check the "
                    f"name and the network, or give a local folder as name_or_path ({reason})"
                )
            raise InputError(message) from error


def _cached_folder(source: str, revision: str | None) -> Path | None:
    """Where Hugging Face's cache holds a hub model's files, or None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _reach_hub(source: str, revision: str | None) -> None:
    """Raises OSError where the hub does not answer, at once: a load would try six times, with lines of its own."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision))
    except Exception as error:  # the class is that of whichever HTTP client the hub's library uses
        # What the hub itself refuses is left to the load, which meets it again and words it better.
        if not isinstance(error, OSError | ValueError):
            raise OSError(str(error) or type(error).__name__) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(_SENTENCE_END.split(str(error).strip(), maxsplit=1)[0].split()).removesuffix(".")


def _read_tokenizer(source: str, **options: Any) -> Any:
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(source, **options)
    except OSError:
        raise
    except Exception as error:  # the Rust tokenizers raise nothing more exact
        raise OSError(f"it is missing or damaged; add its tokenizer.json ({_first_sentence(error)})") from error
    # Without its vocabulary file transformers makes an empty tokenizer that reads every word as unknown.
    if tokenizer.unk_token_id in tokenizer("a photo")["input_ids"]:
        raise OSError("it has no vocabulary; add its spiece.model or tokenizer.json")
    return tokenizer


def _transformers() -> Any:
    from imagen_lightning.torchvision_mend import mend

    mend()  # transformers imports torchvision
    import transformers

    return transformers
