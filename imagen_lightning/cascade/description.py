"""A stage's name, size and settings as plain data, and a stage made from them, without weights."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from imagen_lightning.cascade.local import first_line
from imagen_lightning.components import build, class_path, describe, short
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError, TextEncoder

_ROOM = 2**24  # elements that a tensor of a stage may have whatever its weights are: tables, positions


def as_module(stage: DiffusionMixin) -> nn.Module:
    return cast(nn.Module, stage)


def low_res_size(stage: DiffusionMixin) -> int | None:
    return getattr(stage, "low_res_size", None)


def stage_name(stage: DiffusionMixin) -> str:
    return stage.stage_name


def num_parameters(stage: DiffusionMixin) -> int:
    return sum(parameter.numel() for parameter in as_module(stage).parameters())


def stage_summary(stage: DiffusionMixin) -> dict[str, Any]:
    """What the manifest says of a stage for people and other programs, all of it taken from the stage."""
    encoder = stage.text.encoder
    return {
        "name": stage_name(stage),
        "image_size": stage.image_size,
        "low_res_size": low_res_size(stage),
        "text": None
        if encoder is None
        else {"encoder": encoder.name, "max_tokens": encoder.max_tokens, "null_text": stage.text.null_text},
        "aug_level": getattr(stage, "aug_level", None),
        "sampling": _sampling(stage),
    }


# Arguments of a stage that decide no pixel of a sample: those of training, and how the network is run, which changes
# the last bits as the device and the batch size do. Any other argument, also a new one, counts.
_NOT_OF_SAMPLES = ("seed", "crop_size", "execution", "sampling", "aug_level")
_NOT_OF_SAMPLES_WITHIN = {"text": ("drop",), "diffusion": ("weighting", "times")}


def sampling_description(stage: DiffusionMixin) -> dict[str, Any]:
    """Return the stage's `Sampling` as plain data, without what each sampling may choose anew."""
    chosen = ("sampler", "num_steps", "guidance")
    return {name: value for name, value in _sampling(stage).items() if name not in chosen}


def _sampling(stage: DiffusionMixin) -> dict[str, Any]:
    return {field.name: describe(getattr(stage.sampling, field.name)) for field in fields(stage.sampling)}


def model_description(stage: DiffusionMixin) -> dict[str, Any]:
    """Return all of a stage that decides a sample's pixels as plain data, but for `Sampling`, weights and `aug_level`.

    A text encoder's folder counts by the encoder's name, wherever it lies.
    """
    arguments = {name: value for name, value in stage.hyperparameters().items() if name not in _NOT_OF_SAMPLES}
    for group, names in _NOT_OF_SAMPLES_WITHIN.items():
        inner = (arguments.get(group) or {}).get("init_args", {})
        for name in names:
            inner.pop(name, None)
    if stage.text.encoder is not None:
        encoder = arguments["text"]["init_args"]["encoder"]
        encoder["name"] = stage.text.encoder.name
        encoder["init_args"].pop("name_or_path", None)
    return {"class_path": class_path(stage), "init_args": arguments}


def share_encoders(stages: list[DiffusionMixin]) -> list[DiffusionMixin]:
    """The stages, equal text encoders made one object: a T5 of gigabytes is held once."""
    shared: dict[str, TextEncoder] = {}
    for stage in stages:
        if stage.text.encoder is not None:
            stage.text.encoder = shared.setdefault(json.dumps(describe(stage.text.encoder)), stage.text.encoder)
    return stages


# What summaries of the first cascades lack.
_ADDED = tuple(f"sampling.{name}" for name in ("thresholding", "spacing", "guidance_interval", "guidance_rescale"))


def contradictions(said: Any, found: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for each value of `found` that `said` lacks or has otherwise; what else it says may stay."""
    if isinstance(found, Mapping) and isinstance(said, Mapping):
        for name in found:
            inner = f"{key}.{name}" if key else name
            if name in said:
                yield from contradictions(said[name], found[name], inner)
            elif inner not in _ADDED:
                yield inner, f"is missing; the stage's own arguments give {short(found[name])}: add it"
    elif said != found:
        yield key, f"is {short(said)}, but the stage's own arguments give {short(found)}; correct either"


def build_stage(
    description: Mapping[str, Any], trust: tuple[str, ...], what: str, shapes: Collection[Sequence[int]]
) -> DiffusionMixin:
    """Make a stage of its class and arguments, its weights left on the meta device, where they need no memory.

    `put_tensors` gives it weights. A stage that needs its weights while it is made has them.

    Args:
        description: `class_path` and `init_args`.
        trust: packages next to this one whose classes may be named.
        what: names the stage in messages.
        shapes: of the tensors that its files hold. A stage of far larger ones, or of far more of them, is refused
            before they take memory.

    Raises:
        InputError: a class of a package that is not trusted, or arguments that make no stage.
    """

    def make() -> DiffusionMixin:
        return build(description, trust, kind=DiffusionMixin, complete=True).eval()

    try:
        with _bounded(shapes):
            try:
                with without_weights():
                    stage = make()
                whole = not _misses_data(as_module(stage))
            except InputError as error:
                if not isinstance(error.__cause__, RuntimeError):
                    raise
                whole = False  # torch raises so where data is asked for; any other reason shows again
            if not whole:
                stage = make()
        stage_summary(stage)  # settings that are none show here
        return stage
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise InputError(f"{what} cannot be built from its arguments: {first_line(error)}") from error


@contextlib.contextmanager
def _bounded(shapes: Collection[Sequence[int]]) -> Iterator[None]:
    """Refuse, within it and in this thread, modules far larger than tensors of these shapes."""
    largest = max([_ROOM, *(4 * math.prod(shape) for shape in shapes)])
    left, here = 4 * len(shapes) + 1000, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if threading.get_ident() == here:
            left -= 1
            if left < 0:
                raise InputError(f"its arguments ask for far more layers than its weights, {len(shapes)} tensors, have")

    handle = register_module_parameter_registration_hook(count)  # type: ignore[arg-type]
    try:
        with _Bounded(largest):
            yield
    finally:
        handle.remove()


class _Bounded(TorchDispatchMode):
    """Refuses to make a tensor of more elements than `largest`."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not types and any(argument.name == "device" for argument in func._schema.arguments):
            made = func(*args, **{**kwargs, "device": "meta"})
            if isinstance(made, Tensor) and made.numel() > self.largest:
                raise InputError(
                    f"its arguments ask for a tensor of shape {tuple(made.shape)}, far larger than any of its weights; "
                    "they belong to another architecture"
                )
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within it, in this thread, modules keep their parameters on the meta device: shape and type without memory."""
    here = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _misses_data(stage: nn.Module) -> bool:
    """Whether a tensor that the weights' files do not hold was made from weights that were not there."""
    stored = {id(value) for value in stage.state_dict(keep_vars=True).values()}
    held = (value for module in stage.modules() for part in (vars(module), module._buffers) for value in part.values())
    return any(isinstance(value, Tensor) and value.is_meta and id(value) not in stored for value in held)


def package_names(trust: Iterable[str]) -> tuple[str, ...]:
    return (trust,) if isinstance(trust, str) else tuple(trust)
