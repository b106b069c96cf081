"""A stage's training from the configuration of `fit`, without weights and without a trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from imagen_lightning.cascade.description import without_weights
from imagen_lightning.cascade.weights import shapes_only
from imagen_lightning.cli import fit
from imagen_lightning.cli.fit_arguments import check_values, prepare
from imagen_lightning.errors import InputError
from imagen_lightning.planning import Training, find_precision
from imagen_lightning.planning.advice import (
    Change,
    adapter_changes,
    average_changes,
    crop_changes,
    eight_bit_changes,
    encoder_changes,
    recompute_changes,
)

_FREES_THE_ENCODER = "imagen_lightning.callbacks.EncodeOnce"


class _Parts(fit.StageCLI):
    """`fit` up to where the trainer would be made."""

    def before_instantiate_classes(self) -> None:
        self.settings.run = self.settings.run or "runs/plan"
        self.settings.ckpt_path = None
        check_values(self.settings.as_dict())

    def after_instantiate_classes(self) -> None:
        pass

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@dataclass(frozen=True)
class Config:
    """What of a configuration the advice needs.

    Attributes:
        starts_from_cascade: whether the stage has weights of a cascade's.
        recompute: the option that sets recomputation.
        lists_captions: whether the data can list its captions, so that they are encoded once.
        needs_stored_text: whether its captions are rather encoded to a folder.
    """

    starts_from_cascade: bool
    recompute: str
    lists_captions: bool
    needs_stored_text: bool

    @staticmethod
    def batch_overrides(training: Training) -> tuple[str, ...]:
        return (
            f"--data.init_args.batch_size={training.batch_size * training.num_processes}",
            f"--trainer.accumulate_grad_batches={training.accumulate}",
        )


def read_training(
    arguments: Sequence[str], device: Literal["cuda", "cpu"], num_tokens: int | None
) -> tuple[Training, Config]:
    """The training that `fit` would do with these arguments; no weights are made.

    Raises:
        InputError: as `fit` would, or a batch that the processes do not divide.
    """
    parts = _parts(arguments, empty=True)
    settings, stage = parts.settings, parts.model
    trainer, encoder = settings.trainer, stage.text.encoder
    processes = _count(trainer.devices) * _count(trainer.num_nodes)
    size = getattr(parts.datamodule, "batch_size", None)
    if size is None:
        raise InputError("the data has no batch_size to plan with; give a DataModule that keeps it as an attribute")
    if size % processes:
        raise InputError(f"batch_size {size} is not a multiple of the {processes} processes; change data's batch_size")
    callbacks = [getattr(callback, "class_path", "") for callback in _list(trainer.callbacks)]
    stored = bool(getattr(parts.datamodule, "text_states", None)) or _FREES_THE_ENCODER in callbacks
    training = Training(
        stage=stage,
        precision=find_precision(trainer.precision),
        batch_size=size // processes,
        accumulate=trainer.accumulate_grad_batches or 1,
        num_processes=processes,
        num_tokens=num_tokens or (encoder.max_tokens if encoder is not None else 1),
        device=device,
        average_on_device=settings.ema.device is None,
        encoder_on_device=not stored,
    )
    arguments_of_model = getattr(settings.model, "init_args", None) or {}
    cascade = "cascade" in arguments_of_model
    data = parts.datamodule
    stores = hasattr(data, "text_states")
    return training, Config(
        starts_from_cascade=cascade or bool(settings.init_from),
        recompute="model.init_args.recompute" if cascade else "model.init_args.network.init_args.recompute",
        lists_captions=hasattr(data, "captions") and not stores,
        needs_stored_text=stores,
    )


def weights_of(arguments: Sequence[str], training: Training) -> Training:
    """The training with its stage's real weights, new or a cascade's."""
    return replace(training, stage=_parts(arguments, empty=False).model)


def levers(training: Training, config: Config) -> list[list[Change]]:
    """All that may be changed about it."""
    text: list[Change] = []
    if config.needs_stored_text:
        text = encoder_changes(training, ("--data.init_args.text_states=FOLDER",))
    elif config.lists_captions:
        text = encoder_changes(training, (f"--trainer.callbacks+={_FREES_THE_ENCODER}",))
    return [
        text,
        average_changes(training),
        recompute_changes(training, config.recompute),
        eight_bit_changes(training),
        crop_changes(training),
        adapter_changes(training) if config.starts_from_cascade else [],
    ]


def _parts(arguments: Sequence[str], empty: bool) -> _Parts:
    fit.quieten()
    sys.argv[1:] = ["fit", *prepare("plan", arguments, ExitStack())]  # where LightningCLI reads them
    with ExitStack() as stack:
        if empty:
            stack.enter_context(without_weights())
            stack.enter_context(shapes_only())
        return _Parts(
            parser_class=fit.Parser,
            save_config_callback=None,
            trainer_defaults=fit.TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )


def _count(value: Any) -> int:
    """Devices or nodes; one where that is left to the machine."""
    if isinstance(value, list):
        return len(value)
    return int(value) if str(value).isdigit() and int(value) > 0 else 1


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
