"""Samples that cannot be used: their reasons, counted, listed, and a stop where there are too many."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from imagen_lightning.errors import InputError, counted
from imagen_lightning.io.lines import lines

log = logging.getLogger(__name__)

_MOST_KINDS = 20


class Reason(str, Enum):
    """Why a sample cannot be used."""

    NO_IMAGE = "image missing"
    NO_CAPTION = "caption missing or empty"
    CAPTION_NOT_UTF8 = "caption not UTF-8"
    BAD_JSON = "bad JSON"
    BAD_ROW = "more cells than columns"
    TRUNCATED_IMAGE = "truncated image"
    UNDECODABLE = "undecodable image"
    TOO_MANY_PIXELS = "image over the pixel limit"
    OTHER_FORMAT = "image format not read"
    TOO_SMALL = "image too small"
    DUPLICATE_KEY = "duplicate key"
    UNSAFE_MEMBER = "unsafe member name or type"
    TRUNCATED_SHARD = "truncated shard"
    UNREADABLE_SHARD = "unreadable shard"
    BAD_HEADER = "bad tar header"
    HASH_MISMATCH = "hash mismatch"
    NO_TEXT_STATES = "text states missing"
    BAD_TEXT_STATES = "undecodable text states"
    NAN_TEXT_STATES = "text states not finite"
    OTHER_ENCODER = "text states of another encoder"


def counted_by_kind(counts: Mapping[str, int]) -> str:
    """Return "3 xyz, 1 cls", the most frequent first; the rarest of many kinds together."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count} {kind}" for kind, count in ordered[:_MOST_KINDS]]
    rest = [count for _, count in ordered[_MOST_KINDS:]]
    return ", ".join(texts + ([f"{sum(rest)} of {len(rest)} other kinds"] if rest else []))


class Unusable(Exception):
    """A sample cannot be used, for `reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Skip(NamedTuple):
    """One sample that was left out."""

    shard: str
    key: str  # "" where the shard's damage hides it
    reason: Reason

    def __str__(self) -> str:
        """ "'000012' in train-000.tar", or the shard alone."""
        return f"{self.key!r} in {self.shard}" if self.key else self.shard


class SkipLog:
    """Counts what was left out, and stops the run where it is too much.

    Each sample is counted, logged and listed once, however often it is met; the share counts each meeting. The log
    speaks at the 1st, 10th, 100th, … sample of a reason.

    Args:
        max_share: the largest share of skipped samples, in [0, 1].
        recent: number of last samples over which the share is taken.
        at_least: number of samples before the share is judged.
    """

    def __init__(self, max_share: float = 0.05, recent: int = 10_000, at_least: int = 200) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_skip_share {max_share} is not a share; give a number from 0 to 1")
        self.max_share = max_share
        self.at_least = at_least
        self.counts: Counter[str] = Counter()
        self.listing: Path | None = None
        self._seen: dict[Skip, None] = {}  # in the order they were met
        self._listed: set[str] = set()  # lines that the file held when it was opened
        self._recent: deque[Skip | None] = deque(maxlen=recent)
        self._recent_skips = 0

    def list_in(self, path: Path, past: bool = True) -> None:
        """Lists skips in a file of one JSON object a line (shard, key, reason), after what it holds already.

        Args:
            path: the file; made when there is something to list.
            past: whether to list those noted so far; of several processes that walk the same shards, one should.
        """
        self.listing = path
        before = path.read_bytes() if path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        if past and len(whole) < len(before):  # a kill tore the last line
            os.truncate(path, len(whole))
        self._listed = set(lines(whole.decode(errors="replace")))
        if past:
            self._write(self._seen)

    def note(self, skips: Iterable[Skip]) -> None:
        """Counts, logs and lists samples that are new, without judging their share."""
        new = [skip for skip in dict.fromkeys(skips) if skip not in self._seen]
        for skip in new:
            self._seen[skip] = None
            self.counts[skip.reason.value] += 1
            count = self.counts[skip.reason.value]
            if str(count).strip("0") == "1":
                log.warning("skipped %s: %s (%d so far)", skip, skip.reason.value, count)
        self._write(new)

    def record(self, num_used: int, skips: Sequence[Skip]) -> None:
        """Notes samples as they are met.

        Raises:
            InputError: the share of skips among the last samples is above the limit.
        """
        self.note(skips)
        for item in (*skips, *[None] * num_used):
            if len(self._recent) == self._recent.maxlen:
                self._recent_skips -= self._recent[0] is not None
            self._recent.append(item)
            self._recent_skips += item is not None
        if skips and len(self._recent) >= self.at_least:
            self._judge(self._recent_skips, len(self._recent), (item for item in self._recent if item is not None))

    def record_index(self, num_used: int, skips: Sequence[Skip], unread: Mapping[str, int] = {}) -> None:
        """Note what the walk through the shards found, judged over all of it.

        Args:
            num_used: samples that may be used.
            skips: samples that cannot.
            unread: number of members that belong to no sample, by suffix.

        Raises:
            InputError: nothing is usable, or the fraction of skips is above the limit.
        """
        self.note(skips)
        if not num_used and not skips and unread:
            raise InputError(
                f"no samples: the shards hold {counted_by_kind(unread)} and no image KEY.jpg, KEY.png or KEY.webp; "
                "name the members so"
            )
        if num_used == 0 or num_used + len(skips) >= self.at_least:
            self._judge(len(skips), num_used + len(skips), skips)

    def summary(self) -> str:
        """ "12 samples skipped: 10 undecodable image, 2 bad JSON"."""
        parts = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{counted(self.counts.total(), 'sample')} skipped" + (f": {parts}" if parts else "")

    def _judge(self, num_skips: int, num_samples: int, skips: Iterable[Skip]) -> None:
        if num_skips <= self.max_share * num_samples and num_skips < num_samples:
            return
        raise InputError(self.complaint(num_skips, num_samples, list(skips)))

    def complaint(self, num_skips: int, num_samples: int, skips: Sequence[Skip]) -> str:
        """The line that stops a run, with the leading reason."""
        if not skips:
            return "no samples: the shards hold none"
        reason, count = Counter(skip.reason for skip in skips).most_common(1)[0]
        first = next(skip for skip in skips if skip.reason == reason)
        return (
            f"{num_skips} of {counted(num_samples, 'sample')} cannot be used, more than max_skip_share "
            f"{self.max_share:g} allows; {count} for {reason.value!r}, such as {first}; mend the shards or "
            "raise the share"
        )

    def _write(self, skips: Iterable[Skip]) -> None:
        if self.listing is None:
            return
        texts = [json.dumps({"shard": s.shard, "key": s.key, "reason": s.reason.value}) for s in skips]
        texts = [text for text in texts if text not in self._listed]
        if texts:
            self.listing.parent.mkdir(parents=True, exist_ok=True)
            with self.listing.open("a", encoding="utf-8") as file:
                file.write("".join(f"{text}\n" for text in texts))
