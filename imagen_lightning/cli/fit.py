"""`imagen-lightning fit|validate|test|predict`: LightningCLI with a run folder, loggers and callbacks."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI calls

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import torch
import wandb
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from imagen_lightning.callbacks import (
    EMA,
    Checkpoint,
    FiniteLoss,
    NoiseLevelLoss,
    RunCSVLogger,
    SkippedSamples,
    StepProgress,
    Throughput,
    find_last,
    interrupted,
    update_run_info,
    wandb_logger,
)
from imagen_lightning.callbacks.checkpoint import is_finished
from imagen_lightning.callbacks.finite_loss import FOLDER as NON_FINITE
from imagen_lightning.callbacks.values import stage_name
from imagen_lightning.cascade import load_weights, read_checkpoint
from imagen_lightning.cli.fit_arguments import CONFIG, SEEDS, check_values, prepare, tell
from imagen_lightning.cli.resume_rules import (
    ApplyChanges,
    Change,
    Resume,
    check_changes,
    configuration_of,
    describe,
)
from imagen_lightning.cli.stage_parser import Parser
from imagen_lightning.components import class_path
from imagen_lightning.data.datamodule import PositionedDataModule
from imagen_lightning.errors import InputError
from imagen_lightning.files import unwritable, write_text
from imagen_lightning.stages import DiffusionMixin

TRAINER_DEFAULTS: dict[str, Any] = {
    # The data hands each process its part of a global batch itself, and training does not end with an epoch.
    "use_distributed_sampler": False,
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 50,
    "enable_model_summary": False,
}


class StageCLI(LightningCLI):
    """`fit` of one stage into one run folder, and the other verbs of the trainer."""

    checkpoint: Path | str | None = None  # what the verb starts from
    start_step = 0
    changes: Sequence[Change] = ()  # of a resumed run's configuration

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Checkpoints hold plain data and nothing in one is ever executed: weights_only is no option.
        return {verb: skip | {"weights_only"} for verb, skip in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_instantiator(make, object)
        parser.add_argument("--run", type=str | None, default=None, help="The run folder; fit needs one.")
        parser.add_argument(
            "--resume", action="store_true", help="Go on from the run folder's last checkpoint, with its config.yaml."
        )
        parser.add_argument(
            "--on_change",
            type=Literal["refuse", "warn"],
            default="refuse",
            help="What a resumed run does where seed, shards or window changed, so that samples repeat or are missed.",
        )
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="CASCADE#stage whose weights the stage starts from."
        )
        parser.add_argument(
            "--seed",
            type=int | None,
            default=None,
            help="Sets seed_everything, model.init_args.seed and data.init_args.seed at once; on the command line.",
        )
        parser.add_argument("--wandb_project", type=str, default="imagen-lightning", help="W&B project.")
        parser.add_argument(
            "--wandb_group",
            type=str | None,
            default=None,
            help="W&B group; default: the folder that holds the cascade's runs.",
        )
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(NoiseLevelLoss, "noise_level_loss")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(FiniteLoss, "finite_loss")
        parser.add_lightning_class_args(SkippedSamples, "skipped_samples")

    @property
    def settings(self) -> Any:
        """The parsed configuration of the subcommand."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def _parse_ckpt_path(self) -> None:
        """Leaves the model as configured; Lightning would mix a checkpoint's hyperparameters into it."""

    # ---- before anything is made

    def before_instantiate_classes(self) -> None:
        check_values(self.settings.as_dict())
        if self.subcommand == "fit":
            if not self.settings.run:
                raise InputError("fit needs a run folder: --run runs/NAME, or `run:` in the YAML")
            if self.settings.seed is not None:
                raise InputError("seed is an option of the command line; in a YAML name seed_everything and the others")
            if self.settings.trainer.max_steps in (-1, None) and not self.settings.trainer.max_time:
                raise InputError("training would never end: set trainer.max_steps (or trainer.max_time)")
            self.settings.trainer.default_root_dir = self.settings.run
        if self.subcommand:
            self.checkpoint = self._starting_checkpoint()

    def _set_seed(self) -> None:
        for key in SEEDS:
            seed = self.settings.get(key)
            if type(seed) is int and not 0 <= seed < 2**32:
                raise InputError(f"{key} {seed} is outside [0, {2**32 - 1}]; give a seed in that range")
        super()._set_seed()

    def _starting_checkpoint(self) -> Path | str | None:
        """The run's last checkpoint in `fit`, else what --ckpt_path names; other verbs need either."""
        last = find_last(self.settings.run) if self.settings.run else None
        given = self.settings.ckpt_path
        if self.subcommand == "fit" and last is not None:
            return last
        if given is None:
            if self.subcommand != "fit" and last is None:
                raise InputError(f"{self.subcommand} needs a trained stage: --ckpt_path RUN/checkpoints/last.ckpt")
            return last
        return given

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.settings.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"] = [StepProgress()]
        if self.subcommand and self.settings.trainer.logger in (None, True):
            kwargs["logger"] = False  # `fit` adds the run folder's once it is made
        if (batches := self.settings.trainer.accumulate_grad_batches) < 1:
            raise InputError(f"trainer.accumulate_grad_batches {batches} must be at least 1")
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise InputError(f"trainer: {error}") from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, around what a class said
            if (cause := _input_error(error)) is not None:
                raise cause from None
            raise

    def after_instantiate_classes(self) -> None:
        config = yaml.safe_load(self.dump()) if self.subcommand == "fit" else None
        if self.checkpoint is not None:
            path, content = Path(self.checkpoint), _read_trained(self.checkpoint)
            self.start_step = content["global_step"]
            if config is not None:
                before = configuration_of(path, content)
                resume = Resume(path, content, before, config, self.model, self.settings.on_change)
                self.changes = check_changes(resume)
            _check_fits(path, content, self.model)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        start = {"ckpt_path": None if self.checkpoint is None else str(self.checkpoint), "weights_only": True}
        return {**super()._prepare_subcommand_kwargs(subcommand), **start}

    # ---- fit

    def fit(self, **kwargs: Any) -> None:
        """Trains in the run folder."""
        max_steps = self.settings.trainer.max_steps
        if 0 < max_steps <= self.start_step and not self._ends_now(max_steps):
            tell(f"{self.checkpoint} has trainer.max_steps {max_steps} behind it; raise that to go on")
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.config = yaml.safe_load(self.dump())
        if self.changes:
            tell(describe(self.changes))
            self.trainer.callbacks.append(ApplyChanges(self.changes))  # type: ignore[attr-defined]
        if isinstance(self.datamodule, PositionedDataModule):
            self.datamodule.on_change = self.settings.on_change
        if self.settings.init_from and self.checkpoint is None:
            load_weights(self.model, self.settings.init_from)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.fit(**kwargs)
            return
        if isinstance(self.model, DiffusionMixin):
            self.model.optimization.check_length(self.trainer.max_steps)  # before W&B has a run of it
        with self.run_folder(Path(self.settings.run)):
            self.trainer.fit(**kwargs)

    def _ends_now(self, max_steps: int) -> bool:
        """Whether the run was stopped after its last step and before all that follows it: validation, last.ckpt."""
        run, path = Path(self.settings.run), Path(self.checkpoint or "")
        return self.start_step == max_steps and path == find_last(run) and not is_finished(run, path)

    @contextmanager
    def run_folder(self, run: Path) -> Iterator[None]:
        """Fill the folder with config.yaml, run.json and the loggers.

        However training ends, the run can be resumed: config.yaml stays that of the last checkpoint. A start that
        trained nothing removes all that it made.
        """
        config = run / CONFIG
        before = config.read_text(encoding="utf-8") if config.exists() else None
        main, present = self.trainer.is_global_zero, set(run.glob("*"))
        try:
            with _finished_wandb():
                if main:
                    write_text(config, self.dump())
                    if before is None:
                        update_run_info(run, command=shlex.join(["imagen-lightning", *sys.argv[1:]]))
                if self.settings.trainer.logger in (None, True):
                    self.trainer.loggers = self.loggers()
                yield
        except BaseException as problem:
            last, trained = find_last(run), self.trainer.global_step not in (0, self.start_step)
            if main and before is not None and last == self.checkpoint:
                write_text(config, before)
            elif main and before is None and not trained and not isinstance(problem, SIGTERMException):
                _remove(set(run.glob("*")) - present)
            error = problem if isinstance(problem, InputError) else None
            if isinstance(problem, OSError):
                error = unwritable(problem, run)
            if error is None:
                raise
            if trained:
                advice = f"--resume continues from {last}" if last else "no checkpoint was written"
                raise InputError(f"{error}; {advice}") from problem
            raise error from problem

    def loggers(self) -> list[Logger]:
        run, project = self.settings.run, self.settings.wandb_project
        # W&B gets the resolved configuration with the paths as typed, without what only this machine means.
        config = yaml.safe_load(self.dump())
        stage = stage_name(self.model) if isinstance(self.model, DiffusionMixin) else None
        to_wandb = wandb_logger(run, project, config, group=self.settings.wandb_group, job_type=stage)
        if to_wandb._wandb_init["mode"] == "offline":
            os.environ.setdefault("WANDB_SILENT", "true")
            tell(f"logging to W&B offline run {to_wandb._id} in {Path(run) / 'wandb'}")
        return [RunCSVLogger(run), to_wandb]

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        settings = self.settings.clone()
        settings.on_change = "refuse"  # was said for one start
        return self._parser(self.subcommand).dump(settings, skip_none=False)


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError that an error was raised from."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


@contextmanager
def _finished_wandb() -> Iterator[None]:
    """Ends the W&B run that was begun inside, as failed after an error."""
    earlier, exit_code = wandb.run, 1
    try:
        yield
        exit_code = 0
    finally:
        if wandb.run is not None and wandb.run is not earlier:
            wandb.finish(exit_code=exit_code)


def _remove(paths: Iterable[Path]) -> None:
    """Delete what a start that trained nothing made, unless it lists the batch of a first loss that is not finite."""
    if not any(path.name == NON_FINITE for path in paths):
        for path in paths:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _read_trained(path: Path | str) -> dict[str, Any]:
    """A run's checkpoint; raises InputError where it is another file."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("state_dict"), dict) or not isinstance(checkpoint.get("global_step"), int):
        raise InputError(f"checkpoint {str(path)!r} is not one of a run; give one of RUN/checkpoints/")
    return checkpoint


def _check_fits(path: Path, checkpoint: dict[str, Any], stage: torch.nn.Module) -> None:
    """Raises InputError where a checkpoint is not one of the stage."""
    weights = checkpoint["state_dict"]
    shapes = {name: tuple(value.shape) for name, value in stage.state_dict().items()}
    for name in sorted({*shapes, *weights}):
        there = tuple(weights[name].shape) if name in weights else "absent"
        if there != shapes.get(name, "absent"):
            raise InputError(
                f"checkpoint {str(path)!r} belongs to another architecture: weight {name!r} is {there} there and "
                f"{shapes.get(name, 'absent')} in the configured stage; use the config.yaml of its run"
            )


def make(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Make what a configuration names; a class that refuses its arguments is one line with the class's name."""
    try:
        return cls(*args, **kwargs)
    except (InputError, MisconfigurationException):
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, MemoryError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{class_path(cls)} cannot be made with these arguments: {problem}") from error


_NO_NEWS = ("💡 Tip", "`Trainer.fit` stopped: `max_steps=", "GPU available: ", "TPU available: ", "Seed set to ")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NO_NEWS)  # with several processes the rank stands before


def quieten() -> None:
    """Silences advertisements, what is said elsewhere too, and warnings that are Lightning's to mend or mistaken."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_news)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
    # Data without validation shards, which is no mistake.
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
    # In our checkpoints the weights that every verb loads are the average.
    warnings.filterwarnings("ignore", message=r"You're using the WeightAveraging callback, but loading a checkpoint")


def main(argv: Sequence[str]) -> int:
    with ExitStack() as stack:  # which holds the run folder's lock
        return _main(argv[0], prepare(argv[0], argv[1:], stack))


def _main(verb: str, arguments: list[str]) -> int:
    quieten()
    torch.set_float32_matmul_precision("high")
    sys.argv[1:] = [verb, *arguments]  # where LightningCLI reads them, and the processes that it starts
    try:
        cli = StageCLI(
            parser_class=Parser,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            auto_configure_optimizers=False,
            # Stages describe themselves. Lightning's way ties each optimizer factory to this object, hence to the
            # trainer, and the EMA's copy of the stage would copy them too.
            load_from_checkpoint_support=False,
            seed_everything_default=0,
        )
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except SIGTERMException:  # outside training, where there is nothing to save
        return 128 + signal.SIGTERM
    ended_by = interrupted(cli.trainer)
    return 128 + ended_by if ended_by else 0
