"""What a set of shards holds, as numbers: sizes, captions, metadata, damage, duplicates and leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from imagen_lightning.data.decode import decode_captions, decode_image, size_from_header
from imagen_lightning.data.index import cache_folder, map_shards
from imagen_lightning.data.metadata import read_columns
from imagen_lightning.data.shards import CAPTION, IMAGE, METADATA, Shards, list_shards, open_shards
from imagen_lightning.data.skips import Reason, Skip, Unusable, counted_by_kind
from imagen_lightning.errors import InputError, counted

NEAR = 4  # bits of 64 by which perceptual hashes of near duplicates differ at most
NEAR_COLOUR = 6.0  # of 255, by which the colours of near duplicates at 4x4 px differ at most, in the mean
_BANDS = NEAR + 1  # one of them is equal in any two hashes that differ by NEAR bits
_MAX_GROUP = 400  # hashes of one band's value that are compared with each other: flat images share many bits


@dataclass(frozen=True)
class Stage:
    """A stage that is to be trained on the shards.

    Attributes:
        name: for people.
        image_size: side in pixels.
        num_tokens: captions to their numbers of tokens without a limit; None where captions are not read.
        max_tokens: what the stage's encoder reads of each.
    """

    name: str
    image_size: int
    num_tokens: Callable[[Sequence[str]], list[int]] | None = None
    max_tokens: int | None = None


@dataclass
class Contents:
    """What some shards hold; the arrays have a row a usable sample.

    Attributes:
        shards: their names.
        shard: (n,) number of each sample's shard.
        rows: (n,) its row in the shard's index.
        keys: n names.
        sizes: (n, 2) width and height in pixels.
        image_digests: (n,) 8 bytes of the SHA-256 of the image file.
        hashes: (n,) uint64 perceptual hashes (64-bit DCT hash of the picture in grey).
        thumbs: (n, 48) uint8, the picture at 4x4 px in colour.
        captions: each sample's captions.
        columns: metadata by field, see `read_columns`; blank where a sample lacks it.
        fields: names of all fields of the json members seen.
        skips: samples that cannot be used.
        unread: number of members that belong to no sample, or are not read of one, by suffix.
    """

    shards: list[str]
    shard: np.ndarray
    rows: np.ndarray
    keys: list[str]
    sizes: np.ndarray
    image_digests: np.ndarray
    hashes: np.ndarray
    thumbs: np.ndarray
    captions: list[list[str]]
    columns: dict[str, np.ndarray]
    fields: list[str]
    skips: list[Skip]
    unread: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        """ "000012 in train-000.tar"."""
        return f"{self.keys[row]} in {Path(self.shards[self.shard[row]]).name}"

    @property
    def short_sides(self) -> np.ndarray:
        return self.sizes.min(1) if len(self) else np.zeros(0, dtype=np.int64)

    @property
    def aspects(self) -> np.ndarray:
        """Width over height."""
        return self.sizes[:, 0] / self.sizes[:, 1] if len(self) else np.zeros(0)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(skip.reason.value for skip in self.skips)


@dataclass(frozen=True)
class Usable:
    """What a stage can use.

    Attributes:
        stage: which.
        share: of the usable samples whose shorter side is at least the stage's.
        tokens: (number of captions,) tokens of each, or None.
        cut: share of the captions that are longer than the stage reads, or None.
    """

    stage: Stage
    share: float
    tokens: np.ndarray | None
    cut: float | None


@dataclass(frozen=True)
class Examination:
    """The doctor's findings.

    Attributes:
        contents: of the shards.
        usable: by stage.
        exact: groups of rows with the same image file.
        near: pairs of rows that look alike and are not of one exact group.
        leaks: pairs of a row and a row of the held-out shards that are the same or look alike.
        held_out: contents of the held-out shards, or None.
    """

    contents: Contents
    usable: list[Usable]
    exact: list[list[int]]
    near: list[tuple[int, int]]
    leaks: list[tuple[int, int]] = field(default_factory=list)
    held_out: Contents | None = None

    def unchecked(self) -> list[str]:
        """What was not looked at, which may hide faults."""
        lines = []
        if self.held_out is None:
            lines.append("whether held-out images are among these (--held-out)")
        if not self.usable:
            lines.append("whether images are large enough for a cascade's stages (--stage)")
        elif all(item.cut is None for item in self.usable):
            lines.append("whether captions are longer than the stages read (--stage with an encoder)")
        return lines

    def advice(self) -> list[str]:
        """Return what to fix, the most urgent first; empty where all is well."""
        contents, lines = self.contents, []
        total = len(contents) + len(contents.skips)
        if self.leaks:
            lines.append(
                f"{len(self.leaks)} held-out images are in the training shards too, or look alike: take them out of "
                "one, or split by a field that keeps them together (shards write --held-out-by)"
            )
        if contents.skips:
            reason, count = contents.reasons.most_common(1)[0]
            lines.append(
                f"{len(contents.skips)} of {total} samples cannot be used, {count} for {reason!r}: mend them at their "
                "source; training leaves them out and names them"
            )
        if contents.unread:
            lines.append(
                f"{counted(sum(contents.unread.values()), 'member')} of the shards not read, by suffix: "
                f"{counted_by_kind(contents.unread)}; if images or captions are among them, rename them to KEY.jpg, "
                "KEY.txt, …"
            )
        for item in self.usable:
            if item.share < 0.9:
                lines.append(
                    f"{1 - item.share:.0%} of the images are smaller than {item.stage.name} needs "
                    f"({item.stage.image_size} px): they are skipped; filter by min_side={item.stage.image_size}, or "
                    "set allow_upscale"
                )
            if item.cut is not None and item.cut > 0.02:
                lines.append(
                    f"{item.cut:.0%} of the captions are longer than the {item.stage.max_tokens} tokens that "
                    f"{item.stage.name} reads: raise max_tokens, or shorten them"
                )
        copies = sum(len(group) - 1 for group in self.exact)
        if total and copies > 0.01 * total:
            lines.append(f"{copies} samples are exact copies of others: they are learnt by heart first; drop them")
        if total and len(self.near) > 0.02 * total:
            lines.append(f"{len(self.near)} pairs of images look alike: look at them below before training")
        one = sum(len(captions) == 1 for captions in contents.captions)
        texts = Counter(captions[0] for captions in contents.captions)
        if texts and texts.most_common(1)[0][1] > max(0.05 * len(contents), 5) and one == len(contents):
            text, count = texts.most_common(1)[0]
            lines.append(f"{count} samples share the caption {text!r}: a model cannot tell them apart by their text")
        return lines


def examine(
    patterns: str | Path | Sequence[str | Path],
    stages: Sequence[Stage] = (),
    *,
    held_out: str | Path | Sequence[str | Path] | None = None,
    caption_field: str | None = None,
    cache: Path | None = None,
    processes: int = 0,
) -> Examination:
    """Reads every sample of the shards once.

    Args:
        patterns: see `list_shards`.
        stages: to be trained on them.
        held_out: shards kept for evaluation, looked through for the same images.
        caption_field: see `decode_captions`.
        cache: see `open_shards`.
        processes: that share the shards; 0 reads in this one.

    Raises:
        InputError: shards that match nothing or cannot be read, or that hold no sample at all.
    """
    contents = read_contents(patterns, caption_field, cache, processes)
    if not len(contents) and not contents.skips:
        what = f"{counted_by_kind(contents.unread)} and no sample" if contents.unread else "no sample"
        raise InputError(
            f"the {counted(len(contents.shards), 'shard')} given hold {what}; check that they are webdataset's layout"
        )
    other = None if held_out is None else read_contents(held_out, caption_field, cache, processes)
    usable = [_usable(contents, stage) for stage in stages]
    return Examination(contents, usable, same_files(contents), look_alikes(contents), _leaks(contents, other), other)


def read_contents(
    patterns: str | Path | Sequence[str | Path], caption_field: str | None, cache: Path | None, processes: int
) -> Contents:
    """The contents of all shards that match."""
    names = list_shards(patterns)
    job = partial(_read_shard, caption_field=caption_field, cache=cache)
    parts = list(map_shards(job, names, processes if len(names) > 1 else 0))
    fields = sorted({name for part in parts for name in part.columns})
    columns = {}
    for name in fields:
        kind = next(part.columns[name] for part in parts if name in part.columns)
        filler = np.nan if kind.dtype.kind == "f" else ""
        pieces = [part.columns.get(name, np.full(len(part), filler)) for part in parts]
        columns[name] = np.concatenate(
            [piece.astype(np.float64 if kind.dtype.kind == "f" else str) for piece in pieces]
        )
    return Contents(
        names,
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        np.concatenate([part.rows for part in parts]),
        [key for part in parts for key in part.keys],
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.image_digests for part in parts]),
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.thumbs for part in parts]),
        [captions for part in parts for captions in part.captions],
        columns,
        sorted({name for part in parts for name in part.fields}),
        [skip for part in parts for skip in part.skips],
        dict(sum((Counter(part.unread) for part in parts), Counter())),
    )


def _read_shard(name: str, caption_field: str | None, cache: Path | None) -> Contents:
    shards = open_shards(name, cache=cache)
    index = shards.indexes[0]
    rows: list[int] = []
    examined: list[tuple[tuple[int, int], int, int, np.ndarray, list[str]]] = []
    skips = list(index.skips)
    for row in range(index.num_samples):
        try:
            members = shards.sample(0, row)
            found = _examine(members[IMAGE], members[CAPTION], members[METADATA], caption_field)
        except Unusable as fault:  # noqa: PERF203
            skips.append(Skip(index.shard, shards.key(0, row), fault.reason))
        else:
            rows.append(row)
            examined.append(found)
    if index.hashed:
        skips += shards.damage(0)
    return Contents(
        [name],
        np.zeros(len(rows), dtype=np.int64),
        np.array(rows, dtype=np.int64),
        [shards.key(0, row) for row in rows],
        np.array([size for size, *_ in examined], dtype=np.int64).reshape(-1, 2),
        np.array([digest for _, digest, *_ in examined], dtype=np.uint64),
        np.array([bits for _, _, bits, *_ in examined], dtype=np.uint64),
        np.array([thumb for *_, thumb, _ in examined], dtype=np.uint8).reshape(-1, 48),
        [captions for *_, captions in examined],
        _columns(shards, rows),
        list(index.fields),
        list(dict.fromkeys(skips)),
        index.unread,
    )


def _columns(shards: Shards, rows: Sequence[int]) -> dict[str, np.ndarray]:
    index = shards.indexes[0]

    def read_json(row: int) -> bytes | None:
        try:
            return shards.read(0, row, METADATA)
        except Unusable:
            return None

    path = Path(index.shard) if "://" not in index.shard else cache_folder() / Path(index.shard).name
    columns = read_columns(path, list(index.keys), read_json)
    return {name: values[list(rows)] for name, values in columns.items()}


def _examine(
    image: bytes | None, text: bytes | None, metadata: bytes | None, caption_field: str | None
) -> tuple[tuple[int, int], int, int, np.ndarray, list[str]]:
    """Size, digest, perceptual hash, thumbnail and captions."""
    from imagehash import phash

    if image is None:
        raise Unusable(Reason.NO_IMAGE)
    captions = decode_captions(text, metadata, caption_field)
    picture = decode_image(image)
    digest = int.from_bytes(hashlib.sha256(image).digest()[:8], "big")
    bits = phash(picture).hash.flatten()
    thumb = np.asarray(picture.resize((4, 4), Image.Resampling.BOX)).reshape(48)
    return size_from_header(image), digest, int.from_bytes(np.packbits(bits).tobytes(), "big"), thumb, captions


def _usable(contents: Contents, stage: Stage) -> Usable:
    share = float((contents.short_sides >= stage.image_size).mean()) if len(contents) else 0.0
    if stage.num_tokens is None:
        return Usable(stage, share, None, None)
    texts = [caption for captions in contents.captions for caption in captions]
    tokens = np.array(stage.num_tokens(texts), dtype=np.int64)
    cut = float((tokens > stage.max_tokens).mean()) if len(tokens) and stage.max_tokens is not None else None
    return Usable(stage, share, tokens, cut)


# ---- duplicates


def same_files(contents: Contents) -> list[list[int]]:
    """Groups of rows whose image files are the same bytes, the largest first."""
    groups: dict[int, list[int]] = {}
    for row, digest in enumerate(contents.image_digests.tolist()):
        groups.setdefault(digest, []).append(row)
    return sorted((rows for rows in groups.values() if len(rows) > 1), key=len, reverse=True)


def alike(hashes: np.ndarray, others: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) whose perceptual hashes differ by at most NEAR bits: of `hashes`, i < j, or of `hashes` and others.

    Hashes that differ by NEAR bits agree in one of NEAR + 1 bands of bits, so only those that share a band's value are
    compared. Values that more than _MAX_GROUP hashes share, such as those of blank images, are left out.
    """
    every = hashes if others is None else np.concatenate([hashes, others])
    found: set[tuple[int, int]] = set()
    edges = np.linspace(0, 64, _BANDS + 1).astype(int)
    for low, high in pairwise(edges):
        band = (every >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(order)]):
            if 1 < stop - start <= _MAX_GROUP:
                found.update(_close(every, np.sort(order[start:stop])))
    if others is None:
        return sorted(found)
    count = len(hashes)
    return sorted((i, j - count) for i, j in found if i < count <= j)


def _close(hashes: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    differing = np.bitwise_xor.outer(hashes[rows], hashes[rows])
    bits = np.unpackbits(differing[..., None].view(np.uint8), axis=-1).sum(-1)
    first, second = np.nonzero(np.triu(bits <= NEAR, 1))
    return [(int(rows[i]), int(rows[j])) for i, j in zip(first, second)]


def look_alikes(contents: Contents) -> list[tuple[int, int]]:
    """Pairs of rows of like hashes and colours, whose image files differ."""
    digests, thumbs = contents.image_digests, contents.thumbs
    pairs = alike(contents.hashes)
    return [(i, j) for i, j in pairs if digests[i] != digests[j] and _of_one_colour(thumbs[i], thumbs[j])]


def _of_one_colour(first: np.ndarray, second: np.ndarray) -> bool:
    return float(np.abs(first.astype(np.int64) - second.astype(np.int64)).mean()) <= NEAR_COLOUR


def _leaks(contents: Contents, other: Contents | None) -> list[tuple[int, int]]:
    """Each held-out row once, with the training row that it is the same as, or looks like."""
    if other is None:
        return []
    known = {digest: row for row, digest in enumerate(contents.image_digests.tolist())}
    found = {row: known[digest] for row, digest in enumerate(other.image_digests.tolist()) if digest in known}
    for row, held in alike(contents.hashes, other.hashes):
        if _of_one_colour(contents.thumbs[row], other.thumbs[held]):
            found.setdefault(held, row)
    return [(row, held) for held, row in sorted(found.items())]
