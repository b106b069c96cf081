"""Tars that can only be read forward: opened, walked, and grouped to samples.

A sample is a run of neighbouring members `KEY.suffix`. As in indexed shards, only known suffixes are read, unsafe names
are refused, and nothing is extracted, executed or unpickled.
"""

from __future__ import annotations

import lzma
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired
from typing import IO, NamedTuple

from imagen_lightning.data import tar
from imagen_lightning.data.remote import _network_errors as network_errors
from imagen_lightning.data.remote import filesystem
from imagen_lightning.data.skips import Reason, Skip
from imagen_lightning.data.walk import IMAGE, NUM_KINDS, OTHER_IMAGES, SUFFIXES, is_whole, split_name, split_suffix

MAX_MEMBER_BYTES = 2**28

_BLOCK = 512
_PIECE = 2**20  # bytes read at once
_MAX_LONG_HEADER = 2**20
_PATIENCE = 10  # seconds in which a command whose output is over, or that is told to, should end
_KNOWN_KEYS = 100_000  # keys of a shard that are remembered to tell those that come again


class RawSample(NamedTuple):
    """A whole sample of a stream, not yet decoded.

    Attributes:
        shard: the address it came from.
        key: its name there.
        members: bytes by kind (IMAGE, CAPTION, METADATA, TEXT_STATES), None where it has none.
    """

    shard: str
    key: str
    members: list[bytes | None]


@contextmanager
def open_stream(address: str) -> Iterator[IO[bytes]]:
    """Opens a path, an address or the output of a command to be read forward; files are decompressed by their suffix.

    A command is ended where it is not read to its end; whether it failed counts where its output ends early (an
    EOFError within the context).

    Raises:
        OSError: it cannot be opened or read, or the command failed; other backends raise their own (`_read_errors`).
    """
    if address.startswith("pipe:"):
        from webdataset.gopen import gopen

        pipe = gopen(address)
        try:
            yield pipe.stream
        except EOFError:
            if _exit_status(pipe.proc):
                raise OSError(f"{address!r} ended with exit status {pipe.proc.returncode}") from None
            raise
        finally:
            pipe.proc.terminate()
            pipe.stream.close()
            if _exit_status(pipe.proc) is None:
                pipe.proc.kill()
                pipe.proc.wait()
    else:
        from fsspec.core import OpenFile, get_compression

        system, path = filesystem(address)
        with OpenFile(system, path, "rb", get_compression(path, "infer")) as file:
            yield file


def _exit_status(process: Popen[bytes]) -> int | None:
    """The exit status of a process that should end; None where it does not."""
    try:
        return process.wait(timeout=_PATIENCE)
    except TimeoutExpired:
        return None


def _read_errors() -> tuple[type[Exception], ...]:
    """What a reader raises where the network, the disk or a compressed file fails."""
    return (*network_errors(), zlib.error, lzma.LZMAError)


class BadHeader(Exception):
    """A tar's header is damaged."""


class Tape:
    """A stream read forward, which knows how far it is.

    Attributes:
        position: bytes read or passed over.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.position = 0

    def read(self, size: int) -> bytes:
        """Exactly so many bytes; a pipe may give them in parts.

        Raises:
            EOFError: there are fewer.
        """
        parts = []
        while size > 0:
            part = self._stream.read(min(size, _PIECE))
            if not part:
                raise EOFError("the tar is cut")
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def pass_to(self, position: int) -> None:
        while self.position < position:
            self.read(min(position - self.position, _PIECE))


def tape_members(tape: Tape) -> Iterator[tuple[str, int, Reason | None]]:
    """Name, size and fault of each regular file and each unsafe member of a tar, by `tar`'s rules.

    While it waits, the tape is where the member's data begins; as much of it may be read as wanted.

    Raises:
        EOFError: the tar ends without the mark of its end.
        BadHeader: a header is damaged.
    """
    long_name: str | None = None
    long_size: int | None = None
    while (header := tape.read(_BLOCK)).strip(b"\0"):
        kind, size = header[156:157], _size(header)
        if kind in b"LKxg":  # GNU long name, GNU long link, pax header of the next member, pax header of all
            if size > _MAX_LONG_HEADER:
                raise BadHeader
            text = tape.read(size)
            if kind == b"L":
                long_name = tar._text(text)
            elif kind == b"x":
                path, long_size = _path_and_size(text)
                long_name = path or long_name
            tape.pass_to(tape.position + -size % _BLOCK)
            continue
        name = tar._text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{tar._text(header[345:500])}/{name}"
        name, size = long_name or name, size if long_size is None else long_size
        long_name = long_size = None
        regular = kind in (b"0", b"\0", b"7")
        if kind == b"5" or (regular and name.endswith("/")):
            continue
        after = tape.position + size + -size % _BLOCK
        if not regular or name.startswith("/") or ".." in name.split("/"):
            if kind not in b"12346":  # links and devices have no data
                tape.pass_to(after)
            yield name, 0, Reason.UNSAFE_MEMBER
            continue
        yield name, size, None
        tape.pass_to(after)


def _size(header: bytes) -> int:
    """The size in a header, whose checksum must be right."""
    try:
        checksum, size = tar._number(header[148:156]), tar._number(header[124:136])
    except ValueError:
        raise BadHeader from None
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        raise BadHeader
    return size


def _path_and_size(text: bytes) -> tuple[str | None, int | None]:
    """What a pax header says of the next member."""
    try:
        records = tar._pax(text)
        return records.get("path"), int(records["size"]) if "size" in records else None
    except ValueError:
        raise BadHeader from None


class _Open:
    """A sample whose members are being read."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[bytes | None] = [None] * NUM_KINDS
        self.fault: Reason | None = None
        self.other_image = False

    @property
    def kinds(self) -> list[int]:
        return [kind for kind, data in enumerate(self.members) if data is not None]


class SampleReader:
    """Groups the members of one shard to samples, read forward.

    A fault leaves out the sample whole: one that the shard's end cuts off (where the mark of its end is missing, the
    last one may lack members), an unsafe member, two of one kind, or a key that came before. Keys with dots are as in
    `walk`, among members that are neighbours.

    Args:
        shard: its address.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self._plain = _Open("")  # the sample of the key that ends at the first dot
        self._last = self._plain  # the sample of the last member
        self._dotted: _Open | None = None  # one of a longer key
        self._parts: list[_Open] = []  # further ones that lack an image or a caption; their bytes are gone
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __iter__(self) -> Iterator[RawSample | Skip]:
        try:
            with open_stream(self.shard) as stream:
                yield from self._samples(Tape(stream))
        except EOFError:
            yield from self._cut(Reason.TRUNCATED_SHARD)
        except BadHeader:
            yield from self._cut(Reason.BAD_HEADER)
        except _read_errors():
            yield from self._cut(Reason.UNREADABLE_SHARD)

    def _samples(self, tape: Tape) -> Iterator[RawSample | Skip]:
        for name, size, reason in tape_members(tape):
            key, suffix = split_name(name)
            more, tail = split_suffix(suffix)
            kind = SUFFIXES.get(tail)
            other_image = tail in OTHER_IMAGES
            if not key or ".." in name.split("/") or (kind is None and not other_image and reason is None):
                if reason is not None:
                    yield Skip(self.shard, key or name, reason)
                continue
            if key != self._plain.key:
                yield from self._finish()
                self._plain = _Open(key)
            sample = self._plain
            if more and (kind is not None or other_image):
                if self._dotted is None or self._dotted.key != f"{key}.{more}":
                    yield from self._finish_dotted()
                    self._dotted = _Open(f"{key}.{more}")
                sample = self._dotted
            self._last = sample
            if kind is None:
                sample.other_image = sample.other_image or other_image
                sample.fault = sample.fault or reason
                continue
            if size > MAX_MEMBER_BYTES:
                reason = Reason.UNDECODABLE
            elif sample.members[kind] is not None:
                reason = Reason.DUPLICATE_KEY
            sample.fault = sample.fault or reason
            if reason is None:
                sample.members[kind] = tape.read(size)
        yield from self._finish()

    def _cut(self, reason: Reason) -> Iterator[RawSample | Skip]:
        """Leave out the sample that may lack members because the shard ends here."""
        if self._last.key:
            self._last.fault = reason
            yield from self._finish()
        else:
            yield Skip(self.shard, "", reason)

    def _finish(self) -> Iterator[RawSample | Skip]:
        """Give the samples whose members have all been read."""
        yield from self._finish_dotted()
        plain, parts = self._plain, self._parts
        self._plain, self._parts = _Open(""), []
        if plain.kinds:  # the parts are further members of this sample
            plain.fault = next((part.fault for part in [plain, *parts] if part.fault is not None), None)
        else:
            for part in parts:
                lacks = Reason.NO_IMAGE if part.members[IMAGE] is None else Reason.NO_CAPTION
                yield self._given(part, lacks)
        if plain.kinds or plain.other_image or plain.fault is not None:
            yield self._given(plain)

    def _finish_dotted(self) -> Iterator[RawSample | Skip]:
        sample, self._dotted = self._dotted, None
        if sample is not None and is_whole(sample.kinds):
            yield self._given(sample)
        elif sample is not None:
            sample.members = [None if data is None else b"" for data in sample.members]
            self._parts.append(sample)

    def _given(self, sample: _Open, lacks: Reason | None = None) -> RawSample | Skip:
        """A sample, or why it cannot be used."""
        fault = sample.fault
        if sample.other_image and sample.members[IMAGE] is None:
            fault = fault or Reason.OTHER_FORMAT
        fault = fault or lacks
        known = hash(sample.key)
        if known in self._seen:
            fault = fault or Reason.DUPLICATE_KEY
        self._seen[known] = None
        if len(self._seen) > _KNOWN_KEYS:
            self._seen.popitem(last=False)
        return (
            RawSample(self.shard, sample.key, sample.members) if fault is None else Skip(self.shard, sample.key, fault)
        )
