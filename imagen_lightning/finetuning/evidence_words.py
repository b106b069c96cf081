"""What the evidence says, in plain sentences; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagen_lightning.catalog import is_percent
from imagen_lightning.errors import counted

NEAR_COPIES = "near copies"
NEAR_BY_DISTANCE = "near by distance"
AUTHENTICITY = "authenticity"
HELD_OUT = "held-out images"
EXPECTED = 0.05  # of near copies where samples lie as held-out images do
RULED_OUT = 0.10  # near copies that must be ruled out to say that there are none
FAR_Z = -3.0  # below, samples surely lie nearer to training images than held-out images do
EVERYWHERE = "pixels and features"


def change_sentence(difference: Mapping[str, Any]) -> str:
    """One metric: "caption accuracy rose from 12% to 78% (by 66 points, 58 to 73)"."""
    metric, value = difference["metric"], float(difference["value"])
    percent = is_percent(metric)
    before, after = (shown(metric, float(difference[side])) for side in ("before", "after"))
    unit = " points" if percent else ""
    if value == 0:
        text = f"{metric} stayed at {after}"
    else:
        text = f"{metric} {'rose' if value > 0 else 'fell'} from {before} to {after}"
    if difference["low"] is None:
        return f"{text} (no interval known)"
    scale = 100 if percent else 1
    change, low, high = (f"{scale * float(difference[key]):+.3g}" for key in ("value", "low", "high"))
    if value == 0:
        return f"{text} (a difference within {low} to {high}{unit})"
    return f"{text} (by {change}{unit}, {low} to {high})"


def shown(metric: str, value: float) -> str:
    return f"{100 * value:.3g}%" if is_percent(metric) else f"{value:.3g}"


def part_sentence(differences: Sequence[Mapping[str, Any]], judge: str | None) -> str:
    """On one set of captions, by the metric that judges."""
    found = next((item for item in differences if item["metric"] == judge), None)
    if found is None:
        return "Nothing could be measured here: give --clip, or data with images."
    words = {
        "better": "better",
        "worse": "worse",
        "alike": "no difference that matters",
        "unclear": "whether it changed cannot be told from these",
    }
    text = f"{change_sentence(found)}: {words[found['verdict']]}."
    return text[0].upper() + text[1:]


def copying_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return "copies", "none", or "unclear" where the measures cannot tell, or contradict each other.

    "copies": more samples than held-out images are surely near copies in pixels and in features; or more are so, though
    not surely, and in every space samples lie surely nearer and are surely less authentic than held-out images.
    "none": no measure hints at copies, and more than 10% of near copies are ruled out.

    Args:
        rows: all of `find_copies`, those of held-out images too.
    """
    everywhere = [value for row in rows if row["space"] == EVERYWHERE for value in row["values"]]
    if any(float(value["low"]) > EXPECTED for value in everywhere):
        return "copies"
    spaces = {row["space"] for row in rows} - {EVERYWHERE}
    more = any(float(value["value"]) > EXPECTED for value in everywhere)
    if more and spaces and all(_is_nearer(rows, space) and _is_less_authentic(rows, space) for space in spaces):
        return "copies"
    if copying_hints(rows) or not everywhere:
        return "unclear"
    return "none" if all(float(value["high"]) <= RULED_OUT for value in everywhere) else "unclear"


def copying_hints(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what hints at copies, a few words for each measure and space."""
    hints = []
    for row in rows:
        found = {value["metric"]: value for value in row["values"]}
        place = f"of {row['what']} in {row['space']}"
        bound = "value" if row["space"] == EVERYWHERE else "low"
        hints += [
            f"{_percent(found[metric])} {place} are {metric}"
            for metric in (NEAR_COPIES, NEAR_BY_DISTANCE)
            if metric in found and float(found[metric][bound]) > EXPECTED
        ]
        if row["z"] is not None and float(row["z"]) < FAR_Z:
            hints.append(f"z {float(row['z']):.1f} {place}")
    spaces = dict.fromkeys(row["space"] for row in rows if row["space"] != EVERYWHERE)
    return [*hints, *(f"samples are less authentic in {space}" for space in spaces if _is_less_authentic(rows, space))]


def _is_nearer(rows: Sequence[Mapping[str, Any]], space: str) -> bool:
    """Whether some group's samples lie surely nearer to the training images than held-out images do."""
    return any(row["space"] == space and row["z"] is not None and float(row["z"]) < FAR_Z for row in rows)


def _is_less_authentic(rows: Sequence[Mapping[str, Any]], space: str) -> bool:
    """Whether some group's authenticity is surely below the held-out images'."""
    own = [(row["what"], value) for row in rows if row["space"] == space for value in row["values"]]
    found = {what: value for what, value in own if value["metric"] == AUTHENTICITY}
    real = found.pop(HELD_OUT, None)
    return real is not None and any(float(value["high"]) < float(real["low"]) for value in found.values())


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * float(value['value']):.3g}%"


def copying_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fraction of near copies in all spaces, next to the 5% at most that is expected, and what else hints."""
    parts = []
    for row in rows:
        found = next((value for value in row["values"] if value["metric"] == NEAR_COPIES), None)
        if found is not None and row["space"] == EVERYWHERE:
            low, high = (f"{100 * float(found[key]):.3g}" for key in ("low", "high"))
            parts.append(f"{_percent(found)} ({low} to {high}) of {row['what']}")
    said, hints = copying_verdict(rows), copying_hints(rows)
    head = {
        "copies": "More samples than held-out images lie very near to one training image in pixels and in features",
        "none": "No more samples than held-out images lie very near to one training image in pixels and in features",
        "unclear": "Whether samples are copies of training images cannot be told from these; very near to one in "
        "pixels and in features are",
    }[said]
    also = f"; hints: {', '.join(hints)}" if hints and said == "unclear" else ""
    return f"{head}: {'; '.join(parts)}; of held-out images at most 5%{also}"


def leak_words(copying: Mapping[str, Any]) -> str | None:
    """A warning where held-out images are training images too, which makes all of it worth less."""
    if not copying["leaks"]:
        return None
    return (
        f"{counted(copying['leaks'], 'held-out image')} of {copying['held_out']} also stand among the training images "
        "(distance 0): numbers of the new domain and of copying flatter; `imagen-lightning shards doctor` finds them"
    )


def verdict(
    new: Mapping[str, Any] | None, old: Mapping[str, Any] | None, copying: str | None, trained: bool, asked_old: bool
) -> str:
    """The whole in some clauses.

    Args:
        new, old: the judging metric's difference on the new domain and on the old one, None where nothing judged.
        copying: see `copying_verdict`; None where it was not measured.
        trained: whether AFTER's weights differ from BEFORE's.
        asked_old: whether the old domain was drawn.
    """
    if not trained:
        return "AFTER has the weights of BEFORE: nothing was trained."
    gain = {
        "better": "AFTER draws the new domain better than BEFORE",
        "worse": "AFTER draws the new domain worse than BEFORE",
        "alike": "AFTER and BEFORE are alike on the new domain",
        "unclear": "Whether AFTER is better on the new domain cannot be told from these",
        None: "Nothing judged the new domain",
    }[None if new is None else new["verdict"]]
    if not asked_old:
        loss = "what it may have forgotten was not measured"
    else:
        loss = {
            "better": "it does better on what BEFORE could do",
            "worse": "it has lost some of what BEFORE could do",
            "alike": "what BEFORE could do is kept",
            "unclear": "whether it lost what BEFORE could do cannot be told from these",
            None: "nothing judged what BEFORE could do",
        }[None if old is None else old["verdict"]]
    near = {
        "copies": "samples lie nearer to training images than held-out images do: look at them below",
        "unclear": "whether samples are copies of training images cannot be told from these: look at them below",
        "none": "there is no sign of copies of training images",
        None: "copying was not measured",
    }[copying]
    return f"{gain}; {loss}; {near}."
