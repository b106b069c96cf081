"""Captioned images of a folder, a zip or a table by position, read as they lie: no shards are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from imagen_lightning.data.dataset import Decoder, Sample
from imagen_lightning.data.decode import decode_captions
from imagen_lightning.data.ingest.record import Entry, Record, Source
from imagen_lightning.data.ingest.sources import open_source
from imagen_lightning.data.order import SampleOrder
from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.errors import InputError

_ATTEMPTS = 100  # samples tried at one position before it is given up


class Pictures:
    """The records of a source, listed once; loader processes may share it.

    Args:
        path: see `ingest.sources.open_source`.
        caption: stands for every image's captions; None takes their own.

    Raises:
        InputError: no such source, or nothing in it.
    """

    def __init__(self, path: Path, caption: str | None = None) -> None:
        self.path = path
        self.caption = caption
        self.source: Source = open_source(path)
        try:
            self.entries: list[Entry] = list(self.source.entries())
        except OSError as error:
            raise self._unreadable(error) from error
        if not self.entries:
            raise InputError(f"{str(path)!r} holds no image")

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, number: int) -> str:
        """The image's name within the source's own."""
        return f"{self.path.name}/{self.entries[number].name}"

    def digest(self) -> str:
        """12 hexadecimal digits of the images' names and sizes, and of the caption where one stands for all."""
        whole = hashlib.sha256(repr((self.caption, self.source.stamp())).encode())
        for entry in self.entries:
            whole.update(repr((entry.name, entry.stamp)).encode())
        return whole.hexdigest()[:12]

    def read(self, number: int) -> tuple[bytes | None, bytes | None]:
        """The image's file and its captions, one a line.

        Raises:
            Unusable: it cannot be read.
            InputError: the source as a whole cannot.
        """
        try:
            record = self.source.read(self.entries[number].place)
        except OSError as error:
            raise self._unreadable(error) from error
        if record.fault is not None:
            raise Unusable(_reason(record.fault))
        return record.image, _captions(record) if self.caption is None else self.caption.encode()

    def captions(self) -> list[str]:
        """All captions of images that can be read, each once."""
        found: dict[str, None] = {}
        for number in range(len(self)):
            try:
                found |= dict.fromkeys(decode_captions(self.read(number)[1], None))
            except Unusable:  # noqa: PERF203  (it is counted when it is trained on)
                continue
        return list(found)

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{str(self.path)!r} cannot be read: {error.strerror or error}")


class PictureDataset(Dataset[Sample]):
    """Samples of a source by position.

    With an order, an image that cannot be used is replaced by another, which depends on the position alone; without
    one, images come as they are listed and those that cannot be used are left out.

    Args:
        pictures: the source.
        order: of one shard, the source; None reads them in turn.
        decode: from bytes to pixels.
        seed: crops, flips and the choice among captions depend on it and the position alone.
    """

    def __init__(self, pictures: Pictures, order: SampleOrder | None, decode: Decoder, seed: int = 0) -> None:
        self.pictures = pictures
        self.order = order
        self.decode = decode
        self.seed = seed

    def __len__(self) -> int:
        if self.order is not None:
            raise TypeError("an endless order has no length")
        return len(self.pictures)

    def __getitem__(self, position: int) -> Sample:
        skips: list[Skip] = []
        for attempt in range(_ATTEMPTS if self.order is not None else 1):
            number = self._find(position, attempt)
            try:
                sample = self._load(number, position)
            except Unusable as fault:
                skips.append(Skip(str(self.pictures.path), self.pictures.entries[number].name, fault.reason))
            else:
                sample.skips = tuple(skips)
                return sample
        return Sample(None, "", "", position, skips=tuple(skips))

    def captions(self) -> list[str]:
        """Every caption that a sample may have."""
        return self.pictures.captions()

    def _find(self, position: int, attempt: int) -> int:
        if self.order is None:
            return position
        return (self.order.replacement(position, attempt) if attempt else self.order.at(position))[1]

    def _load(self, number: int, position: int) -> Sample:
        image, captions = self.pictures.read(number)
        picture, caption, _ = self.decode((image, captions, None, None), partial(self._random, position))
        return Sample(picture, caption, self.pictures.key(number), position)

    def _random(self, position: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, position, stream, 2])


def _captions(record: Record) -> bytes | None:
    """A sidecar's bytes, or a table's captions as one would have them."""
    if not isinstance(record.captions, Sequence) or isinstance(record.captions, bytes):
        return record.captions
    return b"\n".join(
        b" ".join((text if isinstance(text, bytes) else text.encode("utf-8", "replace")).split())
        for text in record.captions
    )


def _reason(fault: str) -> Reason:
    """A fault of reading as a reason to skip; a file that is too large or packed in another way is no image here."""
    return Reason(fault) if fault in {reason.value for reason in Reason} else Reason.UNDECODABLE
