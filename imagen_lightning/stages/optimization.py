"""How a stage is trained: optimizer, learning rates, and which parameters are trained at all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from imagen_lightning.networks.lora import is_adapter
from imagen_lightning.types import InputError

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


@dataclass
class Optimization:
    """How the stage is trained; no part of a cascade.

    Parameters are named by patterns of their names in the stage, where * stands for anything: `network.down_blocks.*`,
    `text_network.*`, `*.bias`.

    Attributes:
        optimizer: any torch optimizer by class_path, e.g. torch.optim.Adam; by default torch.optim.AdamW. A step of
            torch.optim.Adafactor is the learning rate times the weight's own size, which leaves weights that begin at
            zero there at rates such as 1e-4; the paper's is transformers.Adafactor with scale_parameter False.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        lr_schedule: "constant", or "cosine" down to `final_lr_share` at the trainer's max_steps.
        final_lr_share: the share of the learning rate that a cosine schedule ends at.
        train: patterns of the parameters that are trained; null for all, or for those of the stage's adapter.
        freeze: patterns of the parameters that are not trained, also where `train` names them.
        lr_scales: what the learning rate is multiplied by, by pattern; of several that match the first counts.
    """

    # None stands for the default: jsonargparse would give a YAML's optimizer the default one's arguments, e.g. AdamW's
    # weight_decay to SGD.
    optimizer: OptimizerFactory = None  # type: ignore[assignment]
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    final_lr_share: float = 0.0
    train: list[str] | None = None
    freeze: Sequence[str] = ()
    lr_scales: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW if self.optimizer is None else self.optimizer
        if self.lr_schedule not in ("constant", "cosine"):
            raise InputError(f"lr_schedule {self.lr_schedule!r} is unknown; use 'constant' or 'cosine'")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps {self.warmup_steps} must not be negative")
        for pattern, scale in (self.lr_scales or {}).items():
            if not 0 < scale < math.inf:
                raise InputError(f"lr_scales {scale} of {pattern!r} must be positive; to train none of it, freeze it")

    def check_length(self, max_steps: int) -> None:
        """Raises InputError where training ends before a cosine schedule begins to descend, or never (-1)."""
        if self.lr_schedule == "cosine" and max_steps <= self.warmup_steps:
            raise InputError(
                f"lr_schedule 'cosine' needs trainer.max_steps above warmup_steps {self.warmup_steps}, got {max_steps}"
                "; raise trainer.max_steps or lower optimization.warmup_steps"
            )

    def share_at(self, step: int, total: int) -> float:
        """The share of its learning rate that an optimizer takes at a step of `total`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return 1.0
        progress = min((step - self.warmup_steps) / (total - self.warmup_steps), 1.0)
        end = self.final_lr_share
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    # ---- which parameters

    def freeze_parameters(self, stage: nn.Module) -> None:
        """Lets the stage's chosen parameters alone have gradients; what asks for none already stays so, unless `train`
        names it.

        Raises:
            InputError: a pattern that matches no parameter, or nothing left to train.
        """
        parameters = dict(stage.named_parameters())
        for setting in ("train", "freeze", "lr_scales"):
            _check_patterns(setting, getattr(self, setting) or (), list(parameters))
        adapted = any(map(is_adapter, parameters))
        for name, parameter in parameters.items():
            if self.train is not None:
                parameter.requires_grad_(_matches(name, self.train))
            elif adapted and not is_adapter(name):
                parameter.requires_grad_(False)
            if _matches(name, self.freeze):
                parameter.requires_grad_(False)
        chosen = self.train is not None or self.freeze
        if chosen and not any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError("optimization.train and freeze leave no parameter to train")

    def make(self, stage: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the stage's parameters that are trained: one group for each factor of the learning rate.

        Raises:
            InputError: the optimizer refuses its arguments, or one of them is not finite.
        """
        trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        groups = lr_groups(list(trained), self.lr_scales)
        parameters = [{"params": [trained[name] for name in names]} for names in groups.values()]
        try:
            optimizer = self.optimizer(parameters if self.lr_scales else list(trained.values()))
        except (TypeError, ValueError) as error:
            raise InputError(f"optimization.optimizer cannot be made: {error}") from error
        for option, value in optimizer.defaults.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise InputError(f"optimization.optimizer: {option} {value} is not finite; give a number")
        if self.lr_scales:
            for scale, group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] = scale * group["lr"]
        return optimizer

    def reapply(
        self, stage: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, options: Iterable[str]
    ) -> None:
        """Give an optimizer with a checkpoint's state this object's learning rates, as scheduled, and some options.

        Args:
            stage: whose parameters the optimizer has, in the groups that `make` makes.
            optimizer: restored.
            scheduler: its LambdaLR, restored.
            options: names such as "betas" whose values are those of a new optimizer; all others stay as saved.
        """
        wanted = self.make(stage).param_groups
        scheduler.base_lrs = [group["lr"] for group in wanted]
        for group, new, share in zip(optimizer.param_groups, wanted, scheduler.lr_lambdas, strict=True):
            group.update({option: new[option] for option in options})
            group["initial_lr"], group["lr"] = new["lr"], new["lr"] * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def lr_groups(names: Iterable[str], scales: Mapping[str, float] | None) -> dict[float, list[str]]:
    """Return the parameters' names by the factor of their learning rate, 1 where no pattern of `scales` matches."""
    groups: dict[float, list[str]] = {}
    for name in names:
        scale = next((scale for pattern, scale in (scales or {}).items() if fnmatchcase(name, pattern)), 1.0)
        groups.setdefault(scale, []).append(name)
    return groups


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(setting: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises InputError for a pattern that matches no name."""
    for pattern in patterns:
        if not fnmatch_filter(names, pattern):
            below = [f"{part}.{pattern}" for part in ("network", "text_network")]
            near = [other for other in below if fnmatch_filter(names, other)]
            near = near or difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise InputError(f"optimization.{setting} {pattern!r} matches no parameter; near it: {', '.join(near)}")
