"""Checkpoints: after optimizer steps only, whole or not at all, and on signals."""

from __future__ import annotations

import filecmp
import logging
import math
import os
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch import callbacks  # isort: skip
from lightning.pytorch.plugins.io import TorchCheckpointIO  # isort: skip
from lightning.pytorch.trainer.states import TrainerFn  # isort: skip

from imagen_lightning.callbacks.loggers import RunCSVLogger
from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.callbacks.rng import rng_states, set_rng_states
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.io.atomic import is_temporary, whole_file
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
LAST = "last.ckpt"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_STEP = re.compile(r"step-(\d+)\.ckpt")


class NonFiniteWeightsError(RuntimeError):
    """Weights that are not finite were about to be saved over good ones."""


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint next to its place and then renames it, on the disk before it counts as written.

    Lightning's own writer holds a second copy in memory and moves it over from the system's temporary folder, which is
    not atomic between file systems.

    Raises:
        OSError: the file cannot be written, with its path; nothing is left of it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with whole_file(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind what torch's writer raised: at the end of a file that is not whole it raises another one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoint(callbacks.Checkpoint):
    """Writes RUN/checkpoints/step-N.ckpt after every n-th optimizer step, and last.ckpt at the end of training.

    It is written after an optimizer step, when the EMA has been updated, and never inside validation or after the EMA
    has taken the weights' place. It holds the global random states of every process beside Lightning's own content, so
    that a resumed run is the uninterrupted one, and plain data only (`torch.load(weights_only=True)`). metrics.csv is
    written first, so that it has every row of the steps behind a checkpoint.

    A validation that is due at a checkpoint's step comes after it, and then last.ckpt at the end. A resumed run makes
    up for what a kill cut off of that, though no step be left to train; Lightning alone would take it for done.

    SIGTERM, SIGINT and SIGUSR1 end training: the step is finished, its checkpoint written, `interrupted` set, and `fit`
    returns. A second SIGINT stops at once. Lightning's own handlers, which save from inside the signal, stand back.

    An InputError between two optimizer steps of a single process, such as that of too many unusable samples, ends
    training after a checkpoint too.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many of the newest stay; an older one goes only when the newer is whole.

    Attributes:
        interrupted: the signal that ended training, or None.
        config: the run's resolved configuration, plain data, which each checkpoint holds; None for none.

    Raises:
        InputError: a number below 1.
        NonFiniteWeightsError: in training, before weights that are not finite would be saved.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        super().__init__()
        if every_n_steps < 1 or keep < 1:
            raise InputError(f"Checkpoint every_n_steps {every_n_steps} and keep {keep} must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.interrupted: signal.Signals | None = None
        self.config: dict[str, Any] | None = None
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._seen_step = 0
        self._saved_step: float = math.inf  # nothing is to be saved before training starts
        self._rng: list[dict[str, Any]] = []
        self._ended = False
        self._max_steps: int | None = None  # the trainer's, while it is raised so that it ends a run again

    # ---- training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileIO()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and 0 < trainer.max_steps <= checkpoint["global_step"]:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1  # else Lightning leaves at once

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        self._signal = self.interrupted = None
        if trainer.global_rank < len(self._rng):
            set_rng_states(self._rng[trainer.global_rank], pl_module.device)
        self._rng = []
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.rewind(trainer.global_step)
        if trainer.is_global_zero:
            _remove_temporaries(run_dir(trainer))
        self._install_handlers()
        self._take_over(trainer)
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        _validate_if_due(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return  # gradients are still accumulating
        self._seen_step = trainer.global_step
        self._heed_signal(trainer)
        stopping = trainer.should_stop and trainer.fit_loop._can_stop_early
        if stopping or trainer.global_step == trainer.max_steps or trainer.global_step % self.every_n_steps == 0:
            _log_step(trainer)
            self._save(trainer, pl_module)
            self._heed_signal(trainer)  # one that came while it was written need not wait for another step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Stopped by its validation, or by max_epochs: the weights are the trained ones still.
        at_end = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        if (trainer.should_stop or at_end) and trainer.global_step > self._saved_step:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()
        # A signal in the last step leaves out the validation after it.
        self._ended = self.interrupted is None or trainer.global_step != trainer.max_steps

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._ended:
            _write_metrics(trainer)  # what others logged at the end, too
            if trainer.is_global_zero:
                self._name_last(trainer)
        self._ended = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, InputError) and self._between_steps(trainer):
            self._save(trainer, pl_module)
            self._name_last(trainer)

    def _between_steps(self, trainer: pl.Trainer) -> bool:
        """Whether weights, counts and random states are those after an optimizer step that is not saved yet."""
        loop = trainer.fit_loop.epoch_loop
        batches = loop.batch_progress.current
        return (
            trainer.world_size == 1  # other processes may know of no error, and would not save
            and bool(trainer.training)
            and trainer.global_step > self._saved_step
            and batches.ready == batches.completed
            and not loop._should_accumulate()
        )

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, step = run_dir(trainer) / FOLDER, trainer.global_step
        with uncounted(trainer):
            self._check_finite(trainer, pl_module)
            _write_metrics(trainer)
            trainer.save_checkpoint(folder / f"step-{step}.ckpt", weights_only=False)
            self._saved_step = step
            if trainer.is_global_zero:
                older = sorted(number for number in _steps(folder) if number < step)
                for number in older[: max(len(older) - (self.keep - 1), 0)]:
                    (folder / f"step-{number}.ckpt").unlink()
            trainer.strategy.barrier("imagen_lightning.Checkpoint")

    def _name_last(self, trainer: pl.Trainer) -> None:
        folder = run_dir(trainer) / FOLDER
        path = folder / f"step-{trainer.global_step}.ckpt"
        if path.exists():
            _link(path, folder / LAST)

    def _check_finite(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = [parameter.detach().isfinite().all() for parameter in pl_module.parameters()]
        if trainer.strategy.reduce_boolean_decision(not finite or bool(torch.stack(finite).all()), all=True):
            return
        bad = next((n for (n, _), good in zip(pl_module.named_parameters(), finite) if not good), "on another process")
        good = find_last(run_dir(trainer))
        raise NonFiniteWeightsError(
            f"weights are not finite after step {trainer.global_step} (first: {bad}) and were not saved; "
            f"{f'{good} is the last good checkpoint' if good else 'there is no earlier checkpoint'}; try a lower "
            "learning rate, trainer.gradient_clip_val 1.0, or precision bf16-mixed in place of 16-mixed"
        )

    # ---- state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.config is not None:
            checkpoint["config"] = self.config

    def state_dict(self) -> dict[str, Any]:
        return {"rng": of_all_processes(rng_states("cuda" if torch.cuda.is_initialized() else "cpu"))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng = state_dict["rng"]  # set when training starts: making the loaders draws from the generators

    # ---- signals

    def _install_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _take_over(self, trainer: pl.Trainer) -> None:
        """Acts on a SIGTERM that came since Lightning's handler was installed, which would end the run unsaved."""
        if trainer.received_sigterm:
            trainer._signal_connector.received_sigterm = False
            self._note(signal.SIGTERM, None)

    def _restore_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        text = f"\n{self._signal.name}: the step is finished and a checkpoint written; Ctrl-C stops at once\n"
        os.write(2, text.encode())  # print is not safe inside a signal

    def _heed_signal(self, trainer: pl.Trainer) -> None:
        self.interrupted = self.interrupted or self._agreed_signal(trainer)
        if self.interrupted is not None:
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop._skip_next_val = True  # stopping would validate first

    def _agreed_signal(self, trainer: pl.Trainer) -> signal.Signals | None:
        """The signal that any process received."""
        if trainer.world_size == 1:
            return self._signal
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return None
        return self._signal or signal.SIGTERM


def _validate_if_due(trainer: pl.Trainer) -> None:
    """Runs the validation that was due at the checkpoint's step and comes after it, which Lightning takes for done."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if not loop.restarted_on_train_batch_end or fetcher is None or not loop._should_check_val_fx(fetcher):
        return
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True


def _log_step(trainer: pl.Trainer) -> None:
    """Gives metrics.csv the step's row, which Lightning logs after the checkpoint, where a killed run would lose it."""
    connector = trainer._logger_connector
    metrics: dict[str, Any] = dict(connector.metrics["log"])
    if metrics and "step" not in metrics and connector.should_update_logs:
        metrics.setdefault("epoch", trainer.current_epoch)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _write_metrics(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, RunCSVLogger):
            logger.flush()


def interrupted(trainer: pl.Trainer) -> signal.Signals | None:
    """The signal that ended the trainer's run, or None."""
    found = (callback.interrupted for callback in trainer.callbacks if isinstance(callback, Checkpoint))  # type: ignore[attr-defined]
    return next((number for number in found if number is not None), None)


def find_last(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None; broken ones are named in the log and passed over."""
    folder = Path(run_dir) / FOLDER
    candidates = [folder / f"step-{number}.ckpt" for number in sorted(_steps(folder), reverse=True)]
    if (folder / LAST).is_file():
        candidates.append(folder / LAST)
    for path in candidates:
        if _is_whole(path):
            return path
        log.warning("%s is broken and passed over", path)
    return None


def is_finished(run_dir: str | Path, path: Path) -> bool:
    """Whether a run that was not to go beyond the checkpoint at `path` did all that comes after its last step."""
    last = Path(run_dir) / FOLDER / LAST
    return last.is_file() and (path.samefile(last) or filecmp.cmp(path, last, shallow=False))


def _remove_temporaries(run: Path) -> None:
    """Remove what a killed process left: in all of the folder where it is a run's own, else of checkpoints alone."""
    for path in run.rglob(".*") if (run / "config.yaml").exists() else (run / FOLDER).glob(".*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _link(path: Path, link: Path) -> None:
    """Makes `link` another name of the file, or a copy where the file system has no hard links."""
    with whole_file(link) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
