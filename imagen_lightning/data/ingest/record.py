"""Records of a source, and what every source can do: list them cheaply, and read one by its place."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from imagen_lightning.data.skips import Reason
from imagen_lightning.data.walk import OTHER_IMAGES

READ_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}).union(
    {".bmp", ".dib", ".gif", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff"}
)
IMAGE_SUFFIXES = READ_SUFFIXES | {f".{suffix}" for suffix in OTHER_IMAGES}
MAX_IMAGE_BYTES = 2**28  # of a file, before it is read
MAX_CAPTION_BYTES = 2**20
TOO_MANY_BYTES = "file over the size limit"


class Fault(Exception):
    """A record cannot be used, for `reason`."""

    def __init__(self, reason: Reason | str) -> None:
        self.reason = reason.value if isinstance(reason, Reason) else reason
        super().__init__(self.reason)


class Entry(NamedTuple):
    """A record as a listing has it.

    Attributes:
        place: what `Source.read` takes; it can be pickled.
        name: of the image in the source; it decides on which side of the split it falls.
        group: the value of the field that is to decide instead, None where the record has none.
        stamp: what else tells the record from another, such as the file's size.
    """

    place: Any
    name: str
    group: str | None = None
    stamp: str = ""


@dataclass
class Record:
    """One captioned image of a source.

    Attributes:
        name: of the image in the source.
        key: its name among what was left out; with the row's number where it comes from a table.
        image: its file's bytes.
        captions: a sidecar's bytes with one caption a line, or a table's captions.
        metadata: the table's other columns.
        fault: why it could not be read.
    """

    name: str
    key: str
    image: bytes | None = None
    captions: bytes | list[str | bytes] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


class Source(ABC):
    """Captioned images in an order that stays; it can be pickled, and opens its files when they are asked for."""

    @abstractmethod
    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        """Lists the records without decoding an image.

        Args:
            group_by: the field whose value becomes `Entry.group`.

        Raises:
            InputError: damaged, no such field, or addresses in place of images.
        """

    def unread(self) -> dict[str, int]:
        """Return how many files of the source are no images and no part of one, by kind; known once it is listed."""
        return {}

    @abstractmethod
    def read(self, place: Any) -> Record:
        """Reads one record; quickest in the order of the listing.

        Raises:
            InputError: the source is damaged.
            OSError: it cannot be read, and not for this record alone.
        """

    def stamp(self) -> str:
        """What tells the source as a whole from another, beside its entries."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Closes what it has open; it opens again when read."""


class Several(Source):
    """Sources one after another.

    Args:
        parts: the sources.
        others: number of files beside them that are not read, by kind.
    """

    def __init__(self, parts: list[Source], others: Mapping[str, int] = {}) -> None:
        self.parts = parts
        self.others = dict(others)
        self._open = 0

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        for number, part in enumerate(self.parts):
            for entry in part.entries(group_by):
                yield entry._replace(place=(number, entry.place))
            part.close()

    def read(self, place: tuple[int, Any]) -> Record:
        number, inner = place
        if number != self._open:
            self.parts[self._open].close()
            self._open = number
        return self.parts[number].read(inner)

    def unread(self) -> dict[str, int]:
        return dict(sum((Counter(part.unread()) for part in self.parts), Counter(self.others)))

    def stamp(self) -> str:
        return "\n".join(part.stamp() for part in self.parts)

    def close(self) -> None:
        self.parts[self._open].close()


def group_text(value: Any) -> str | None:
    """A field's value as text, None where it is missing; 5 of a JSON file and "5" of a CSV are the same."""
    if value is None or value == "":
        return None
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, sort_keys=True, default=str)
