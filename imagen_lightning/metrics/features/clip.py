"""CLIP's embeddings of pictures and captions, for the CLIP score and CLIP-FID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.digests import digest_tensors
from imagen_lightning.metrics.features.base import FeatureExtractor, exact_float32
from imagen_lightning.text.common import CutCounter
from imagen_lightning.text.hub import LoadError, import_transformers, load_part, local_folder


class ClipFeatures(FeatureExtractor):
    """A CLIP model's projected embeddings, of pictures and of captions, in one space.

    Files come from the folder given, else from Hugging Face's cache, else from its hub; code from the hub is never run.
    Pictures are prepared as the model's preprocessor_config.json says. Captions of more than the model's 77 tokens are
    cut, but for their end mark, which is where the model reads a caption out; a warning counts them.

    Args:
        name_or_path: "openai/clip-vit-large-patch14" (the model of most published scores), or a folder with
            config.json, weights, preprocessor and tokenizer files.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: at first use, a model that cannot be had, is incomplete or is no CLIP.
    """

    def __init__(self, name_or_path: str | Path, revision: str | None = None) -> None:
        self.name_or_path = str(name_or_path)
        self.revision = revision
        self._cut = CutCounter()

    @property
    def num_cut(self) -> int:
        """Captions cut so far."""
        return self._cut.num_cut

    @cached_property
    def name(self) -> str:
        """The hub name, with "@revision" where one is given, or the folder's own name; the hash tells weights apart."""
        if self._folder is not None:
            return self._folder.resolve().name
        return self.name_or_path + (f"@{self.revision}" if self.revision else "")

    @cached_property
    def sha256(self) -> str:
        """Of the weights in the order of their names, whatever files hold them."""
        state = self._model.state_dict()
        return digest_tensors(state[key] for key in sorted(state) if not key.endswith("position_ids"))

    @property
    def num_features(self) -> int:
        return int(self._config.projection_dim)

    @cached_property
    def resize_filter(self) -> str:
        processor = self._processor
        steps = []
        if processor.do_resize:
            size = "x".join(str(side) for side in dict(processor.size).values() if side)
            steps.append(f"{_filter_name(processor.resample)} to {size} px")
        if processor.do_center_crop:
            steps.append("centre crop")
        if processor.do_normalize:
            mean, std = (" ".join(f"{x:.4g}" for x in row) for row in (processor.image_mean, processor.image_std))
            steps.append(f"mean {mean}, std {std}")
        return ", ".join(steps)

    @property
    def distance_name(self) -> str:
        return "CLIP-FID"

    @property
    def kernel_name(self) -> str:
        return "CLIP-KID"

    def text_features(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """(B, D) float32 embeddings of B captions on `device`."""
        device = torch.device(device)
        if not captions:
            return torch.zeros(0, self.num_features, device=device)
        limit = int(self._config.text_config.max_position_embeddings)
        # A lone surrogate, which a broken decoder leaves in a str, would end the tokenizer.
        texts = [caption.encode("utf-8", errors="replace").decode("utf-8") for caption in captions]
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        full = [text for text, length in zip(texts, tokens["attention_mask"].sum(dim=1)) if length == limit]
        whole = self._tokenizer(full, verbose=False)["input_ids"] if full else []
        self._cut.add(sum(len(row) > limit for row in whole), len(texts), limit=f"CLIP's {limit} tokens")
        with torch.no_grad(), exact_float32(device):
            output = self._model.to(device).get_text_features(
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            )
        return _pooled(output)

    def _features(self, images: Tensor) -> Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _pooled(self._model.to(images.device).get_image_features(pixel_values=pixels.to(images.device)))

    @cached_property
    def _folder(self) -> Path | None:
        """The local folder, or None for a name on the hub."""
        needs = (
            "config.json, weights, preprocessor and tokenizer, or a hub name such as 'openai/clip-vit-large-patch14'"
        )
        return local_folder(self.name_or_path, "CLIP", needs)

    @cached_property
    def _config(self) -> Any:
        config = self._load("config.json", import_transformers().AutoConfig.from_pretrained)
        if config.model_type != "clip":
            raise InputError(f"{self.name_or_path!r} is a {config.model_type!r} model; give a CLIP")
        return config

    @cached_property
    def _model(self) -> Any:
        self._config  # noqa: B018  (a model of another kind is named as such before its weights fail)
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, report = self._load("weights", import_transformers().CLIPModel.from_pretrained, **options)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise InputError(
                f"the weights of CLIP {self.name_or_path!r} lack {len(missing)} tensors ({missing[0]}, …): the file is "
                f"incomplete or belongs to another model; fetch it again"
            )
        return model.eval().requires_grad_(False)

    @cached_property
    def _processor(self) -> Any:
        return self._load("preprocessor_config.json", import_transformers().CLIPImageProcessor.from_pretrained)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._load("tokenizer", import_transformers().AutoTokenizer.from_pretrained)
        # Without its vocabulary transformers makes an empty tokenizer, which reads any caption as end marks.
        if len(tokenizer) < 256:
            raise InputError(f"the tokenizer of CLIP {self.name_or_path!r} has no vocabulary; add its tokenizer.json")
        return tokenizer

    def _load(self, what: str, load: Callable[..., Any], **options: Any) -> Any:
        """Calls a `from_pretrained`: in the folder, or in the cache and then on the hub; errors become one line."""
        try:
            return load_part(load, self.name_or_path, self._folder, self.revision, **options)
        except LoadError as error:
            where = "in its folder" if self._folder is not None else "in the cache or on Hugging Face"
            source = str(self._folder or self.name_or_path)
            raise InputError(
                f"cannot get the {what} of CLIP {source!r} {where}: check the name and the network, or give a complete "
                f"local folder ({error})"
            ) from error


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it, 4 gave it bare."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


def _filter_name(resample: Any) -> str:
    from PIL.Image import Resampling

    return f"antialiased {Resampling(int(resample)).name.lower()}"
