"""What a resumed run may change: one table of rules, which checks a resume and which the documentation prints.

`python -m imagen_lightning.cli.resume_rules` prints the table of docs/resume.md.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
import torch
import yaml

from imagen_lightning.cli.fit_arguments import CONFIG
from imagen_lightning.errors import InputError
from imagen_lightning.stages import DiffusionMixin, Optimization
from imagen_lightning.stages.optimization import lr_groups

APPLIED = "applied"
REFUSED = "refused"
NO_EFFECT = "no effect on training"
UNLESS_ACCEPTED = "refused unless `--on_change warn`"
NOT_COMPARED = "not compared"

OPTIMIZATION = "model.init_args.optimization"
OPTIMIZER = f"{OPTIMIZATION}.optimizer"
FLOAT32_WEIGHTS = (None, "32", "32-true", "16-mixed", "bf16-mixed", 32, "16", "bf16", 16)


@dataclass(frozen=True)
class Change:
    """One configuration key whose value differs; absent counts as null."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True)
class Resume:
    """What a run is resumed from, and as what.

    Attributes:
        path: the checkpoint's.
        checkpoint: its content.
        before: the configuration it was trained with.
        now: the new configuration.
        stage: made from the new configuration.
        on_change: "refuse" or "warn".
    """

    path: Path
    checkpoint: Mapping[str, Any]
    before: dict[str, Any]
    now: dict[str, Any]
    stage: torch.nn.Module
    on_change: str = "refuse"


@dataclass(frozen=True)
class Rule:
    """What happens where one of some configuration keys, or one below it, changes.

    Attributes:
        keys: patterns in which * stands for anything; of all rules the first that matches counts.
        outcome: one of the constants above.
        why: of the outcome, for the documentation and for the message of a refusal.
        unfit: the reason why one change is refused all the same, or None.
    """

    keys: tuple[str, ...]
    outcome: str
    why: str
    unfit: Callable[[Change, Resume], str | None] = lambda change, resume: None

    def matches(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in self.keys)

    def refusal(self, change: Change, resume: Resume) -> str | None:
        return self.why if self.outcome == REFUSED else self.unfit(change, resume)


# ---- where a change is refused only for some values


def _unknown_to_optimizer(change: Change, resume: Resume) -> str | None:
    name = change.key.rpartition(".")[2]
    if name not in _optimization(resume).make(resume.stage).param_groups[0]:
        return f"the optimizer keeps no {name!r} that could be replaced"
    return None


def _other_groups(change: Change, resume: Resume) -> str | None:
    trained = [name for name, parameter in resume.stage.named_parameters() if parameter.requires_grad]
    old = _at(resume.before, f"{OPTIMIZATION}.lr_scales")
    groups = [list(lr_groups(trained, scales).values()) for scales in (old, _optimization(resume).lr_scales)]
    return None if groups[0] == groups[1] else "the optimizer's groups of parameters would be others"


def _other_weights(change: Change, resume: Resume) -> str | None:
    same = change.old in FLOAT32_WEIGHTS and change.new in FLOAT32_WEIGHTS
    return None if same else "the saved weights and optimizer state are of another type"


def _inside_a_step(change: Change, resume: Resume) -> str | None:
    done = resume.checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    return f"the {done} batches so far are not whole steps of {change.new}" if done % (change.new or 1) else None


def _other_noise(change: Change, resume: Resume) -> str | None:
    return None if resume.on_change == "warn" else "the noise would be another; or accept that with --on_change warn"


def _other_stage(change: Change, resume: Resume) -> str | None:
    """A cascade at another place, from which the stage must be made as it was."""
    saved = {key: value for key, value in resume.checkpoint["hyper_parameters"].items() if key != "_instantiator"}
    stage = resume.stage
    same = isinstance(stage, DiffusionMixin) and saved == stage.hyperparameters()
    return None if same else "the stage of that cascade is another"


def _given_without_effect(change: Change, resume: Resume) -> str | None:
    used = change.new is None or Path(change.new) == resume.path
    return None if used else f"the run resumes from {resume.path}, and what is given would not be used"


def _below(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


RULES = (
    Rule(("run", "resume", "on_change", "seed", "trainer.default_root_dir"), NOT_COMPARED, "each start says them anew"),
    Rule(
        ("ckpt_path", "init_from"),
        NOT_COMPARED,
        "refused where given and not used, since the folder has a checkpoint of its own",
        _given_without_effect,
    ),
    Rule(("seed_everything",), NO_EFFECT, "weights and random states come from the checkpoint"),
    Rule(
        _below(f"{OPTIMIZER}.init_args", "lr", "betas", "eps", "weight_decay"),
        APPLIED,
        "from the first step on, with the optimizer's state as saved",
        _unknown_to_optimizer,
    ),
    Rule((OPTIMIZER,), REFUSED, "the saved optimizer state would not fit"),
    Rule(
        _below(OPTIMIZATION, "lr_scales"),
        APPLIED,
        "values; refused where other parameters would share a learning rate",
        _other_groups,
    ),
    Rule(_below(OPTIMIZATION, "train", "freeze"), REFUSED, "the saved optimizer state is of other parameters"),
    Rule((OPTIMIZATION,), APPLIED, "schedule and warm-up: the learning rate follows the new one at once"),
    Rule(
        _below("model.init_args", "sampling", "aug_level", "execution", "trust"),
        APPLIED,
        "how images are sampled and the network is run",
    ),
    Rule(("model.init_args*.recompute",), APPLIED, "memory and time; numbers may differ by rounding"),
    Rule(("model.init_args.seed",), UNLESS_ACCEPTED, "the noise would be another", _other_noise),
    Rule(("model.init_args.cascade",), APPLIED, "another place; refused where its stage is another", _other_stage),
    Rule(
        ("model",),
        REFUSED,
        "architecture, objective, schedule, text and adapter stay those that the weights were trained with",
    ),
    Rule(("data.class_path",), REFUSED, "the saved position is of other data"),
    Rule(_below("data.init_args", "num_workers", "cache", "cache_gb", "verify"), NO_EFFECT, "how samples are fetched"),
    Rule(
        _below("data.init_args", "seed", "train", "window", "filter", "subject", "word", "num_images", "bucket_step"),
        UNLESS_ACCEPTED,
        "where the order of samples changes; shards may lie elsewhere",
    ),
    Rule(("data",), APPLIED, "from the next sample on; a warning where a step takes another number of samples"),
    Rule(
        ("trainer.precision",),
        APPLIED,
        "among 32-true, bf16-mixed and 16-mixed, whose weights are float32; refused otherwise",
        _other_weights,
    ),
    Rule(
        ("trainer.accumulate_grad_batches",),
        APPLIED,
        "refused where the checkpoint would lie inside a step",
        _inside_a_step,
    ),
    Rule(
        _below("trainer", "plugins", "use_distributed_sampler", "overfit_batches"),
        REFUSED,
        "what it would do to a resumed run is not known",
    ),
    Rule(
        _below("trainer", "m??_steps", "m??_epochs", "max_time", "limit_*", "gradient_clip_*"),
        APPLIED,
        "a cosine schedule ends at the new max_steps",
    ),
    Rule(
        _below("trainer", "accelerator", "devices", "num_nodes", "strategy", "sync_batchnorm"),
        APPLIED,
        "samples and their noise stay the same; sums may differ by rounding",
    ),
    Rule(
        (*_below("trainer", "val_check_interval", "check_val_*", "num_sanity_val_steps"), "checkpoint", "ema"),
        APPLIED,
        "intervals of validation and checkpoints; the average's decay and place",
    ),
    Rule(
        (
            *_below("trainer", "callbacks", "logger", "log_every_n_steps"),
            *("noise_level_loss", "throughput", "finite_loss", "skipped_samples", "wandb_project", "wandb_group"),
        ),
        APPLIED,
        "logging and callbacks",
    ),
    Rule(
        _below(
            "trainer",
            *("enable_*", "profiler", "deterministic", "benchmark", "detect_anomaly", "inference_mode", "barebones"),
            *("fast_dev_run", "model_registry", "reload_dataloaders_every_n_epochs"),
        ),
        APPLIED,
        "how Lightning runs the steps",
    ),
    Rule(("*",), REFUSED, "the program does not know whether it may change"),
)


def rule_of(key: str) -> Rule:
    """Return the rule for a configuration key."""
    return next(rule for rule in RULES if rule.matches(key))


def differences(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    """Yield the changes from one configuration to another, sorted by key; lists are compared whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield Change(key, old, new)


def check_changes(resume: Resume) -> list[Change]:
    """Return the changes of a resume that are applied or have no effect.

    Raises:
        InputError: one of them is refused; the message names it with its old and new value.
    """
    found = [
        change
        for change in differences(_explicit(resume.before), _explicit(resume.now))
        if rule_of(change.key).outcome != NOT_COMPARED or rule_of(change.key).refusal(change, resume)
    ]
    for change in found:
        if (reason := rule_of(change.key).refusal(change, resume)) is not None:
            raise InputError(
                f"{change.key} was {_shown(change.old)} in the run of {resume.path} and is now {_shown(change.new)}: "
                f"{reason}; restore it, or begin a new run"
            )
    return found


def describe(changes: Sequence[Change]) -> str:
    """Return the one line on what a resumed run changes."""
    notes = [f"{item}" + (" (no effect)" if rule_of(item.key).outcome == NO_EFFECT else "") for item in changes]
    return f"resume: {', '.join(notes)}"


def configuration_of(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that a checkpoint was trained with: its own, or that next to an older checkpoint.

    Raises:
        InputError: there is none.
    """
    if isinstance(own := checkpoint.get("config"), dict):
        return own
    file = path.parent.parent / CONFIG
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"checkpoint {str(path)!r} holds no configuration and there is no {file}; copy it there")
    return found


class ApplyChanges(pl.Callback):
    """Give the optimizer of a resumed run what its configuration says now, once its saved state is restored.

    Args:
        changes: of the configuration.
    """

    def __init__(self, changes: Sequence[Change]) -> None:
        start = f"{OPTIMIZER}.init_args."
        self.options = [change.key.removeprefix(start) for change in changes if change.key.startswith(start)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, DiffusionMixin):
            (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
            pl_module.optimization.reapply(pl_module, optimizer, config.scheduler, self.options)  # type: ignore[arg-type]


def table() -> str:
    """Return the documentation's table of the rules."""
    lines = ["| keys | a change is | |", "| --- | --- | --- |"]
    names = [", ".join(f"`{key}`" for key in rule.keys) for rule in RULES[:-1]] + ["all others"]
    lines += [f"| {name} | {rule.outcome} | {rule.why} |" for name, rule in zip(names, RULES, strict=True)]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _optimization(resume: Resume) -> Optimization:
    return resume.stage.optimization  # type: ignore[return-value]


def _explicit(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the default optimization written out where it has none."""
    arguments = _at(config, "model.init_args")
    if not isinstance(arguments, dict) or "optimization" not in arguments:
        return config
    optimization = {item.name: item.default for item in fields(Optimization)} | (arguments["optimization"] or {})
    optimization["freeze"] = list(optimization["freeze"] or ())
    if optimization["optimizer"] is None:
        parameters = inspect.signature(torch.optim.AdamW).parameters
        options = {name: item.default for name, item in parameters.items() if name != "params"}
        options["betas"] = list(options["betas"])
        optimization["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": options}
    arguments = {**arguments, "optimization": optimization}
    return {**config, "model": {**config["model"], "init_args": arguments}}


if __name__ == "__main__":
    print(table(), end="")
