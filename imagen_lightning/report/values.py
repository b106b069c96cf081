"""Values in tables: a number with its interval under a title that names its protocol."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from imagen_lightning.metrics.protocol import MADE, Protocol, Value
from imagen_lightning.report.comparable import ValueColumn, lower_is_better
from imagen_lightning.report.figures import setting
from imagen_lightning.report.markup import Html, element, join, measured
from imagen_lightning.report.page import Cell

_WORDS = {
    "extractor": "extractor {}",
    "extractor_sha256": "weights {}",
    "resize_filter": "resized by {}",
    "image_size": "{} px",
    "num_samples": "{} samples",
    "reference_name": "reference: {}",
    "reference": "reference {}",
    "prompts": "captions {}",
    "weights": "{} weights",
    "precision": "in {}",
    "settings": "{}",
    "guidance": "guidance {}",
    "steps": "{} steps",
    "sampler": "{}",
    "aug_level": "augmentation level {}",
    "seed": "seed {}",
}
_HASHES = ("extractor_sha256", "reference", "prompts")


def value_title(column: ValueColumn) -> Html:
    """The column's title: the metric and the letter of its protocol."""
    return join(column.first.metric, element("sup", column.letter))


def value_hint(column: ValueColumn) -> str:
    """What the pointer tells of the title."""
    return f"{direction(column.first.metric)}; protocol {column.letter} is described under the table"


def direction(metric: str) -> str:
    """ "lower is better" or "higher is better"."""
    return f"{'lower' if lower_is_better(metric) else 'higher'} is better"


def value_cell(column: ValueColumn, row: int) -> Cell:
    """The row's value with its interval; the best of the column is marked."""
    value = column.values.get(row)
    if value is None:
        return Cell("–")
    shown = measured(value.value)
    best = _best(list(column.values.values()))
    text = element("strong", shown) if best is not None and value.value == best else Html(shown)
    if value.low is None or value.high is None:
        return Cell(text, value.value, "no interval known")
    interval = element("span", f"{measured(value.low)} – {measured(value.high)}", class_="range")
    return Cell(
        join(text, interval), value.value, f"{interval_words(value)}: {measured(value.low)} to {measured(value.high)}"
    )


def _best(values: Sequence[Value]) -> float | None:
    numbers = [value.value for value in values if value.value == value.value]
    if min(numbers, default=0) == max(numbers, default=0):
        return None
    return min(numbers) if lower_is_better(values[0].metric) else max(numbers)


def interval_words(value: Value) -> str:
    """What the value's interval is: "95% bootstrap"."""
    return value.confidence or "no interval known"


def protocol_list(columns: Sequence[ValueColumn], compared: Collection[str] = ()) -> Html:
    """What each column's letter stands for, and why a metric has several columns.

    Args:
        columns: of one table.
        compared: settings that the table shows beside the values.
    """
    entries: dict[str, tuple[list[str], list[str]]] = {}  # letters and metrics by what is said of them
    for column in columns:
        metric = column.first.metric
        intervals = dict.fromkeys(interval_words(value) for value in column.values.values())
        words = [protocol_words(column.first.protocol, compared), direction(metric), ", ".join(intervals)]
        first = next(other for other in columns if other.first.metric == metric)
        if first is not column:
            why = ", ".join(first.first.protocol.differences(column.first.protocol, compared))
            words.append(f"apart from {first.letter}, for they differ in {why}")
        letters, metrics = entries.setdefault("; ".join(word for word in words if word), ([], []))
        letters.append(column.letter)
        metrics.append(metric)
    lines = [
        (element("dt", " ".join(letters)), element("dd", element("b", "; ".join(metrics)), ": ", words))
        for words, (letters, metrics) in entries.items()
    ]
    return element("dl", *(part for line in lines for part in line), class_="protocols")


def protocol_words(protocol: Protocol, without: Collection[str] = MADE) -> str:
    """A protocol's fields in one line."""
    parts = []
    content = protocol.to_json()
    for name, pattern in _WORDS.items():
        value = content.get(name)
        if value is None or name in without or (name == "reference" and "reference_name" in content):
            continue
        shown = str(value)[:10] if name in _HASHES else setting(value)
        parts.append(pattern.format(shown))
    return ", ".join(parts)
