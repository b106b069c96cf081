"""The LightningDataModule of DreamBooth: a few instance images, and class images that keep what was known."""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import math
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from imagen_lightning.data.class_images import check_parent, find_class_images
from imagen_lightning.data.dataset import Sample
from imagen_lightning.data.folder_datamodule import FolderDataModule
from imagen_lightning.data.mixture import PriorMixture, exact_share
from imagen_lightning.data.positioned import PositionedDataModule
from imagen_lightning.types import InputError


class DreamBoothDataModule(PositionedDataModule):
    """Instance images beside class images: DreamBooth with prior preservation (Ruiz et al. 2022, arXiv 2208.12242).

    The loss is the mean over the instance images plus `prior_weight` times the mean over the class images (eq. 2),
    exactly so in every step whose samples times `share` are a whole number. Validation is the instances' own, if they
    have any, without weights.

    Args:
        instance: any other DataModule with an order: a FolderDataModule for a folder of a few images, a
            LaionDataModule for shards. Its own image_size, seed and captions count; its batch_size and num_workers
            give way to those here.
        class_images: a folder that `imagen-lightning class-images` drew, of whose stages the one of the instance
            images' size is taken; any other folder of images with captions (see FolderDataModule); or a DataModule.
        share: of instance samples, in (0, 1).
        prior_weight: lambda, the weight of the class images' mean loss.
        batch_size: instance and class samples of one batch over all processes, before accumulation.
        seed: of the class images' order.
        num_workers: loader processes of each process.

    Raises:
        InputError: an argument out of range; data without an order, in buckets, or with stored text states; at setup,
            class images that are missing, unfinished, of no such size, or drawn by another cascade than the stage's.
    """

    def __init__(
        self,
        instance: PositionedDataModule,
        class_images: str | Path | PositionedDataModule,
        share: float = 0.5,
        prior_weight: float = 1.0,
        batch_size: int = 4,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(getattr(instance, "max_skip_share", 0.05))
        if not (math.isfinite(prior_weight) and prior_weight >= 0):
            raise InputError(f"prior_weight {prior_weight} must be a number of at least 0")
        self.instance = instance
        self.class_images = class_images
        self.share = share
        self.prior_weight = prior_weight
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._share = exact_share(share)
        self._mixture: PriorMixture | None = None
        self._prior: PositionedDataModule | None = None
        _check_part(instance, "instance")
        if isinstance(class_images, PositionedDataModule):
            _check_part(class_images, "class_images")

    @property
    def image_size(self) -> int:
        """Side in pixels: that of the instance images."""
        return int(self.instance.image_size)  # type: ignore[attr-defined]

    @property
    def prior(self) -> PositionedDataModule:
        """The class images."""
        if self._prior is None:
            if isinstance(self.class_images, PositionedDataModule):
                self._prior = self.class_images
            else:
                found = find_class_images(Path(self.class_images).expanduser(), self.image_size)
                self._prior = FolderDataModule(
                    found, image_size=self.image_size, batch_size=self.batch_size, seed=self.seed
                )
        return self._prior

    def setup(self, stage: str) -> None:
        super().setup(stage)
        parts = [self.instance, self.prior] if stage == "fit" else [self.instance]
        for part in parts:
            part.trainer = self.trainer
            part.setup(stage)
        if stage == "fit":
            self.training_set()
            if self.trainer is not None and not isinstance(self.class_images, PositionedDataModule):
                origin = getattr(self.trainer.lightning_module, "origin", None)
                check_parent(Path(self.class_images).expanduser(), origin)
        self.list_skips()

    def order(self) -> dict[str, Any]:
        parts = {"instance": self.instance.order(), "class images": self.prior.order()}
        return {**super().order(), "share": str(self._share), **parts}

    def training_set(self) -> PriorMixture:
        if self._mixture is None:
            parts = self.instance.training_set(), self.prior.training_set()
            self._mixture = PriorMixture(*parts, self._share, self.prior_weight)
        return self._mixture

    def validation_set(self) -> Dataset[Sample]:
        return self.instance.validation_set()

    def val_dataloader(self) -> Any:
        return super().val_dataloader() if self._validates else []

    def captions(self) -> list[str]:
        return list(dict.fromkeys([*self.instance.captions(), *self.training_set().captions()]))

    @property
    def _validates(self) -> bool:
        return getattr(self.instance, "val", "") is not None


def _check_part(data: PositionedDataModule, name: str) -> None:
    """Raises InputError where the data's samples cannot stand in a batch with others."""
    if isinstance(data, IterableDataset) or not hasattr(data, "image_size"):
        raise InputError(f"{name}: {type(data).__name__} has no image_size; give one of the package's own DataModules")
    if type(data).train_dataloader is not PositionedDataModule.train_dataloader:
        raise InputError(f"{name}: {type(data).__name__} has no order by position; give indexed shards, or a folder")
    if getattr(data, "crop", None) == "bucket":
        raise InputError(
            f"{name}: crop 'bucket' makes images of several sizes, which one batch cannot hold; use 'center'"
        )
    if getattr(data, "text_states", None) is not None:
        raise InputError(
            f"{name}: stored text states cannot stand beside captions without them; drop text_states, and have the "
            "captions encoded once by the callback EncodeOnce"
        )
