"""LightningDataModules: batches of captioned images by position, and the position in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import torch  # isort: skip
from lightning.pytorch import LightningDataModule  # isort: skip
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagen_lightning.data import shapes
from imagen_lightning.data.order import PositionBatchSampler
from imagen_lightning.images import downsample
from imagen_lightning.types import Batch, InputError


@dataclass
class Sample:
    """One captioned image: image (3, H, W) uint8, and its position in the run."""

    image: Tensor
    caption: str
    key: str
    position: int


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        captions=[sample.caption for sample in samples],
        keys=[sample.key for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
    )


class PositionedDataModule(LightningDataModule):
    """Feeds a run by position and keeps the position, exact to the sample, in every checkpoint.

    Training is endless (`Trainer(max_steps=…)` ends it). The position saved is the one after the last batch whose
    optimizer step the checkpoint holds, whatever the loader has fetched ahead; a run resumed from it sees the next
    sample.

    Subclasses give `training_set()` and `validation_set()`, map-style datasets from position to `Sample`; the
    validation set has a length. They keep `batch_size` (samples of one batch over all processes), `num_workers` (a
    process) and `seed`.
    """

    batch_size: int
    num_workers: int

    def __init__(self) -> None:
        super().__init__()
        self._stepped = 0  # the position after the last batch whose optimizer step was taken
        self._handed = 0  # the position after the last batch handed to the stage
        self._step = 0  # the trainer's global step when that batch was handed out

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None and self.trainer.global_step == 0:
            self._stepped = self._handed = self._step = 0  # a new run; a checkpoint's position is loaded after this

    def training_set(self) -> Dataset[Sample]:
        raise NotImplementedError

    def validation_set(self) -> Dataset[Sample]:
        raise NotImplementedError

    @property
    def position(self) -> int:
        """The number of samples behind the weights, over all processes: where a resumed run goes on."""
        stepped = self.trainer is not None and self.trainer.global_step > self._step
        return self._handed if stepped else self._stepped

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stepped = self._handed = int(state_dict["position"])

    def train_dataloader(self) -> DataLoader[Sample]:
        sampler = PositionBatchSampler(self._begin, self.batch_size, *self._process())
        return self._loader(self.training_set(), sampler)

    def val_dataloader(self) -> DataLoader[Sample]:
        dataset = self.validation_set()
        rank, world_size = self._process()
        return self._loader(dataset, PositionBatchSampler(0, self.batch_size, rank, world_size, stop=len(dataset)))  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
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
        overfitting = self.trainer is not None and self.trainer.overfit_batches > 0
        self._stepped = self._handed = 0 if overfitting else self.position
        return self._handed

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
        )


class ShapesDataset(Dataset[Sample]):
    """The built-in captioned shapes at a size of at most 64 px: item p is drawing p of a split.

    Args:
        seed: another seed draws other scenes.
        split: "train", "val" or "held_out".
        image_size: side in pixels; drawn at 64 and area-resized.
        num_samples: the length; None is endless.
    """

    def __init__(self, seed: int, split: str, image_size: int = 64, num_samples: int | None = None) -> None:
        self.seed = seed
        self.split = split
        self.image_size = image_size
        self.num_samples = num_samples

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("endless shapes have no length")
        return self.num_samples

    def __getitem__(self, position: int) -> Sample:
        image, caption = shapes.sample(self.seed, position, self.split)
        if self.image_size != image.shape[-1]:
            image = downsample(image[None].float(), self.image_size)[0].round().to(torch.uint8)
        return Sample(image, caption, f"shapes-{self.split}-{position:06d}", position)


class ShapesDataModule(PositionedDataModule):
    """Built-in captioned shapes, drawn from a seed: needs no files, never repeats.

    Args:
        image_size: side in pixels, at most 64.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: another seed draws other scenes.
        num_workers: loader processes of each process.
        num_val: validation samples, the same ones each time.

    Raises:
        InputError: image_size beyond 64.
    """

    def __init__(
        self, image_size: int = 64, batch_size: int = 64, seed: int = 0, num_workers: int = 0, num_val: int = 256
    ) -> None:
        super().__init__()
        if not 1 <= image_size <= 64:
            raise InputError(f"image_size {image_size}: shapes are drawn at 64 px; give 1..64")
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.num_val = num_val

    def training_set(self) -> ShapesDataset:
        return ShapesDataset(self.seed, "train", self.image_size)

    def validation_set(self) -> ShapesDataset:
        return ShapesDataset(self.seed, "val", self.image_size, self.num_val)
