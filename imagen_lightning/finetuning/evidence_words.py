"""What the evidence says, in plain sentences; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagen_lightning.errors import counted

NEAR_COPIES = "near copies"
EXPECTED = 0.05
EVERYWHERE = "pixels and features"


def change_sentence(difference: Mapping[str, Any]) -> str:
    """One metric: "caption accuracy rose from 12% to 78% (by 66 points, 58 to 73)"."""
    metric, value = difference["metric"], float(difference["value"])
    percent = is_share(metric)
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


def is_share(metric: str) -> bool:
    """Whether a metric is a share, told in percent."""
    return metric.startswith(("caption accuracy", "near", "authenticity", "precision", "recall"))


def shown(metric: str, value: float) -> str:
    return f"{100 * value:.3g}%" if is_share(metric) else f"{value:.3g}"


def part_sentence(differences: Sequence[Mapping[str, Any]], judge: str | None) -> str:
    """On one set of captions, by the metric that judges."""
    found = next((item for item in differences if item["metric"] == judge), None)
    if found is None:
        return "Nothing could be measured here: give --clip, or data with images."
    words = {"better": "better", "worse": "worse", "alike": "no difference beyond chance"}
    text = f"{change_sentence(found)}: {words[found['verdict']]}."
    return text[0].upper() + text[1:]


def copying_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """ "copies" where more samples than held-out images are surely near copies."""
    judging = (row for row in rows if row["space"] == EVERYWHERE)
    return "copies" if any(_surely(value) for row in judging for value in row["values"]) else "none"


def _surely(value: Mapping[str, Any]) -> bool:
    return bool(value["metric"] == NEAR_COPIES and value["low"] is not None and float(value["low"]) > EXPECTED)


def copying_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The share of near copies in all spaces, beside the 5% at most that is expected."""
    parts = []
    for row in rows:
        found = next((value for value in row["values"] if value["metric"] == NEAR_COPIES), None)
        if found is not None:
            low, high = (f"{100 * float(found[key]):.3g}" for key in ("low", "high"))
            parts.append(f"{100 * float(found['value']):.3g}% ({low} to {high}) of {row['what']}")
    head = {
        "copies": "More samples than held-out images lie very near to one training image in pixels and in features",
        "none": "No more samples than held-out images lie very near to one training image in pixels and in features",
    }[copying_verdict(rows)]
    return f"{head}: {'; '.join(parts)}; of held-out images at most 5%"


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
        copying: "copies", "none", or None where it was not measured.
        trained: whether AFTER's weights differ from BEFORE's.
        asked_old: whether the old domain was drawn.
    """
    if not trained:
        return "AFTER has the weights of BEFORE: nothing was trained."
    gain = {
        "better": "AFTER draws the new domain better than BEFORE",
        "worse": "AFTER draws the new domain worse than BEFORE",
        "alike": "No gain on the new domain can be told from chance",
        None: "Nothing judged the new domain",
    }[None if new is None else new["verdict"]]
    if not asked_old:
        loss = "what it may have forgotten was not measured"
    else:
        loss = {
            "better": "it does better on what BEFORE could do",
            "worse": "it has lost some of what BEFORE could do",
            "alike": "no loss of what BEFORE could do can be told from chance",
            None: "nothing judged what BEFORE could do",
        }[None if old is None else old["verdict"]]
    near = {
        "copies": "samples lie nearer to training images than held-out images do: look at them below",
        "none": "there is no sign of copies of training images",
        None: "copying was not measured",
    }[copying]
    return f"{gain}; {loss}; {near}."
