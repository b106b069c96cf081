"""What passes between the parts: batches, text, conditioning, and the interfaces of exchangeable parts.

Schedules, samplers, spacings and text encoders are abstract classes rather than protocols, since a YAML's class_path is
checked against them.

Shapes: B images, C = 3 channels, H x W pixels, L text tokens, D text features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imagen_lightning.errors import InputError as InputError


class NonFiniteSamples(InputError):
    """Images that a stage sampled hold NaN or infinite values.

    Attributes:
        images: (B, C, H, W) float, as they are.
        bad: (B,) bool on the CPU, which of them hold such values.
    """

    def __init__(self, message: str, images: Tensor, bad: Tensor) -> None:
        super().__init__(message)
        self.images = images
        self.bad = bad


class _Movable:
    """Gives a dataclass of tensors the `.to` and `.pin_memory` that Lightning and DataLoader call."""

    def _map(self, change: Callable[[Any], Any]) -> Any:
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var,arg-type]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves every tensor as `Tensor.to` does; dtypes given here reach floating tensors only."""

        def change(value: Any) -> Any:
            if isinstance(value, Tensor):
                moved = value.to(*args, **kwargs)
                return moved if value.is_floating_point() else moved.to(value.dtype)
            return value.to(*args, **kwargs) if isinstance(value, _Movable) else value

        return self._map(change)

    def pin_memory(self) -> Any:
        return self._map(lambda value: value.pin_memory() if hasattr(value, "pin_memory") else value)


@dataclass
class Text(_Movable):
    """Encoded captions.

    Attributes:
        states: (B, L, D) float, one state a token.
        mask: (B, L) bool, True where a token is real; None attends to every token.
        pooled: (B, D) float, one vector a caption (the masked mean of the states).
    """

    states: Tensor
    mask: Tensor | None
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.states)


@dataclass
class Batch(_Movable):
    """One batch of captioned images.

    Attributes:
        images: (B, 3, H, W) uint8.
        captions: B strings.
        keys: B strings that name the samples in their source.
        positions: (B,) int64, each sample's number in the run's consumed order; randomness in training derives from it.
        text: the captions' stored states, or None where the stage encodes them.
        empty: the empty caption's stored states, one text; None where `text` is, or where they were not stored.
        weights: (B,) float, by which each sample's loss is multiplied in training; None weighs all alike, by 1.
            They are not normalised: the loss is the mean over the batch of weight times loss, so that it is that of the
            whole step however this is dealt out to processes and accumulated batches. Validation leaves them aside.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    positions: Tensor
    text: Text | None = None
    empty: Text | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Conditioning(_Movable):
    """What a network is told beside the noisy image and the time.

    Attributes:
        text: encoded captions, or None.
        low_res: (B, 3, H, W) in [-1, 1], the upsampled (and noised) low-resolution image of a super-resolution stage.
        aug_level: (B,) in [0, 1], the level at which low_res was noised.
        key_values: text keys and values that a network computed once for a whole sampling run, by layer name.
    """

    text: Text | None = None
    low_res: Tensor | None = None
    aug_level: Tensor | None = None
    key_values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Denoised(NamedTuple):
    """A network's answer where a sampler needs the variance.

    Attributes:
        x0: (B, C, H, W), the estimate of the image.
        variance: (B, C, H, W), the fraction v of Nichol & Dhariwal 2021, eq. 15: a step's log variance is
            v log(large) + (1 - v) log(small), between the forward process's and the posterior's own. It stands for no
            one step, so that a sampler can make of it the variance of whatever step (t, s) it takes. 0 is small, 1 is
            large; nothing but its training keeps a network within.
    """

    x0: Tensor
    variance: Tensor


class Schedule(ABC):
    """x_t = alpha(t) x_0 + sigma(t) epsilon, t in [0, 1], 0 is data and 1 is noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor: ...

    def training_time(self, t: Tensor) -> Tensor:
        """Where a draw t in (0, 1] is trained: t itself, or for a table the end of the step that t lies in."""
        return t

    def level_time(self, level: Tensor) -> Tensor:
        """The time whose noise a low-resolution image of augmentation level `level` in [0, 1] has.

        It is the level itself, or for a table the time of step 1000 level, which is what networks are told.
        """
        return level

    def training_level(self, level: Tensor) -> Tensor:
        """Where a draw of a level in (0, 1) is trained: the level itself, or for a table that of the step around it."""
        return level


class Denoiser(Protocol):
    """x_t (B, C, H, W) and t (B,) in [0, 1] to the estimate of x0, in [-1, 1].

    A sampler with `needs_variance` is given one that returns `Denoised`.
    """

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...


Generator = torch.Generator | Sequence[torch.Generator]


class Sampler(ABC):
    """Walks from noise x at times[0] down the n+1 decreasing times and returns x at times[-1].

    Attributes:
        needs_variance: whether `denoise` is to return `Denoised`, which takes a network that learns its variance.
        evaluations_per_step: how often a step calls `denoise`; one that ends at t = 0 may do with a single call.
    """

    needs_variance: bool = False
    evaluations_per_step: int = 1

    @abstractmethod
    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor: ...


class Spacing(ABC):
    """num_steps + 1 decreasing times in [0, 1], float64, the last 0."""

    @abstractmethod
    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor: ...


class TextEncoder(ABC):
    """A frozen encoder: captions to Text, without gradients, on `device`.

    `name` identifies the encoder (its hub name or the settings that make it), `dim` is D, `max_tokens` the largest L.
    """

    max_tokens: int

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @abstractmethod
    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Text: ...

    def identity(self) -> dict[str, str]:
        """What tells this encoder's states from another's, where they are stored; loads no weights.

        "" under a name is what cannot be told here, such as the digest of weights that are not at hand.
        """
        return {"encoder": self.name, "max_tokens": str(self.max_tokens)}

    def free(self) -> None:  # noqa: B027  (most encoders have nothing to give back)
        """Gives back the memory of weights that the next call loads again, where there are any."""

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of states that each caption has, without padding."""
        text = self(captions)
        return [text.states.shape[1]] * len(text) if text.mask is None else text.mask.sum(dim=1).tolist()
