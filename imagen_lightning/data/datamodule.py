"""The LightningDataModules of built-in shapes and of indexed shards."""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imagen_lightning.data.buckets import bucket_sizes, bucketed_order
from imagen_lightning.data.dataset import ShapesDataset, ShardDataset
from imagen_lightning.data.decode import decode_text_states
from imagen_lightning.data.filters import Filter, FilterCounts, select_rows
from imagen_lightning.data.index import cache_folder
from imagen_lightning.data.order import BucketedOrder, SampleOrder
from imagen_lightning.data.positioned import VALIDATION_SEED, PositionedDataModule
from imagen_lightning.data.resume import shards_hash
from imagen_lightning.data.shard_cache import cache_size
from imagen_lightning.data.shards import CAPTION, IMAGE, METADATA, TEXT_STATES, Shards, Verify, open_shards
from imagen_lightning.data.skips import Reason, Skip, SkipLog, Unusable
from imagen_lightning.data.subjects import Subject, SubjectDataset
from imagen_lightning.data.text_states import TextStates, check_stage, open_text_states
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)


class ShapesDataModule(PositionedDataModule):
    """Built-in captioned shapes, drawn from a seed: needs no files, never repeats.

    Args:
        image_size: side in pixels, at most 64.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: another seed draws other scenes to train on; those of validation stay.
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
        return ShapesDataset(VALIDATION_SEED, "val", self.image_size, self.num_val)


class SubjectShapesDataModule(PositionedDataModule):
    """A few drawings of one subject, to fine-tune on: the same ones again and again, in an order of each epoch's own.

    Args:
        subject: what one object of each scene is: "hourglass", the shape that no other data shows, or any of a size, a
            color and a shape, such as "large purple star" (see `Subject.of`).
        word: a made-up word, such as "<zib>", that stands for the subject in captions; None names it.
        num_images: different drawings; validation takes others.
        image_size: side in pixels, at most 64.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: another seed draws other scenes, in another order.
        num_workers: loader processes of each process.
        num_val: validation samples, the same ones each time.

    Raises:
        InputError: image_size beyond 64, fewer than one image, a subject or word that cannot be read.
    """

    def __init__(
        self,
        subject: str = "hourglass",
        word: str | None = None,
        num_images: int = 50,
        image_size: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        num_val: int = 256,
    ) -> None:
        super().__init__()
        if not 1 <= image_size <= 64 or num_images < 1:
            raise InputError(
                f"image_size {image_size}, num_images {num_images}: shapes are drawn at 64 px; give 1..64, and at "
                "least 1 image"
            )
        self.subject = subject
        self.word = word
        self.num_images = num_images
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.num_val = num_val
        self._subject = Subject.of(subject, word)

    def order(self) -> dict[str, Any]:
        return {**super().order(), "subject": self.subject, "word": self.word, "samples": self.num_images}

    def training_set(self) -> SubjectDataset:
        order = SampleOrder([self.num_images], self.seed, self.batch_size, window=1)
        return SubjectDataset(self._subject, self.seed, "train", self.image_size, self.num_images, order)

    def validation_set(self) -> SubjectDataset:
        return SubjectDataset(self._subject, VALIDATION_SEED, "val", self.image_size, self.num_val)


class LaionDataModule(PositionedDataModule):
    """Captioned images from tar shards in webdataset's layout: jpg, png or webp with txt or json captions.

    Images become sRGB, are resized by the shorter side with the area filter and cropped square. Samples that cannot be
    used are counted, logged, and listed in `skipped.jsonl` in the trainer's root folder where one was set; in training
    another sample of the window, fixed by the position, stands in. Where samples hold stored text states (`text.npz`),
    these reach `Batch.text`, and samples without them count as unusable.

    Args:
        train: shards: a path, a folder, a glob, a brace pattern such as `train-{00000..00009}.tar`, an address of one
            or with braces such as `s3://bucket/train-{00000..00009}.tar`, or a list of them.
        val: shards of the validation set, likewise, read in their order; None validates nothing.
        image_size: side in pixels; with crop "bucket" the square root of the area.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: of the order, of random crops and flips, and of the choice among captions.
        num_workers: loader processes of each process.
        caption_field: the json field that holds the caption or a list of captions; None takes the txt, and json's
            "caption" where there is no txt. Of several captions (lines of the txt) one is drawn by (seed, position).
        crop: "center"; "random" along the longer side (training only); or "bucket" (training only): images keep their
            aspect, each batch has one of several sizes of about the area of image_size squared (see `bucket_sizes`),
            and what is over the nearest of them is cropped at its centre. Each sample still comes once an epoch of its
            bucket; a bucket of fewer samples than a batch goes to its neighbour. Validation stays square.
        random_flip: mirror half of the training images; wrong where captions speak of left and right.
        allow_upscale: enlarge images whose shorter side is below image_size; otherwise they are skipped.
        text_encoder: the encoder's name that stored text states must bear; None takes that of the first sample.
        max_skip_share: the run stops where more of its last 10,000 samples were skipped.
        window: shards whose samples are shuffled together.
        num_val: validation samples, taken evenly spaced; None takes all.
        filter: conditions on the samples' metadata, such as `{min_side: 256, punsafe_max: 0.1, language: [en, de]}` or
            the text "min_side=256,punsafe_max=0.1,language=en,de" (see `Filter`), for training and validation alike.
            The metadata is that of the parquet beside a shard or of the samples' json (see `read_columns`). Samples
            that do not meet them, or lack the field, are left out and no faults: how many each condition removed is
            logged at setup and kept in `filter_counts`, by "train" and "val".
        text_states: a folder of text states that `imagen-lightning shards embed` stored, or a glob of such files, for
            training and validation shards alike. They reach `Batch.text` in place of the shards' own (`text.npz`); the
            stage's encoder must be the one that made them, and its weights are not loaded.
        verify: "sha256" compares each sample with the SHA-256 that its shard's index holds, and skips those that
            differ; shards without are hashed at setup. "none" trusts the disk.
        cache: folder for remote shards, and for indexes of shards in folders that cannot be written; None is
            $IMAGEN_LIGHTNING_CACHE, else `~/.cache/imagen-lightning`. Processes and runs may share it.
        cache_gb: gigabytes of remote shards that it keeps; it must hold those of two windows, of three with buckets.
        decode: "fast" decodes JPEGs of four or more times the size at a half, a quarter or an eighth of their own (see
            `decode_fitted`); "exact" at full size. Other formats are always decoded exactly. Validation does as
            training does, since a model is judged on the pictures that it was taught to make.
        bucket_step: sides of buckets are multiples of it, a divisor of image_size; None takes an eighth. The network
            must divide by what its levels ask, and a super-resolution stage's low-resolution image come out whole.

    Raises:
        InputError: an argument out of range; at setup, shards that match nothing or hold too few usable samples, a
            filter that leaves none, or text states that are missing or of another encoder than the stage's.
    """

    def __init__(
        self,
        train: str | Path | list[str],
        val: str | Path | list[str] | None = None,
        image_size: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        caption_field: str | None = None,
        crop: Literal["center", "random", "bucket"] = "center",
        random_flip: bool = False,
        allow_upscale: bool = False,
        text_encoder: str | None = None,
        max_skip_share: float = 0.05,
        window: int = 8,
        num_val: int | None = None,
        filter: dict[str, Any] | str | None = None,
        text_states: str | Path | None = None,
        verify: Verify = "none",
        cache: str | Path | None = None,
        cache_gb: float = 20.0,
        decode: Literal["fast", "exact"] = "fast",
        bucket_step: int | None = None,
    ) -> None:
        super().__init__(max_skip_share)
        if crop not in ("center", "random", "bucket"):
            raise InputError(f"crop {crop!r} is unknown; give 'center', 'random' or 'bucket'")
        if decode not in ("fast", "exact"):
            raise InputError(f"decode {decode!r} is unknown; give 'fast' or 'exact'")
        if image_size < 1 or (num_val is not None and num_val < 1):
            raise InputError(f"image_size {image_size}, num_val {num_val}: both must be at least 1")
        self.train = train
        self.val = val
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.caption_field = caption_field
        self.crop = crop
        self.random_flip = random_flip
        self.allow_upscale = allow_upscale
        self.text_encoder = text_encoder
        self.max_skip_share = max_skip_share
        self.window = window
        self.num_val = num_val
        self.filter = filter
        self.text_states = text_states
        self.verify = verify
        self.cache = cache
        self.cache_gb = cache_gb
        self.decode = decode
        self.bucket_step = bucket_step
        self._sizes = bucket_sizes(image_size, bucket_step) if crop == "bucket" else []
        self.filter_counts: dict[str, FilterCounts] = {}
        self._filter = Filter.of(filter)
        self._training_set: ShardDataset | None = None
        self._validation_set: ShardDataset | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.training_set()
        if self.val is not None and stage in ("fit", "validate"):
            self.validation_set()
        if self.trainer is not None:
            sets = [item for item in (self._training_set, self._validation_set) if item is not None]
            check_stage(self.trainer.lightning_module, [(item.text_states, item.text) for item in sets])
        self.list_skips()

    def order(self) -> dict[str, Any]:
        dataset = self.training_set()
        names = [index.stem for index in dataset.shards.indexes]
        sizes = [len(rows) for rows in dataset.rows]
        shards = shards_hash(zip(names, sizes))
        order = {**super().order(), "window": self.window, "samples": sum(sizes), "shards": shards}
        if isinstance(dataset.order, BucketedOrder):
            # A position then depends on the batches before it.
            order |= {"batch_size": self.batch_size, "buckets": dataset.order.digest()}
        return order

    def training_set(self) -> ShardDataset:
        if self._training_set is None:
            shards, rows, text = self._open("train", self.train, self.train_skips)
            settings = self.seed, self.batch_size, self.window
            order: SampleOrder | BucketedOrder
            if self._sizes:
                order = bucketed_order(shards, rows, self._sizes, *settings, self._cache_folder())
            else:
                order = SampleOrder([len(item) for item in rows], *settings)
            self._training_set = ShardDataset(
                shards,
                rows,
                order,
                self.image_size,
                self.seed,
                self.caption_field,
                text,
                self.crop == "random",
                self.random_flip,
                self.allow_upscale,
                text_states=self._text_states(shards, rows),
                exact=self.decode == "exact",
                sizes=self._sizes,
            )
        return self._training_set

    def validation_set(self) -> ShardDataset:
        if self.val is None:
            raise InputError("this data has no validation shards; give val=")
        if self._validation_set is None:
            shards, rows, text = self._open("val", self.val, self.val_skips)
            self._validation_set = ShardDataset(
                shards,
                rows,
                None,
                self.image_size,
                VALIDATION_SEED,
                self.caption_field,
                text,
                allow_upscale=self.allow_upscale,
                num_samples=self.num_val,
                text_states=self._text_states(shards, rows),
                exact=self.decode == "exact",
            )
        return self._validation_set

    def _begin(self) -> int:
        begin = super()._begin()
        if self._sizes:  # where on_change "warn" let another batch size pass
            self._stepped = self._handed = begin = begin - begin % self.batch_size
        return begin

    def val_dataloader(self) -> Any:
        return [] if self.val is None else super().val_dataloader()

    def _open(
        self, split: str, patterns: str | Path | list[str], skips: SkipLog
    ) -> tuple[Shards, list[np.ndarray], tuple[str, int] | None]:
        """Indexes shards and returns them with the rows that may be used and the stored text states' encoder."""
        num_windows = 3 if self._sizes else 2  # one that is read, one ahead; buckets may be in two
        shards = open_shards(
            patterns,
            verify=self.verify,
            cache=None if self.cache is None else Path(self.cache),
            cache_bytes=cache_size(self.cache_gb),
            read_ahead=num_windows * self.window if split == "train" else 2,
        )
        has_text = self.text_states is None and any(
            (index.spans[:, TEXT_STATES, 0] >= 0).any() for index in shards.indexes
        )
        rows, faults = [], []
        for index in shards.indexes:
            present = index.spans[:, :, 0] >= 0
            captioned = present[:, METADATA] | (present[:, CAPTION] & (self.caption_field is None))
            wrong = np.select(
                [~present[:, IMAGE], ~captioned, ~present[:, TEXT_STATES] & has_text], [1, 2, 3], default=0
            )
            reasons = (Reason.NO_IMAGE, Reason.NO_CAPTION, Reason.NO_TEXT_STATES)
            faults += index.skips
            faults += [
                Skip(index.shard, index.keys[row], reasons[wrong[row] - 1]) for row in np.flatnonzero(wrong).tolist()
            ]
            rows.append(np.flatnonzero(wrong == 0))
        unread = sum((Counter(index.unread) for index in shards.indexes), Counter())
        skips.record_index(sum(len(item) for item in rows), faults, unread)
        self.tell_unread(split, unread)
        if self._filter is not None:
            rows = self._filtered(split, self._filter, shards, rows)
        return shards, rows, self._first_text(shards, rows) if has_text else None

    def _filtered(self, split: str, filter_: Filter, shards: Shards, rows: list[np.ndarray]) -> list[np.ndarray]:
        """The rows whose metadata meets the filter."""
        kept, counts = select_rows(filter_, shards, rows, self._cache_folder())
        self.filter_counts[split] = counts
        if self.trainer is None or self.trainer.is_global_zero:
            log.warning("%s: filter: %s", split, counts)
        if not counts.left:
            raise InputError(f"filter {str(filter_)!r}: {counts}; widen it, or give shards with that metadata")
        return kept

    def _cache_folder(self) -> Path:
        return cache_folder() if self.cache is None else Path(self.cache)

    def _text_states(self, shards: Shards, rows: list[np.ndarray]) -> TextStates | None:
        if self.text_states is None:
            return None
        return open_text_states(self.text_states, shards, rows, self.caption_field)

    def _first_text(self, shards: Shards, rows: list[np.ndarray]) -> tuple[str, int]:
        """The encoder's name and number of features of the first text states that can be read."""
        fault = None
        for shard, numbers in enumerate(rows):
            for row in numbers:
                try:
                    text, name = decode_text_states(shards.read(shard, int(row), TEXT_STATES) or b"", self.text_encoder)
                except Unusable as error:  # noqa: PERF203
                    fault = error.reason
                else:
                    return name, text.states.shape[2]
        raise InputError(
            f"no text states can be used: {fault.value if fault else 'none found'}"
            + (f" (wanted: text_encoder {self.text_encoder!r})" if self.text_encoder else "")
        )
