"""What the LightningDataModules share: batches by position, the position in the checkpoint, and telling of skips."""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import logging
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from imagen_lightning.data.captions import captions_of
from imagen_lightning.data.dataset import LoadedBatch, Sample, collate
from imagen_lightning.data.order import PositionBatchSampler
from imagen_lightning.data.resume import OnChange, check_same_order, check_same_step
from imagen_lightning.data.skips import SkipLog
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

VALIDATION_SEED = 0  # validation data are the same whatever a run's seed, so that runs of several seeds compare


def leave_signals_to_parent(worker: int) -> None:
    """A signal to all processes is the parent's to act on, which may need further batches to finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class PositionedDataModule(LightningDataModule):
    """Feeds a run by position and keeps the position, exact to the sample, in every checkpoint.

    Training is endless (`Trainer(max_steps=…)` ends it). The position saved is the one after the last batch whose
    optimizer step the checkpoint holds, whatever the loader has fetched ahead; a run resumed from it sees the next
    sample.

    Subclasses give `training_set()` and `validation_set()`, map-style datasets from position to `Sample`; the
    validation set has a length. `order` says what decides which sample a position means; a checkpoint of another order
    is refused, or met with a warning where `on_change` is "warn". They keep `batch_size` (samples of one batch over all
    processes), `num_workers` (a process) and `seed`, and call `list_skips` at the end of their `setup`.

    Args:
        max_skip_share: the run stops where more of its last 10,000 samples were skipped.

    Attributes:
        train_skips, val_skips: the samples that could not be used.
    """

    batch_size: int
    num_workers: int
    seed: int
    on_change: OnChange = "refuse"

    def __init__(self, max_skip_share: float = 0.05) -> None:
        super().__init__()
        self.train_skips = SkipLog(max_skip_share)
        self.val_skips = SkipLog(max_skip_share)
        self._stepped = 0  # the position after the last batch whose optimizer step was taken
        self._handed = 0  # the position after the last batch handed to the stage
        self._step = 0  # the trainer's global step when that batch was handed out

    def setup(self, stage: str) -> None:
        for name, low in (("batch_size", 1), ("num_workers", 0), ("num_val", 1)):
            number = getattr(self, name, None)
            if number is not None and not low <= number < 2**31:
                raise InputError(f"data {name} {number} is outside [{low}, {2**31 - 1}]; give a number in that range")
        if stage == "fit" and self.trainer is not None and self.trainer.global_step == 0:
            self._stepped = self._handed = self._step = 0  # a new run; a checkpoint's position is loaded after this

    def teardown(self, stage: str) -> None:
        self.tell_skips()

    def on_exception(self, exception: BaseException) -> None:
        self.tell_skips()

    def list_skips(self) -> None:
        """Has skips listed in `skipped.jsonl` in the trainer's root folder, where one was set."""
        trainer = self.trainer
        if trainer is not None and Path(trainer.default_root_dir).resolve() != Path.cwd():
            for skips in (self.train_skips, self.val_skips):
                skips.list_in(Path(trainer.default_root_dir) / "skipped.jsonl", past=trainer.is_global_zero)

    def tell_skips(self) -> None:
        """Says how many samples were skipped, and why, at an end."""
        for name, skips in (("training", self.train_skips), ("validation", self.val_skips)):
            if skips.counts:
                log.warning("%s: %s", name, skips.summary())

    def judge_skips(self, batch: Any) -> None:
        """Counts what a batch of the trainer's left out.

        Raises:
            InputError: too many are left out, or so many that the batch is not whole.
        """
        trainer = self.trainer
        if trainer is None or not isinstance(batch, LoadedBatch):
            return
        skips = self.train_skips if trainer.training else self.val_skips
        skips.record(len(batch), batch.skips)
        whole = self.batch_size // trainer.world_size if trainer.training else 1
        if len(batch) < whole:
            raise InputError(skips.complaint(len(batch.skips), len(batch.skips) + len(batch), batch.skips))

    def training_set(self) -> Dataset[Sample]:
        raise NotImplementedError

    def validation_set(self) -> Dataset[Sample]:
        raise NotImplementedError

    def captions(self) -> list[str]:
        """Every caption that a stage will have to encode, each once; those with stored text states are none.

        Raises:
            InputError: there is no end of them.
        """
        sets = [self.training_set()]
        if getattr(self, "val", "") is not None:
            sets.append(self.validation_set())
        return list(dict.fromkeys(caption for dataset in sets for caption in captions_of(dataset)))

    @property
    def position(self) -> int:
        """The number of samples behind the weights, over all processes: where a resumed run goes on."""
        stepped = self.trainer is not None and self.trainer.global_step > self._step
        return self._handed if stepped else self._stepped

    def order(self) -> dict[str, Any]:
        """What decides which sample a position means, as plain data by name."""
        return {"seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order(), "samples_per_step": self._samples_per_step()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same_order(state_dict.get("order", {}), self.order(), self.on_change)
        check_same_step(state_dict.get("samples_per_step"), self._samples_per_step())
        self._stepped = self._handed = int(state_dict["position"])

    def train_dataloader(self) -> DataLoader[Sample]:
        sampler = PositionBatchSampler(self._begin, self.batch_size, *self._process())
        return self._loader(self.training_set(), sampler)

    def val_dataloader(self) -> DataLoader[Sample]:
        dataset = self.validation_set()
        rank, world_size = self._process()
        return self._loader(dataset, PositionBatchSampler(0, self.batch_size, rank, world_size, stop=len(dataset)))  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.judge_skips(batch)
        trainer = self.trainer
        if trainer is not None and trainer.training:
            self._stepped, self._step = self.position, trainer.global_step
            rank, world_size = self._process()
            first = self._handed + self.batch_size // world_size * rank
            if int(batch.positions[0]) != first:
                raise RuntimeError(
                    f"the loader gave position {int(batch.positions[0])} where the run is at {first}: it began before "
                    "the checkpoint's position was loaded"
                )
            self._handed += self.batch_size
        return batch

    def _begin(self) -> int:
        """Where an iteration over the training set begins: called by the sampler."""
        overfitting = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._stepped = self._handed = 0 if overfitting else self.position
        return self._handed

    def _samples_per_step(self) -> int:
        return self.batch_size * (1 if self.trainer is None else self.trainer.accumulate_grad_batches)

    def _process(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError("with several processes this data needs Trainer(use_distributed_sampler=False)")
        return trainer.global_rank, trainer.world_size

    def _loader(self, dataset: Dataset[Sample], sampler: PositionBatchSampler) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # each iteration draws a seed: not from the global generator
        )
