"""Stored text states beside shards: one file a shard, found by the shard's name, looked up by the caption."""

from __future__ import annotations

import glob
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_lightning.data.decode import decode_captions
from imagen_lightning.data.shards import CAPTION, METADATA, Shards, match_files
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.text.cached import SUFFIX, StatesFile
from imagen_lightning.text.identity import difference
from imagen_lightning.types import InputError, Text, TextEncoder

log = logging.getLogger(__name__)

_MAX_OPEN_FILES = 64
_PROBED = 16  # captions looked up before a run begins
_CAPTION_FIELD = "caption_field"
_NOT_OF_THE_ENCODER = ("format", "version", "dtype", "mask", "source", "source_bytes", _CAPTION_FIELD)


class TextStates:
    """The text states that `imagen-lightning shards embed` stored for some shards; loader processes may share it.

    Args:
        files: a folder of `SHARD.safetensors`, or a glob of such files.
        stems: the shards' names without their suffix; each must have its file.

    Attributes:
        identity: of the encoder that made them (`TextEncoder.identity`).
        caption_field: the json field whose captions were stored; "" is the txt, or json's "caption".
        empty: the empty caption's states, a batch of one.

    Raises:
        InputError: no file for a shard, one that is damaged, or files of different encoders.
    """

    def __init__(self, files: str | Path, stems: Sequence[str]) -> None:
        self.files = str(files)
        there = _find(self.files)
        missing = [stem for stem in stems if stem not in there]
        if missing:
            some = f"{len(missing)} of {len(stems)} shards, such as " if len(missing) > 1 else "shard "
            raise InputError(
                f"text states {self.files!r} lack {some}{missing[0]!r}: run `imagen-lightning shards embed` for them"
            )
        self._states = {stem: StatesFile(there[stem]) for stem in stems}
        self._open: OrderedDict[str, None] = OrderedDict()
        first = next(iter(self._states.values()))
        for other in self._states.values():
            apart = difference(other.metadata, _of_encoder(first), ignore=("precision",))
            if apart is not None or other.dim != first.dim:
                name, found, wanted = apart or ("number of features", str(other.dim), str(first.dim))
                raise InputError(
                    f"text states of two encoders: {name} is {found!r} in {str(other.path)!r} and {wanted!r} in "
                    f"{str(first.path)!r}; store one of them anew"
                )
        self.identity = _of_encoder(first)
        self.caption_field = first.metadata.get(_CAPTION_FIELD, "")
        try:
            empty = first.read("")
        except OSError as error:
            raise InputError(f"text states {str(first.path)!r} cannot be read: {error}") from None
        if empty is None:
            raise InputError(f"text states {str(first.path)!r} lack the empty caption's; store them anew")
        self.empty = empty

    def read(self, stem: str, caption: str) -> Text:
        """A caption's states as a batch of one, float32, looked up in its shard's file.

        Raises:
            Unusable: there are none, the file is damaged, or they are not finite.
        """
        states = self._states[stem]
        try:
            text = states.read(caption)
        except OSError:
            raise Unusable(Reason.BAD_TEXT_STATES) from None
        self._open[stem] = None
        self._open.move_to_end(stem)
        if len(self._open) > _MAX_OPEN_FILES:
            self._states[self._open.popitem(last=False)[0]].close()
        if text is None:
            raise Unusable(Reason.NO_TEXT_STATES)
        if not text.states.isfinite().all():
            raise Unusable(Reason.NAN_TEXT_STATES)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_text_states(
    files: str | Path, shards: Shards, rows: Sequence[np.ndarray], caption_field: str | None
) -> TextStates:
    """The stored text states of some shards' usable rows.

    Raises:
        InputError: as `TextStates`; or none of the first captions is stored, since others were, or the shard has
            changed.
    """
    stems = [index.stem for index in shards.indexes]
    states = TextStates(files, stems)
    seen: list[str] = []
    for shard, numbers in enumerate(rows):
        for row in numbers[: _PROBED - len(seen)].tolist():
            try:
                caption = read_captions(shards, shard, row, caption_field)[0]
                states.read(stems[shard], caption)
            except Unusable as fault:  # noqa: PERF203
                if fault.reason == Reason.NO_TEXT_STATES:
                    seen.append(caption)
            else:
                return states
        if len(seen) >= _PROBED:
            break
    if seen:
        raise InputError(
            f"text states {str(files)!r} hold none of the first {len(seen)} captions, such as {seen[0][:60]!r}: they "
            f"are of caption_field {states.caption_field or 'null'}, the data's is {caption_field or 'null'}; let the "
            "two agree, or store the shards' captions anew"
        )
    return states


def read_captions(shards: Shards, shard: int, row: int, caption_field: str | None) -> list[str]:
    """A sample's captions; see `decode_captions`."""
    text, metadata = (shards.read(shard, row, kind) for kind in (CAPTION, METADATA))
    return decode_captions(text, metadata, caption_field)


def check_stage(module: object, stored: Iterable[tuple[TextStates | None, tuple[str, int] | None]]) -> None:
    """Compares a stage's text encoder, without loading its weights, with those that made stored states.

    A module that has no `text.encoder` is no stage of this package and is not asked.

    Args:
        module: the stage.
        stored: of each data set its states in files, and the (encoder's name, features) of those in its shards.

    Raises:
        InputError: the encoders differ, or the stage has none; with both values.
    """
    text = getattr(module, "text", None)
    if text is None or not hasattr(text, "encoder"):
        return
    encoder: TextEncoder | None = text.encoder
    wanted: dict[str, str] = {}
    for states, in_shards in stored:
        if states is not None:
            if encoder is None:
                raise InputError(f"the stage takes no text: drop text_states {states.files!r}, or set its text.encoder")
            wanted = wanted or encoder.identity()
            _check(states, wanted, encoder)
        elif in_shards is not None and encoder is not None and in_shards[0] != encoder.name:
            raise InputError(
                f"the shards' text states are those of encoder {in_shards[0]!r} and the stage's encoder is "
                f"{encoder.name!r}; set the stage's text.encoder to that, or leave the states out of the shards"
            )


def _check(states: TextStates, wanted: Mapping[str, str], encoder: TextEncoder) -> None:
    features = states.empty.states.shape[2]
    apart = difference(states.identity, wanted, ignore=("precision",))
    if apart is None and features != encoder.dim:
        apart = "features", str(features), str(encoder.dim)
    if apart is not None:
        name, there, here = apart
        encoders = f" (encoders {states.identity.get('encoder')!r} and {encoder.name!r})" if name != "encoder" else ""
        raise InputError(
            f"text states {states.files!r} are not those of the stage's encoder: {name} is {there or 'unknown'!r} "
            f"there and {here!r} in the stage{encoders}; set the stage's text.encoder to that, or store them anew"
        )
    if "precision" in wanted and wanted["precision"] != states.identity.get("precision"):
        log.warning(
            "text states %s were made in %s and the stage's encoder works in %s: they agree to rounding",
            *(states.files, states.identity.get("precision"), wanted["precision"]),
        )


def _of_encoder(states: StatesFile) -> dict[str, str]:
    return {name: value for name, value in states.metadata.items() if name not in _NOT_OF_THE_ENCODER}


def _find(files: str) -> dict[str, Path]:
    """Paths of text states by their shard's name."""
    pattern = os.path.expanduser(files)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), f"*{SUFFIX}")
    found: dict[str, Path] = {}
    for name in match_files(pattern):
        path = Path(name)
        if path.suffix == SUFFIX and found.setdefault(path.stem, path) != path:
            raise InputError(f"two files of text states for shard {path.stem!r}: {found[path.stem]} and {path}")
    if not found:
        raise InputError(
            f"text states {files!r} match no file (from {os.getcwd()}); `imagen-lightning shards embed` writes them"
        )
    return found
