"""Whether a position saved in a checkpoint still means the same sample."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

OnChange = Literal["refuse", "warn"]

_WORDS = {
    "seed": "data seed {}",
    "window": "window {}",
    "samples": "{} samples",
    "shards": "shards of the names and sizes with hash {}",
}


def shards_hash(names_and_sizes: Iterable[tuple[str, int]]) -> str:
    """12 hexadecimal digits of shards' names and numbers of samples, in order; where they lie does not count."""
    return hashlib.sha256(json.dumps(list(names_and_sizes)).encode()).hexdigest()[:12]


def check_same_order(saved: Mapping[str, Any], now: Mapping[str, Any], on_change: OnChange) -> None:
    """Compares what decides which sample a position means, as the checkpoint has it and as it is now.

    Args:
        saved: by name; what only one of the two has is not compared.
        now: likewise.
        on_change: "refuse" where the two differ, or "warn".

    Raises:
        InputError: on_change is neither; or they differ and it is "refuse".
    """
    if on_change not in ("refuse", "warn"):
        raise InputError(f"on_change {on_change!r} is unknown; give 'refuse' or 'warn'")
    changed = [name for name in now if name in saved and saved[name] != now[name]]
    if not changed:
        return
    was, is_now = (", ".join(_WORDS.get(n, n + " {}").format(side[n]) for n in changed) for side in (saved, now))
    text = f"the checkpoint's run saw {was}; the data now has {is_now}: the run would repeat samples and miss others"
    if on_change == "refuse":
        raise InputError(f"{text}; restore what was, or accept that with --on_change warn")
    log.warning("%s", text)


def check_same_step(saved: int | None, now: int) -> None:
    """Warns where an optimizer step takes another number of samples: each still comes in its turn."""
    if saved not in (None, now):
        log.warning(
            "an optimizer step took %d samples and takes %d now: not the run that it would have been", saved, now
        )
