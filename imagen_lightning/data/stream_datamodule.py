"""The LightningDataModule of shards that cannot be indexed."""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch.utils.data import DataLoader

from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.dataset import Decoder, ShardDataset
from imagen_lightning.data.filters import Filter, FilterCounts
from imagen_lightning.data.positioned import PositionedDataModule, leave_signals_to_parent
from imagen_lightning.data.stream import ShardStream, StreamBatch, collate_stream, stream_addresses
from imagen_lightning.data.text_states import check_stage
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)


class StreamingLaionDataModule(PositionedDataModule):
    """Captioned images from shards that cannot be indexed: commands, or addresses that can only be read forward.

    Shards are drawn at random with replacement, endlessly, by each worker of each process for itself, and their samples
    shuffled in a buffer. So a run is not exact: samples repeat or wait long, and a resumed run goes on at its position
    with a fresh draw, not with the next sample. Where shards can be indexed, `LaionDataModule` has none of that.

    What a sample is, how images are made to fit, and what becomes of those that cannot be used is as in
    `LaionDataModule`, but for: the members of a sample must be neighbours in the tar; in place of one that cannot be
    used the next of the stream comes.

    Args:
        train: one or a list of paths, `http://`, `s3://`, … addresses and `pipe:COMMAND`, with braces such as
            `pipe:curl -s https://HOST/{00000..00127}.tar`. A command's standard output is a tar; files that end in
            .gz, .bz2 or .xz are decompressed.
        allow_pipe: commands in `train` may be run by a shell on this machine.
        val: indexed shards of the validation set, as `LaionDataModule` takes them; None validates nothing.
        image_size: side in pixels.
        batch_size: samples of one batch over all processes and before accumulation.
        seed: of the draw of shards, the shuffling, random crops and flips, and the choice among captions.
        num_workers: loader processes of each process; each draws its own shards.
        shuffle_buffer: samples, as they are in the shard, that each worker holds to draw the next from.
        filter: see `LaionDataModule`; the metadata of a streamed sample is that of its json.
        text_encoder: the name that stored text states (`text.npz`) must bear, which then reach `Batch.text`; None reads
            none.
        caption_field: see `LaionDataModule`; so are all others.

    Raises:
        InputError: an argument out of range; at setup, a command without `allow_pipe`, a path that matches nothing, an
            address that cannot be opened here; in training, too many samples that cannot be used, or a filter that
            leaves none.
    """

    def __init__(
        self,
        train: str | Path | list[str],
        allow_pipe: bool = False,
        val: str | Path | list[str] | None = None,
        image_size: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        shuffle_buffer: int = 1000,
        filter: dict[str, Any] | str | None = None,
        text_encoder: str | None = None,
        caption_field: str | None = None,
        crop: Literal["center", "random"] = "center",
        random_flip: bool = False,
        allow_upscale: bool = False,
        decode: Literal["fast", "exact"] = "fast",
        max_skip_share: float = 0.05,
        num_val: int | None = None,
    ) -> None:
        super().__init__(max_skip_share)
        if crop not in ("center", "random"):
            raise InputError(f"crop {crop!r} is unknown; give 'center' or 'random'")
        if decode not in ("fast", "exact"):
            raise InputError(f"decode {decode!r} is unknown; give 'fast' or 'exact'")
        if image_size < 1 or shuffle_buffer < 1:
            raise InputError(f"image_size {image_size}, shuffle_buffer {shuffle_buffer}: both must be at least 1")
        self.train = train
        self.allow_pipe = allow_pipe
        self.val = val
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.filter = filter
        self.text_encoder = text_encoder
        self.caption_field = caption_field
        self.crop = crop
        self.random_flip = random_flip
        self.allow_upscale = allow_upscale
        self.decode = decode
        self.max_skip_share = max_skip_share
        self.num_val = num_val
        self._filter = Filter.of(filter)
        self._indexed = LaionDataModule(
            train=val or [],
            val=val,
            image_size=image_size,
            batch_size=batch_size,
            seed=seed,
            caption_field=caption_field,
            allow_upscale=allow_upscale,
            decode=decode,
            text_encoder=text_encoder,
            max_skip_share=max_skip_share,
            num_val=num_val,
            filter=filter,
        )
        self.val_skips = self._indexed.val_skips
        self.filter_counts: dict[str, FilterCounts] = self._indexed.filter_counts

    def order(self) -> dict[str, Any]:
        return {}  # no draw of shards is ever drawn again: a position means no sample

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._indexed.trainer = self.trainer
        if self.val is not None and stage in ("fit", "validate"):
            self.validation_set()
        self.list_skips()
        if stage != "fit":
            return
        self.training_set()
        if self._filter is not None:
            self.filter_counts["train"] = FilterCounts(0, dict.fromkeys(self._filter.reasons, 0))
        if self.trainer is not None and self.text_encoder is not None:
            check_stage(self.trainer.lightning_module, [(None, (self.text_encoder, 0))])
        if self.trainer is None or self.trainer.is_global_zero:
            log.warning(
                "shards are streamed: a resumed run goes on at its position with a fresh draw of shards, not with the "
                "next sample; resume is exact with LaionDataModule, which reads indexed shards"
            )

    def tell_skips(self) -> None:
        super().tell_skips()
        if "train" in self.filter_counts and self.filter_counts["train"].num_samples:
            log.warning("train: filter: %s", self.filter_counts["train"])

    def training_set(self) -> ShardStream:  # type: ignore[override]
        decode = Decoder(
            self.image_size,
            self.caption_field,
            None if self.text_encoder is None else (self.text_encoder, None),
            self.crop == "random",
            self.random_flip,
            self.allow_upscale,
            self.decode == "exact",
        )
        rank, _ = self._process()
        addresses = stream_addresses(self.train, self.allow_pipe)
        return ShardStream(addresses, decode, self.seed, rank, self.shuffle_buffer, self._filter)

    def validation_set(self) -> ShardDataset:
        return self._indexed.validation_set()

    def train_dataloader(self) -> DataLoader[Any]:
        return _StreamLoader(
            self._begin,
            self.training_set(),
            batch_size=self._share(),
            num_workers=self.num_workers,
            collate_fn=collate_stream,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> Any:
        return [] if self.val is None else super().val_dataloader()

    def _share(self) -> int:
        """The samples of a batch that this process takes."""
        _, world_size = self._process()
        if self.batch_size < 1 or self.batch_size % world_size:
            raise InputError(
                f"batch_size {self.batch_size} is the number of samples over all {world_size} processes and must be a "
                "positive multiple of it"
            )
        return self.batch_size // world_size

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, StreamBatch) and self.trainer is not None:
            rank, _ = self._process()
            batch.positions = self._handed + self._share() * rank + torch.arange(len(batch))
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def judge_skips(self, batch: Any) -> None:
        if isinstance(batch, StreamBatch) and self.trainer is not None:
            if self._filter is not None:
                self.filter_counts["train"].add(batch.filter_counts)
            if len(batch) < self._share():
                self.train_skips.record(len(batch), batch.skips)
                self._complain(batch)
        super().judge_skips(batch)

    def _complain(self, batch: StreamBatch) -> NoReturn:
        """Ends a run for which the stream gives too little."""
        if len(batch.skips) < sum(batch.filter_counts.removed.values()):
            counts = self.filter_counts["train"]
            raise InputError(f"filter {str(self._filter)!r}: {counts}; widen it, or give shards with that metadata")
        raise InputError(self.train_skips.complaint(len(batch.skips), len(batch.skips) + len(batch), batch.skips))


class _StreamLoader(DataLoader[Any]):
    """A DataLoader of a ShardStream that asks where the run is when an iteration begins; its workers are new then."""

    def __init__(self, begin: Callable[[], int], dataset: ShardStream, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self._begin = begin

    def __iter__(self) -> Any:
        self.dataset.start = self._begin()  # type: ignore[attr-defined]
        return super().__iter__()
