"""Which numbers of runs may stand together, and the columns that follow from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imagen_lightning.catalog import STANDARD_ERROR
from imagen_lightning.metrics.protocol import Protocol, Value, columns
from imagen_lightning.report.differences import differing, flatten, words
from imagen_lightning.report.runs import Measurement, Run

TRAIN_LOSS, VAL_LOSS = "train/loss", "val/loss"
NUM_LAST = 20  # logged values of the training loss that its mean is taken over
# What a loss is measured by: of the stage …
_OF_MODEL = ("image_size", "low_res_size", "crop_size", "diffusion", "augmentation")
# … and all of the data but how it is loaded, and in which order.
_LOADING = ("batch_size", "num_workers", "window", "max_skip_share", "seed")
OF_THE_MODEL = ("process",)  # of a protocol: runs are compared in what model they train, which the page shows apart
_TRAINING_DATA = ("train", "random_flip")


@dataclass(frozen=True)
class Yardstick:
    """What a run's losses are measured by.

    Attributes:
        label: for people, "base 16 px, X0".
        settings: the configuration's entries that decide it.
        weights: "ema" or "raw", of validation.
        precision: of training and validation.
    """

    label: str
    settings: Mapping[str, Any]
    weights: str | None
    precision: str | None

    @property
    def key(self) -> str:
        """Equal for runs whose losses may stand together."""
        return self.protocol(VAL_LOSS).key()

    def protocol(self, metric: str, settings: str | None = None) -> Protocol:
        """Of a metric that a run logs; validation data stand for the reference."""
        training = metric.startswith("train/")
        kept = {key: value for key, value in self.settings.items() if training or not _is_training(key)}
        return Protocol(
            metric,
            image_size=_size(self.settings.get("model.image_size")),
            reference=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
            reference_name=self.label,
            weights="raw" if training else self.weights,
            precision=self.precision,
            settings=settings,
        )


def yardstick(run: Run) -> Yardstick:
    """What a run's losses are measured by; that of a run without a configuration is its own."""
    model, data = (run.config.get(key) for key in ("model", "data"))
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return Yardstick(f"{run.name}, configuration unknown", {"folder": str(run.folder)}, None, None)
    flat = flatten({"model": _kept(model, only=_OF_MODEL), "data": _kept(data, without=_LOADING)})
    trainer, ema = run.config.get("trainer"), run.config.get("ema")
    precision = trainer.get("precision") if isinstance(trainer, Mapping) else None
    averaged = isinstance(ema, Mapping) and bool(ema.get("decay"))
    return Yardstick(
        stage_words(run), flat, "ema" if averaged else "raw", None if precision is None else str(precision)
    )


def distinct(yardsticks: Sequence[Yardstick]) -> list[Yardstick]:
    """The same, with what differs added to the labels of those that share one and are not equal."""
    by_label: dict[str, dict[str, Yardstick]] = {}
    for item in yardsticks:
        by_label.setdefault(item.label, {})[item.key] = item
    named = []
    for item in yardsticks:
        alike = list(by_label[item.label].values())
        facts = [{**other.settings, "weights": other.weights, "precision": other.precision} for other in alike]
        place = [other.key for other in alike].index(item.key)
        parts = [f"{key} {values[place]}" for key, values in list(differing(facts).items())[:3]]
        named.append(replace(item, label=", ".join([item.label, *parts])))
    return named


def stage_words(run: Run) -> str:
    """The run's stage in a few words: "base 16 px, X0", "super-resolution 16 → 64 px, X0"."""
    flat = flatten(run.config)
    name = {"BaseStage": "base", "SuperResolutionStage": "super-resolution"}
    kind = words(flat.get("model", "unknown stage"))
    low, high = flat.get("model.low_res_size"), flat.get("model.image_size")
    size = f" {low} → {high} px" if low else f" {high} px" if high else ""
    target = flat.get("model.diffusion.parametrization")
    return name.get(kind, kind) + size + (f", {words(target)}" if target else "")


def _kept(component: Mapping[str, Any], only: Collection[str] = (), without: Collection[str] = ()) -> dict[str, Any]:
    arguments = component.get("init_args")
    given = arguments if isinstance(arguments, Mapping) else {}
    kept = {key: value for key, value in given.items() if (key in only if only else key not in without)}
    return {"class_path": component.get("class_path"), "init_args": kept}


def _is_training(key: str) -> bool:
    return any(key == f"data.{name}" or key.startswith(f"data.{name}.") for name in _TRAINING_DATA)


def _size(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def is_metric(name: str) -> bool:
    """Whether a column of metrics.csv is a result, rather than a loss in parts, a speed or a count."""
    return (
        name not in ("epoch", TRAIN_LOSS, VAL_LOSS)
        and not name.startswith(("throughput/", "data/", "lr-"))
        and ("/loss_t/" not in name and "/loss_aug/" not in name)
    )


def last_values(run: Run, measured: Yardstick) -> list[Value]:
    """What the run reached: its losses and every metric that it logged, at their last step."""
    last_of = {item.name: item.value for item in run.measurements}
    values = []
    for name, curve in run.curves.items():
        if name == TRAIN_LOSS:
            last = curve.values[-NUM_LAST:]
            protocol = measured.protocol(name, f"mean of the last logged values, at most {NUM_LAST}")
            if len(last) < 2:
                values.append(Value(name, float(last[-1]), None, None, protocol))
                continue
            mean, error = float(last.mean()), float(last.std(ddof=1)) / math.sqrt(len(last))
            values.append(Value(name, mean, mean - error, mean + error, protocol, f"{STANDARD_ERROR} of {len(last)}"))
        elif name == VAL_LOSS or (is_metric(name) and name not in last_of):
            values.append(Value(name, curve.last, None, None, measured.protocol(name)))
    return [*values, *last_of.values()]


def measurements(run: Run, measured: Yardstick) -> list[Measurement]:
    """Every metric over the run's steps: with its own protocol where values.jsonl has it, else by the yardstick."""
    known = {item.name for item in run.measurements}
    found = list(run.measurements)
    for name, curve in run.curves.items():
        if is_metric(name) and name not in known:
            protocol = measured.protocol(name)
            pairs = zip(curve.steps.tolist(), curve.values.tolist())
            found += [Measurement(step, name, Value(name, value, None, None, protocol)) for step, value in pairs]
    return found


@dataclass(frozen=True)
class ValueColumn:
    """Values that stand in one column of a table.

    Attributes:
        letter: by which the page refers to the protocol; metrics that were measured alike share it.
        values: by row, where the row has one.
    """

    letter: str
    values: Mapping[int, Value]

    @property
    def first(self) -> Value:
        return next(iter(self.values.values()))

    @property
    def is_part(self) -> bool:
        """Whether the metric is a part of another, as "caption accuracy, shape" is."""
        return "," in self.first.metric


def value_columns(rows: Sequence[Sequence[Value]], compared: Collection[str] = ()) -> list[ValueColumn]:
    """A column for every metric and protocol, those of one metric side by side and parts of metrics last.

    Args:
        rows: the values of each row.
        compared: settings of sampling that the table shows beside the values, and so compares.
    """
    owner = {id(value): number for number, row in enumerate(rows) for value in row}
    flat = [value for row in rows for value in row]
    metrics = sorted(dict.fromkeys(value.metric for value in flat), key=lambda metric: "," in metric)
    groups = columns(flat, compared)
    groups.sort(key=lambda group: metrics.index(group[0].metric))
    letters: dict[str, str] = {}
    made = []
    for group in groups:
        key = replace(group[0].protocol, metric="any").key(compared)
        letter = letters.setdefault(key, _letter(len(letters)))
        made.append(ValueColumn(letter, {owner[id(value)]: value for value in group}))
    return made


def _letter(place: int) -> str:
    """a … z, aa, ab, …"""
    first, second = divmod(place, 26)
    return (chr(96 + first) if first else "") + chr(97 + second)
