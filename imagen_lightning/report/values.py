"""Values in tables: a number with its interval under a title that names its protocol."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from imagen_lightning.catalog import higher_is_better
from imagen_lightning.errors import counted
from imagen_lightning.metrics.alike import is_alike
from imagen_lightning.metrics.protocol import Protocol, Value, flat, setting_title
from imagen_lightning.report.comparable import ValueColumn
from imagen_lightning.report.figures import setting
from imagen_lightning.report.markup import Html, element, join, measured
from imagen_lightning.report.page import Cell

_WORDS = {
    "extractor": "extractor {}",
    "extractor_sha256": "extractor weights {}",
    "resize_filter": "resized by {}",
    "image_size": "{} px",
    "num_samples": "{}",
    "reference_name": "reference: {}",
    "reference": "reference {}",
    "prompts": "captions {}",
    "weights": "{} weights",
    "precision": "precision {}",
    "settings": "{}",
    "guidance": "guidance {}",
    "steps": "{} steps",
    "sampler": "{}",
    "aug_level": "augmentation level {}",
    "seed": "seed {}",
}
_MOST_CHANGES = 4
_HASHES = ("extractor_sha256", "reference", "prompts")


def value_title(column: ValueColumn) -> Html:
    """The column's title: the metric and the letter of its protocol."""
    return join(column.first.metric, element("sup", column.letter))


def value_hint(column: ValueColumn) -> str:
    """What the pointer tells of the title."""
    way = {True: "higher is better; ", False: "lower is better; ", None: ""}[higher_is_better(column.first.metric)]
    return f"{way}protocol {column.letter} is described under the table"


def value_cell(column: ValueColumn, row: int) -> Cell:
    """The row's value with its interval; the best of the column is marked."""
    value = column.values.get(row)
    if value is None:
        return Cell("–")
    shown = measured(value.value)
    text = element("strong", shown) if row in best_rows(column) else Html(shown)
    if value.low is None or value.high is None:
        return Cell(text, value.value, "no interval known")
    interval = element("span", f"{measured(value.low)} – {measured(value.high)}", class_="range")
    return Cell(
        join(text, interval), value.value, f"{interval_words(value)}: {measured(value.low)} to {measured(value.high)}"
    )


def best_rows(column: ValueColumn) -> set[int]:
    """The rows whose value is the best, or cannot be told from it; none where that holds for all, or nothing is known.

    Two values are told apart where they are shown by different digits and neither's interval holds the other.
    """
    better = higher_is_better(column.first.metric)
    known = {row: value for row, value in column.values.items() if not math.isnan(value.value)}
    if better is None or len(known) < 2:
        return set()
    best = (max if better else min)(known.values(), key=lambda value: value.value)
    shown = measured(best.value)
    alike = {row for row, value in known.items() if measured(value.value) == shown or is_alike(value, best)}
    return alike if len(alike) < len(column.values) else set()


def interval_words(value: Value) -> str:
    """What the value's interval is: "95% bootstrap"."""
    return value.confidence or "no interval known"


def protocol_list(columns: Sequence[ValueColumn], compared: Collection[str] = ()) -> Html:
    """What the letters stand for: each protocol in full, or by what parts it from the nearest one before.

    Args:
        columns: of one table.
        compared: settings that the table shows beside the values.
    """
    by_letter: dict[str, list[ValueColumn]] = {}
    for column in columns:
        by_letter.setdefault(column.letter, []).append(column)
    found = {letter: protocol_facts(own[0].first.protocol, compared) for letter, own in by_letter.items()}
    known: dict[str, dict[str, str]] = {}
    entries = []
    for letter, own in by_letter.items():
        facts = {name: text for name, text in found[letter].items() if not _is_silent(name, list(found.values()))}
        metrics = ", ".join(dict.fromkeys(column.first.metric.partition(",")[0] for column in own))
        intervals = dict.fromkeys(interval_words(value) for column in own for value in column.values.values())
        text = f"{_described(facts, known)}; {', '.join(intervals)}"
        known[letter] = facts
        entries += [element("dt", letter), element("dd", element("b", metrics), ": ", text)]
    return join(element("dl", *entries, class_="protocols"), _directions(columns))


def _is_silent(name: str, found: Sequence[Mapping[str, str]]) -> bool:
    """Return whether a setting of the model is the same everywhere; there are many of these."""
    return name.startswith("process.") and len({facts.get(name) for facts in found}) == 1


def _described(facts: Mapping[str, str], known: Mapping[str, Mapping[str, str]]) -> str:
    """A protocol by its facts, or by the few in which it differs from one that is known."""
    changes = {letter: _changes(facts, other) for letter, other in known.items()}
    nearest = min(changes, key=lambda letter: len(changes[letter]), default=None)
    if nearest is not None and 0 < len(changes[nearest]) <= _MOST_CHANGES:
        return f"as {nearest}, but {', '.join(changes[nearest])}"
    return ", ".join(words for name, words in facts.items() if name != "reference" or "reference_name" not in facts)


def _changes(facts: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = [name for name in dict.fromkeys([*facts, *other]) if facts.get(name) != other.get(name)]
    return [facts.get(name, f"{setting_title(name)}: none") for name in names]


def _directions(columns: Sequence[ValueColumn]) -> Html:
    metrics = list(dict.fromkeys(column.first.metric.partition(",")[0] for column in columns))
    parts = [
        f"{way} is better: {', '.join(found)}"
        for way, found in (
            ("Lower", [metric for metric in metrics if higher_is_better(metric) is False]),
            ("Higher", [metric for metric in metrics if higher_is_better(metric)]),
        )
        if found
    ]
    return element("p", ". ".join(parts), class_="hint")


def protocol_facts(protocol: Protocol, without: Collection[str] = ()) -> dict[str, str]:
    """A protocol's fields in words, by name."""
    facts = {}
    content = flat(protocol.to_json())
    patterns = {name: _WORDS.get(name, f"{setting_title(name)} {{}}") for name in [*_WORDS, *content]}
    for name, pattern in patterns.items():
        value = content.get(name)
        if value is not None and not {name, name.partition(".")[0]} & {*without} and name != "metric":
            if name == "num_samples":
                facts[name] = counted(int(value), "sample")
                continue
            facts[name] = pattern.format(str(value)[:10] if name in _HASHES else setting(value))
    return facts
