"""The frozen T5 encoder of Imagen, in any of its kinds: T5, T5 v1.1, Flan-T5, mT5, umT5, ByT5."""

from __future__ import annotations

import copy
import gc
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.text.cleaning import clean_caption
from imagen_lightning.text.common import CutCounter, masked_mean, padded_length
from imagen_lightning.text.hub import (
    LoadError,
    cached_folder,
    first_sentence,
    import_transformers,
    load_part,
    local_folder,
)
from imagen_lightning.text.identity import PROBES, digest_tokens, digest_weights
from imagen_lightning.text.pseudo_tokens import PseudoTokens, add_vectors
from imagen_lightning.text.t5_shapes import T5Shape, published_shape
from imagen_lightning.types import InputError, Text, TextEncoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}  # ByT5 is a "t5"
_CLEANING: dict[bool | str, str] = {False: "none", True: "clean_caption", "lowercase": "lowercase"}
_SUFFIXES: dict[bool | str, str] = {False: "", True: "+clean", "lowercase": "+lower"}


class T5TextEncoder(TextEncoder):
    """A T5 encoder's last hidden states (Imagen, arXiv 2205.11487, section 2.1).

    Nothing is loaded or asked of the network before `dim`, `name` or the encoder itself is used, so a manifest that
    names one can be read anywhere. Files come from the folder given, else from Hugging Face's cache, else from its hub;
    code from the hub is never run. The weights stay on the device last asked for, outside of the stage that uses them.

    `name` is the hub name (with "@revision" where one is given) or, for a local folder, the folder's own name and eight
    digits of its config.json's SHA-256, never the path before it: copies of a folder on different machines count as the
    same encoder. "+clean" or "+lower" follows where captions are changed, "+padded" where padding is attended to. To
    move a cascade whose encoder is a local folder, copy that folder too and let `name_or_path` in the manifest say
    where it lies; nothing else changes.

    Args:
        name_or_path: "google/t5-v1_1-xxl", or a folder with config.json, weights and tokenizer files.
        max_tokens: captions of more tokens are cut there (the end mark stays), counted in `num_cut`, and a warning
            says so.
        dtype: "float32", "bfloat16" or "float16", in which the weights are held and computed with; states are float32
            whichever it is. T5 v1.1 and its descendants were trained in bfloat16 and may overflow in float16.
        clean_captions: read captions through `clean_caption`; or "lowercase": stripped and in lower case, as DeepFloyd
            IF's pipelines read prompts.
        revision: branch, tag or commit on the hub.
        padding: "masked", or "attended" as DeepFloyd IF was trained: every caption is padded to max_tokens (IF: 77), T5
            does not attend to the padding, but its states at the padding are kept, and there is no mask.
        subfolder: where config.json and the weights lie below name_or_path, "text_encoder" in a diffusers pipeline.
        tokenizer_subfolder: where the tokenizer lies, "tokenizer" in a diffusers pipeline; by default `subfolder`.

    Raises:
        InputError: max_tokens below 1, an unknown dtype, padding or cleaning; later, at first use, a folder or hub
            model that cannot be had, is incomplete, or is no T5.
    """

    def __init__(
        self,
        name_or_path: str,
        max_tokens: int = 128,
        dtype: str = "float32",
        clean_captions: bool | str = False,
        revision: str | None = None,
        padding: str = "masked",
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
    ) -> None:
        if max_tokens < 1:
            raise InputError(f"T5TextEncoder needs max_tokens of at least 1, not {max_tokens}")
        if dtype not in _DTYPES:
            raise InputError(f"T5TextEncoder dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
        if padding not in ("masked", "attended"):
            raise InputError(f"T5TextEncoder padding {padding!r} is unknown; use 'masked' or 'attended'")
        if clean_captions not in _CLEANING:
            raise InputError(
                f"T5TextEncoder clean_captions {clean_captions!r} is unknown; use true, false or 'lowercase'"
            )
        self.name_or_path = str(name_or_path)
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.clean_captions = clean_captions
        self.revision = revision
        self.padding = padding
        self.subfolder = subfolder
        self.tokenizer_subfolder = tokenizer_subfolder
        self._cut = CutCounter()
        self._device: torch.device | None = None
        self._readers: dict[tuple[str, ...], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> T5TextEncoder:
        return self  # EMA deep-copies the stage; frozen weights of gigabytes are shared instead

    @property
    def num_cut(self) -> int:
        """Captions cut so far."""
        return self._cut.num_cut

    @cached_property
    def name(self) -> str:
        settings = _SUFFIXES[self.clean_captions] + ("+padded" if self.padding == "attended" else "")
        if self._folder is None:
            place = f"/{self.subfolder}" if self.subfolder else ""
            return self.name_or_path + place + (f"@{self.revision}" if self.revision else "") + settings
        try:
            digest = hashlib.sha256((self._folder / (self.subfolder or "") / "config.json").read_bytes()).hexdigest()
        except OSError:
            raise InputError(f"text encoder folder {self.name_or_path!r} has no config.json") from None
        return f"{self._folder.resolve().name}-{digest[:8]}{settings}"

    @cached_property
    def dim(self) -> int:
        return self.shape.d_model

    @cached_property
    def shape(self) -> T5Shape:
        """The model's size; of a published one it is known without its files."""
        published = published_shape(self.name_or_path) if self._folder is None else None
        return published or T5Shape.of(self._config)

    def __call__(
        self, captions: Sequence[str], device: torch.device | str = "cpu", tokens: PseudoTokens | None = None
    ) -> Text:
        """Encodes B captions on `device`, without gradients but those that reach the vectors of `tokens`.

        Args:
            captions: B strings.
            device: where the encoder works.
            tokens: words beside the tokenizer's own, read as transformers reads words that are added to a tokenizer;
                their vectors stand in the place of the embeddings of pieces.

        Returns:
            states (B, L, D) float32 with L the longest caption's number of tokens rounded up to a multiple of 8 (at
            most max_tokens), zero where padded; mask (B, L); pooled (B, D), the masked mean. T5 has relative positions
            and does not attend to padding: a caption's states do not depend on L or its neighbours, but for rounding.
            Where padding is attended to, L is max_tokens, the mask None, and no state is zeroed.

        Raises:
            InputError: the model cannot be loaded (see the class), or overflows in float16.
        """
        rows = self._tokenize(captions, tokens)
        attended = self.padding == "attended"
        length = self.max_tokens if attended else padded_length(max(map(len, rows), default=1), 8, self.max_tokens)
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, numbers in enumerate(rows):
            ids[row, : len(numbers)] = torch.tensor(numbers)
            mask[row, : len(numbers)] = True
        ids, mask = ids.to(device), mask.to(device)
        learns = tokens is not None and bool((ids < 0).any()) and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), torch.autocast(torch.device(device).type, enabled=False):
            model = self._on(device)
            given = {"input_ids": ids} if tokens is None else {"inputs_embeds": _embedded(model, ids, tokens)}
            hidden = model(attention_mask=mask.long(), **given).last_hidden_state
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
        place = self.subfolder or ""
        if self._folder is None:
            folder = cached_folder(self.name_or_path, place, self.revision)
        else:
            folder = self._folder / place
        try:
            weights = digest_weights(folder) if folder is not None else ""
        except OSError as error:
            raise InputError(f"weights of text encoder {self.name_or_path!r} cannot be read: {error}") from None
        return {
            **super().identity(),
            "cleaning": _CLEANING[self.clean_captions],
            "padding": self.padding,
            "tokenizer": digest_tokens(probes),
            "weights": weights,
            "precision": self.dtype,
        }

    def num_tokens(self, captions: Sequence[str], tokens: PseudoTokens | None = None) -> list[int]:
        if self.padding == "attended" or not captions:
            return [self.max_tokens] * len(captions)
        return [len(row) for row, _ in self._rows(self._readable(captions, tokens), tokens)]

    def embed(self, text: str) -> Tensor:
        """The input embeddings (n, D) float32 of a text's n pieces, on the CPU; loads the weights."""
        numbers = self._tokenizer(self._readable([text])[0], add_special_tokens=False)["input_ids"]
        return self._model.get_input_embeddings().weight[numbers].float().cpu()

    def _tokenize(self, captions: Sequence[str], tokens: PseudoTokens | None = None) -> list[list[int]]:
        """Numbers of each caption's pieces, at most max_tokens, the end mark last; -1-n for row n of tokens' table."""
        rows = self._rows(self._readable(captions, tokens), tokens)
        num_cut = sum(cut for _, cut in rows)
        self._cut.add(num_cut, len(rows), limit=f"{self.max_tokens} tokens; a larger max_tokens reads more")
        return [row for row, _ in rows]

    def _rows(self, texts: list[str], tokens: PseudoTokens | None) -> list[tuple[list[int], bool]]:
        """What `_tokenize` gives, and whether it was cut."""
        parts = [[text] if tokens is None else tokens.parts(text) for text in texts]
        plain = iter(self._plain_rows([text for text, split in zip(texts, parts) if len(split) == 1]))
        return [next(plain) if tokens is None or len(split) == 1 else self._new_row(split, tokens) for split in parts]

    def _plain_rows(self, texts: list[str]) -> list[tuple[list[int], bool]]:
        if not texts:
            return []
        rows = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        full = [text for text, row in zip(texts, rows) if len(row) == self.max_tokens]
        whole = iter(self._tokenizer(full, verbose=False)["input_ids"] if full else [])
        return [(row, len(row) == self.max_tokens and len(next(whole)) > self.max_tokens) for row in rows]

    def _new_row(self, parts: list[str], tokens: PseudoTokens) -> tuple[list[int], bool]:
        """The row of a caption of pseudo-words (see `PseudoTokens.parts`), and whether it was cut."""
        reader = self._reader(tuple(tokens.words))
        places = {reader.convert_tokens_to_ids(word): rows for word, rows in tokens.places().items()}
        row: list[int] = []
        for number in reader("".join(parts), verbose=False)["input_ids"]:
            row += [-1 - place for place in places[number]] if number in places else [number]
        cut = len(row) > self.max_tokens
        return ([*row[: self.max_tokens - 1], row[-1]] if cut else row), cut

    def _reader(self, words: tuple[str, ...]) -> Any:
        """The tokenizer with words added."""
        if words not in self._readers:
            reader = copy.deepcopy(self._tokenizer)
            added = import_transformers().AddedToken
            reader.add_tokens([added(word, normalized=False) for word in words])
            self._readers = {words: reader}
        return self._readers[words]

    def _readable(self, captions: Sequence[str], tokens: PseudoTokens | None = None) -> list[str]:
        """The captions as the tokenizer gets them; pseudo-words look like HTML and stay."""
        # A lone surrogate, which a broken decoder leaves in a str, would end the tokenizer.
        texts = [caption.encode("utf-8", errors="replace").decode("utf-8") for caption in captions]
        if self.clean_captions == "lowercase":
            return [text.lower().strip() for text in texts]
        if not self.clean_captions:
            return texts
        keep = None if tokens is None else lambda tag: bool(tokens.known(tag))
        return [clean_caption(text, keep) for text in texts]

    def free(self) -> None:
        if self.__dict__.pop("_model", None) is not None:
            self._device = None
            gc.collect()  # transformers' models hold themselves in cycles
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _on(self, device: torch.device | str) -> Any:
        device = torch.device(device)
        if device != self._device:
            self._model.to(device)
            self._device = device
        return self._model

    @cached_property
    def _folder(self) -> Path | None:
        """The local folder, or None for a name on the hub."""
        needs = "config.json, weights and tokenizer, or a hub name such as 'google/t5-v1_1-small'"
        return local_folder(self.name_or_path, "text encoder", needs)

    @cached_property
    def _config(self) -> Any:
        config = self._load("config.json", import_transformers().AutoConfig.from_pretrained)
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
        model_class = getattr(import_transformers(), _ENCODERS[self._config.model_type])
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
        place = self.subfolder or ""
        if what == "tokenizer" and self.tokenizer_subfolder is not None:
            place = self.tokenizer_subfolder
        try:
            return load_part(load, self.name_or_path, self._folder, self.revision, place, **options)
        except LoadError as error:
            if self._folder is not None:
                message = f"cannot read the {what} of text encoder folder {str(self._folder / place)!r}: {error}"
            else:
                message = (
                    f"cannot get the {what} of text encoder {self.name_or_path!r} from the cache or from Hugging Face: "
                    f"check the name and the network, or give a local folder as name_or_path ({error})"
                )
            raise InputError(message) from error


def _embedded(model: Any, ids: Tensor, tokens: PseudoTokens) -> Tensor:
    """The embeddings (B, L, D) of numbers (B, L), with the tokens' vectors where a number is below 0."""
    new = ids < 0
    x = model.get_input_embeddings()(ids.clamp(min=0)).masked_fill(new.unsqueeze(-1), 0)
    places = [(row, column, -1 - int(ids[row, column])) for row, column in new.nonzero().tolist()]
    return add_vectors(x, places, tokens) if places else x


def _read_tokenizer(source: str, **options: Any) -> Any:
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(source, **options)
    except OSError:
        raise
    except Exception as error:  # the Rust tokenizers raise nothing more exact
        raise OSError(f"it is missing or damaged; add its tokenizer.json ({first_sentence(error)})") from error
    # Without its vocabulary file transformers makes an empty tokenizer that reads every word as unknown.
    if tokenizer.unk_token_id in tokenizer("a photo")["input_ids"]:
        raise OSError("it has no vocabulary; add its spiece.model or tokenizer.json")
    return tokenizer
