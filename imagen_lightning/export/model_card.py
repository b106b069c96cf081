"""The README.md of exported pipelines: licence, origin, settings, metrics, and how to draw with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from imagen_lightning import __version__
from imagen_lightning.cascade.description import low_res_size, num_parameters, stage_name
from imagen_lightning.cascade.origin import licences, weights_words
from imagen_lightning.export.diffusers_folder import BASE, SUPER_RESOLUTION
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.text import T5TextEncoder

UNKNOWN_LICENCE = "not recorded: ask whoever trained the weights before you pass them on"


def model_card(stages: Sequence[DiffusionMixin], with_text: bool, metrics: Sequence[Mapping[str, Any]]) -> str:
    """A model card of Hugging Face's form, its header YAML.

    Args:
        stages: of the pipelines that the card is for.
        with_text: whether the first pipeline's folder holds the text encoder.
        metrics: results with their protocols, as a cascade's manifest holds them.
    """
    names = list(dict.fromkeys(name for stage in stages for name in licences(stage.origin)))
    sources = list(dict.fromkeys(name for stage in stages for name in _sources(stage.origin)))
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["imagen-lightning", "pixel-diffusion", "deepfloyd-if"],
        "license": "other",
        "license_name": ", ".join(names) or "unknown",
    }
    if links := [link for stage in stages for link in _values(stage.origin, "licence_link")]:
        header["license_link"] = links[0]
    if hub := [name for name in sources if "/" in name]:
        header["base_model"] = hub
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        "# " + " and ".join(_title(stage) for stage in stages),
        f"Pixel diffusion from text, exported by imagen-lightning {__version__} for diffusers.",
        _table(stages),
        "## Licence\n\n" + (", ".join(names) or UNKNOWN_LICENCE) + "." + _texts(stages),
        "## Where the weights come from\n\n" + "\n".join(map(_origin, stages)),
        "## Training data\n\n" + ("\n".join(_data(stages)) or "Not recorded."),
        "## Use\n\n" + _usage(stages, with_text),
    ]
    if metrics:
        results = json.dumps(list(metrics), indent=2, ensure_ascii=False)
        parts.append(f"## Measured, of the cascade\n\n```json\n{results}\n```")
    return "\n\n".join(parts) + "\n"


def licence_text(origin: Mapping[str, Any] | None) -> str:
    """The text of every licence that an origin or its parents hold."""
    return "\n\n".join(dict.fromkeys(_values(origin, "licence_text")))


def _title(stage: DiffusionMixin) -> str:
    low = low_res_size(stage)
    return f"{low} to {stage.image_size} px" if low else f"text to {stage.image_size} px"


def _table(stages: Sequence[DiffusionMixin]) -> str:
    lines = ["| stage | draws | parameters | steps | guidance | noise_level |", "| --- | --- | --- | --- | --- | --- |"]
    for stage in stages:
        sampling, level = stage.sampling, getattr(stage, "aug_level", None)
        lines.append(
            f"| {stage_name(stage)} | {_title(stage)} | {num_parameters(stage):,} | {sampling.num_steps} | "
            f"{sampling.guidance:g} | {'' if level is None else round(1000 * level)} |"
        )
    return "\n".join(lines)


def _texts(stages: Sequence[DiffusionMixin]) -> str:
    held = any(licence_text(stage.origin) for stage in stages)
    return " Its text lies in each pipeline's LICENSE." if held else ""


def _origin(stage: DiffusionMixin) -> str:
    weights = f"Weights: {weights_words(stage)}."
    if stage.origin is None:
        return f"- {stage_name(stage)}: trained with imagen-lightning from the start, or not recorded. {weights}"
    said = _without(stage.origin, "licence_text")
    return f"- {stage_name(stage)}: `{json.dumps(said, ensure_ascii=False)}`. {weights}"


def _data(stages: Sequence[DiffusionMixin]) -> Iterator[str]:
    for stage in stages:
        for value in _values(stage.origin, "data"):
            yield f"- {stage_name(stage)}: {value}"


def _usage(stages: Sequence[DiffusionMixin], with_text: bool) -> str:
    encoder = stages[0].text.encoder
    assert isinstance(encoder, T5TextEncoder)
    lines = ["import torch", "from diffusers import " + ", ".join(dict.fromkeys(map(_kind, stages))), ""]
    where = "stage_1" if len(stages) > 1 else "."
    if with_text:
        lines.append(f'first = {_kind(stages[0])}.from_pretrained("{where}", watermarker=None)')
    else:
        place = f', subfolder="{encoder.subfolder}"' if encoder.subfolder else ""
        words = encoder.tokenizer_subfolder or encoder.subfolder
        words = f', subfolder="{words}"' if words else ""
        lines += [
            "from transformers import AutoTokenizer, T5EncoderModel",
            f'encoder = T5EncoderModel.from_pretrained("{encoder.name_or_path}"{place})',
            f'tokenizer = AutoTokenizer.from_pretrained("{encoder.name_or_path}"{words})',
            f'first = {_kind(stages[0])}.from_pretrained("{where}", text_encoder=encoder, tokenizer=tokenizer)',
        ]
    lines.append('prompt, negative = first.encode_prompt("a photo of a lighthouse")')
    texts = "prompt_embeds=prompt, negative_prompt_embeds=negative"
    given = ""
    for number, stage in enumerate(stages, 1):
        name = "first" if number == 1 else f"stage_{number}"
        if number > 1:
            lines.append(f'{name} = {_kind(stage)}.from_pretrained("stage_{number}", text_encoder=None)')
        if low_res_size(stage):
            given = f"image={given or 'low_res'}, noise_level={round(1000 * stage.aug_level)}, "  # type: ignore[attr-defined]
        lines.append(
            f"images = {name}({texts}, {given}num_inference_steps={stage.sampling.num_steps}, "
            f'guidance_scale={stage.sampling.guidance:g}, output_type="pt").images'
        )
        given = "images"
    return "```python\n" + "\n".join(lines) + "\n```"


def _kind(stage: DiffusionMixin) -> str:
    return SUPER_RESOLUTION if low_res_size(stage) else BASE


def _sources(origin: Mapping[str, Any] | None) -> Iterator[str]:
    yield from (str(value) for value in _values(origin, "source"))


def _values(value: Any, name: str) -> Iterator[Any]:
    """The values of that name in an origin and its parents."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == name and item:
                yield item
            else:
                yield from _values(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, name)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, name) for key, item in value.items() if key != name}
    return [_without(item, name) for item in value] if isinstance(value, list) else value
