"""The LightningDataModule of images that lie in a folder, each with its captions beside it."""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

from pathlib import Path
from typing import Any, Literal

from imagen_lightning.data.dataset import Decoder
from imagen_lightning.data.decode import FILE_FORMATS
from imagen_lightning.data.folder import PictureDataset, Pictures
from imagen_lightning.data.order import SampleOrder
from imagen_lightning.data.positioned import VALIDATION_SEED, PositionedDataModule
from imagen_lightning.types import InputError


class FolderDataModule(PositionedDataModule):
    """Captioned images as `imagen-lightning shards write` takes them, without the shards: for some thousand at most.

    A folder or zip with a `.txt` of the same name beside each image (captions, one a line) or with a metadata table, a
    table, or a saved dataset. Every image is decoded each time that it is seen. Each comes once an epoch, in another
    order each time; what cannot be used is counted, listed in `skipped.jsonl` and replaced by another.

    Args:
        train: the folder, zip or table.
        val: that of the validation set, read in its order; None validates nothing.
        image_size: side in pixels.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: of the order, of random crops and flips, and of the choice among captions.
        num_workers: loader processes of each process.
        caption: stands for the captions of all training images, which then need none; None takes their own.
        crop: "center", or "random" along the longer side (training only).
        random_flip: mirror half of the training images; wrong where captions speak of left and right.
        allow_upscale: enlarge images whose shorter side is below image_size; otherwise they are skipped.
        max_skip_share: the run stops where more of its last 10,000 samples were skipped.

    Raises:
        InputError: an argument out of range; at setup, a source that is missing or empty.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path | None = None,
        image_size: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        caption: str | None = None,
        crop: Literal["center", "random"] = "center",
        random_flip: bool = False,
        allow_upscale: bool = False,
        max_skip_share: float = 0.05,
    ) -> None:
        super().__init__(max_skip_share)
        if image_size < 1:
            raise InputError(f"image_size {image_size} must be at least 1")
        if crop not in ("center", "random"):
            raise InputError(f"crop {crop!r} is unknown; give 'center' or 'random'")
        if caption is not None and not caption.strip():
            raise InputError("caption is empty; give words, or null for the images' own")
        self.train = train
        self.val = val
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.caption = caption
        self.crop = crop
        self.random_flip = random_flip
        self.allow_upscale = allow_upscale
        self.max_skip_share = max_skip_share
        self._training_set: PictureDataset | None = None
        self._validation_set: PictureDataset | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.training_set()
        if self.val is not None and stage in ("fit", "validate"):
            self.validation_set()
        self.list_skips()

    def order(self) -> dict[str, Any]:
        pictures = self.training_set().pictures
        return {**super().order(), "samples": len(pictures), "images": pictures.digest()}

    def training_set(self) -> PictureDataset:
        if self._training_set is None:
            pictures = Pictures(Path(self.train).expanduser(), self.caption)
            self.tell_unread("train", pictures.source.unread())
            order = SampleOrder([len(pictures)], self.seed, self.batch_size, window=1)
            crop, flip = self.crop == "random", self.random_flip
            decode = Decoder(
                self.image_size, None, None, crop, flip, self.allow_upscale, exact=True, formats=FILE_FORMATS
            )
            self._training_set = PictureDataset(pictures, order, decode, self.seed)
        return self._training_set

    def validation_set(self) -> PictureDataset:
        if self.val is None:
            raise InputError("this data has no validation images; give val=")
        if self._validation_set is None:
            decode = Decoder(self.image_size, allow_upscale=self.allow_upscale, exact=True, formats=FILE_FORMATS)
            pictures = Pictures(Path(self.val).expanduser())
            self.tell_unread("val", pictures.source.unread())
            self._validation_set = PictureDataset(pictures, None, decode, VALIDATION_SEED)
        return self._validation_set

    def val_dataloader(self) -> Any:
        return [] if self.val is None else super().val_dataloader()
