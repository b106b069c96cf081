"""Map-style datasets from a position of the run to a captioned image, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from imagen_lightning.data import shapes
from imagen_lightning.data.decode import (
    SHARD_FORMATS,
    decode_captions,
    decode_fitted,
    decode_text_states,
    stack_text,
)
from imagen_lightning.data.order import BucketedOrder, SampleOrder
from imagen_lightning.data.shards import CAPTION, IMAGE, METADATA, TEXT_STATES, Shards
from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.data.text_states import TextStates, read_captions
from imagen_lightning.images import downsample
from imagen_lightning.types import Batch, Text

_ATTEMPTS = 100  # samples tried at one position before it is given up
_PLACE, _FLIP, _CAPTION = range(3)  # random streams of a position


@dataclass
class Sample:
    """One captioned image.

    Attributes:
        image: (3, H, W) uint8; None where no usable sample was found.
        caption: the caption.
        key: the sample's name in its source.
        position: its number in the run's consumed order.
        text: the caption's stored states, a batch of one.
        empty: the empty caption's, likewise.
        skips: samples that were tried before this one.
        weight: of its loss in training; None in data that weighs all alike.
    """

    image: Tensor | None
    caption: str
    key: str
    position: int
    text: Text | None = None
    empty: Text | None = None
    skips: tuple[Skip, ...] = ()
    weight: float | None = None


@dataclass
class LoadedBatch(Batch):
    """A Batch, and the samples that were left out while it was loaded."""

    skips: list[Skip] = field(default_factory=list)


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Stacks samples, a worker's in shared memory at once; those without an image are left out."""
    usable = [sample for sample in samples if sample.image is not None]
    texts = [sample.text for sample in usable if sample.text is not None]
    images = [sample.image for sample in usable if sample.image is not None]
    weights = [1.0 if sample.weight is None else sample.weight for sample in usable]
    weighted = any(sample.weight is not None for sample in usable)
    return LoadedBatch(
        images=default_collate(images) if images else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        captions=[sample.caption for sample in usable],
        keys=[sample.key for sample in usable],
        positions=torch.tensor([sample.position for sample in usable], dtype=torch.int64),
        text=stack_text(texts) if texts else None,
        empty=next((sample.empty for sample in usable if sample.empty is not None), None),
        weights=torch.tensor(weights) if weighted else None,
        skips=[skip for sample in samples for skip in sample.skips],
    )


@dataclass(frozen=True)
class Decoder:
    """From a sample's members to its image, caption and stored text states.

    Attributes:
        image_size: side in pixels.
        caption_field: see `decode_captions`.
        text: (encoder's name, number of features) of the stored text states, or None where they are not used; of any
            number of features where that is None.
        random_crop: crop the longer side anywhere, not at its centre.
        random_flip: mirror half of the images.
        allow_upscale: enlarge images that are too small.
        exact: decode large JPEGs at full size (see `decode_fitted`).
        formats: Pillow's names of the formats that are read.
    """

    image_size: int
    caption_field: str | None = None
    text: tuple[str, int | None] | None = None
    random_crop: bool = False
    random_flip: bool = False
    allow_upscale: bool = False
    exact: bool = False
    formats: tuple[str, ...] = SHARD_FORMATS

    def __call__(
        self,
        members: Sequence[bytes | None],
        random: Callable[[int], np.random.Generator],
        stored: Callable[[str], Text] | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, str, Text | None]:
        """The image (3, H, W) uint8, the caption, and its text states if any.

        Args:
            members: by kind, IMAGE, CAPTION, METADATA and TEXT_STATES; None where the sample has none.
            random: gives the generator of each random choice, by its number.
            stored: from a caption to its text states, where they do not lie in the sample.
            size: height and width in pixels, where they are not image_size.

        Raises:
            Unusable: a member is missing or cannot be used.
        """
        image = members[IMAGE]
        if image is None:
            raise Unusable(Reason.NO_IMAGE)
        captions = decode_captions(members[CAPTION], members[METADATA], self.caption_field)
        caption = captions[0]
        if self.text is None and len(captions) > 1:
            caption = captions[random(_CAPTION).integers(len(captions))]
        text = self._text(members[TEXT_STATES]) if stored is None else stored(caption)
        place = random(_PLACE).random() if self.random_crop else 0.5
        picture = decode_fitted(image, size or self.image_size, place, self.allow_upscale, self.exact, self.formats)
        if self.random_flip and random(_FLIP).random() < 0.5:
            picture = picture.flip(-1)
        return picture, caption, text

    def _text(self, data: bytes | None) -> Text | None:
        if self.text is None:
            return None
        if data is None:
            raise Unusable(Reason.NO_TEXT_STATES)
        name, num_features = self.text
        text, _ = decode_text_states(data, name)
        if text.states.shape[2] != (num_features or text.states.shape[2]):
            raise Unusable(Reason.BAD_TEXT_STATES)
        return text


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


class ShardDataset(Dataset[Sample]):
    """Samples of indexed shards by position.

    With an order, a sample that cannot be used is replaced by another of its window, which depends on the position
    alone; without one, samples come as they lie and those that cannot be used are left out.

    Args:
        shards: the indexed shards.
        rows: the rows of each shard that may be used.
        order: the order over `rows`, or None.
        image_size: side in pixels.
        seed: of the random crop, flip and choice among captions, which depend on it and the position alone.
        caption_field: see `decode_captions`.
        text: (encoder's name, number of features) of the stored text states, or None where they are not used.
        random_crop: crop the longer side anywhere, not at its centre.
        random_flip: mirror half of the images.
        allow_upscale: enlarge images that are too small.
        num_samples: without an order, the number of samples, taken evenly spaced; None takes all.
        text_states: the captions' stored states, in files beside the shards.
        exact: decode large JPEGs at full size.
        sizes: (height, width) of each bucket of a `BucketedOrder`, in place of image_size.
    """

    def __init__(
        self,
        shards: Shards,
        rows: Sequence[np.ndarray],
        order: SampleOrder | BucketedOrder | None,
        image_size: int,
        seed: int = 0,
        caption_field: str | None = None,
        text: tuple[str, int] | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        allow_upscale: bool = False,
        num_samples: int | None = None,
        text_states: TextStates | None = None,
        exact: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.shards = shards
        self.rows = list(rows)
        self.order = order
        self.seed = seed
        self.text = text
        self.decode = Decoder(image_size, caption_field, text, random_crop, random_flip, allow_upscale, exact)
        self.sizes = list(sizes)
        self.text_states = text_states
        self._ends = np.cumsum([len(item) for item in self.rows])
        self.num_samples = min(num_samples or self._ends[-1], self._ends[-1])
        self._upcoming: list[int] = []  # shards that are fetched ahead

    def __len__(self) -> int:
        if self.order is not None:
            raise TypeError("an endless order has no length")
        return int(self.num_samples)

    def __getitem__(self, position: int) -> Sample:
        skips: list[Skip] = []
        for attempt in range(_ATTEMPTS if self.order is not None else 1):
            shard, row = self._find(position, attempt)
            self._read_ahead(position)
            try:
                sample = self._load(shard, row, position)
            except Unusable as fault:
                skips.append(Skip(self.shards.indexes[shard].shard, self.shards.key(shard, row), fault.reason))
            else:
                sample.skips = tuple(skips)
                return sample
        return Sample(None, "", "", position, skips=tuple(skips))

    def captions(self) -> list[str]:
        """Every caption that a sample may have; none where their text states are stored."""
        if self.text is not None or self.text_states is not None:
            return []
        found: dict[str, None] = {}
        for shard, rows in enumerate(self.rows):
            for row in rows.tolist():
                try:
                    found |= dict.fromkeys(read_captions(self.shards, shard, row, self.decode.caption_field))
                except Unusable:  # noqa: PERF203  (it is counted when it is trained on)
                    continue
        return list(found)

    def _read_ahead(self, position: int) -> None:
        """Has the remote shards fetched that are read from a position on."""
        if self.shards.cache is None:
            return
        if self.order is None:
            shard = self._find(position, 0)[0]
            following = -(-int(self._ends[shard]) * int(self.num_samples) // int(self._ends[-1]))  # position
            upcoming = [shard, self._find(min(following, len(self) - 1), 0)[0]]
        else:
            upcoming = self.order.shards_at(position)
        if upcoming != self._upcoming:
            self._upcoming = upcoming
            self.shards.prefetch(list(dict.fromkeys(upcoming)))

    def _find(self, position: int, attempt: int) -> tuple[int, int]:
        if self.order is None:
            place = position * int(self._ends[-1]) // int(self.num_samples)
            shard = int(np.searchsorted(self._ends, place, side="right"))
            number = place - (int(self._ends[shard - 1]) if shard else 0)
        else:
            shard, number = self.order.replacement(position, attempt) if attempt else self.order.at(position)
        return shard, int(self.rows[shard][number])

    def _load(self, shard: int, row: int, position: int) -> Sample:
        members = self.shards.sample(shard, row)
        stem, stored = self.shards.indexes[shard].stem, None
        if self.text_states is not None:
            stored = partial(self.text_states.read, stem)
        size = self.sizes[self.order.bucket(position)] if isinstance(self.order, BucketedOrder) else None
        image, caption, text = self.decode(members, partial(self._random, position), stored, size)
        key = f"{stem}/{self.shards.key(shard, row)}"
        return Sample(image, caption, key, position, text, self.text_states.empty if self.text_states else None)

    def _random(self, position: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, position, stream, 2])
