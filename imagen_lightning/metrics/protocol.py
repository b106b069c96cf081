"""How a number was made, beside the number: two that were made differently never stand in one column."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from imagen_lightning.errors import InputError, counted

Setting = float | str | Sequence[float | str | None] | None
Settings = Mapping[str, Setting]

MEASURED = (
    "metric",
    "extractor",
    "extractor_sha256",
    "resize_filter",
    "image_size",
    "num_samples",
    "reference",
    "reference_name",
    "prompts",
    "precision",
    "settings",
)
MADE = ("weights", "guidance", "steps", "sampler", "aug_level", "seed", "sampling", "process")
GROUPS = ("sampling", "process")
EMA, RAW, IMPORTED, MERGED, NOT_RECORDED = "ema", "raw", "imported", "merged", "not recorded"
WEIGHTS = (EMA, RAW, IMPORTED, MERGED, NOT_RECORDED)

_WORDS = {
    "metric": "metric",
    "extractor": "extractor",
    "extractor_sha256": "extractor's SHA-256",
    "resize_filter": "resize filter",
    "image_size": "image size in px",
    "num_samples": "number of samples",
    "reference": "reference's SHA-256",
    "reference_name": "reference",
    "prompts": "prompts' SHA-256",
    "weights": "weights",
    "precision": "precision",
    "settings": "settings",
    "guidance": "guidance",
    "steps": "sampling steps",
    "sampler": "sampler",
    "aug_level": "augmentation level",
    "seed": "seed",
    "sampling": "sampling",
    "process": "model",
}


@dataclass(frozen=True)
class Protocol:
    """What a value depends on beside the model; None where a field does not apply.

    The fields of `MEASURED` say how pictures were measured, those of `MADE` how they were sampled. Values that differ
    in any field are not comparable, save in a field that is itself compared: the points of a sweep over guidance differ
    in guidance and in nothing else. Such fields are named to `differences`, `key`, `columns` and `refuse_mixed` as
    `compared`; only those of `MADE` can be, and how pictures are measured is never what is compared. One setting of
    the groups `sampling` and `process` is named with its group: "sampling.spacing".

    Attributes:
        metric: "FID", "FD-random", "KID", "CLIP score", …
        extractor: name of the feature extractor.
        extractor_sha256: of its weights.
        resize_filter: by which pictures are brought to the extractor's size.
        image_size: side in pixels of the pictures before that.
        num_samples: pictures measured.
        reference: SHA-256 of the reference pictures or of their statistics.
        reference_name: what people call them. No difference by itself where both hashes are known.
        prompts: SHA-256 of the captions the pictures were sampled from (`digests.digest_texts`).
        precision: in which the model sampled, "float32", "bf16-mixed", ….
        settings: of the metric itself, in words, "k=3" or "100 subsets of 1000".
        weights: one of `WEIGHTS`. This and the next four are one value, or one a stage for a cascade.
        guidance: guidance weight.
        steps: sampling steps.
        sampler: sampler with its arguments.
        aug_level: noise level of the low-resolution input.
        seed: of the sampling noise.
        sampling: the stages' other settings of sampling by name: spacing, thresholding, guidance interval, …
        process: what else of the model decides a sample, by name: noise schedule, parametrization, text encoder, …

    Raises:
        InputError: no metric, unknown weights.
    """

    metric: str
    extractor: str | None = None
    extractor_sha256: str | None = None
    resize_filter: str | None = None
    image_size: int | None = None
    num_samples: int | None = None
    reference: str | None = None
    reference_name: str | None = None
    prompts: str | None = None
    precision: str | None = None
    settings: str | None = None
    weights: Setting = None
    guidance: Setting = None
    steps: Setting = None
    sampler: Setting = None
    aug_level: Setting = None
    seed: Setting = None
    sampling: Settings | None = None
    process: Settings | None = None

    def __post_init__(self) -> None:
        if not self.metric:
            raise InputError("a protocol needs the name of its metric")
        for name in MADE:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for kind in self.weights if isinstance(self.weights, tuple) else (self.weights,):
            if kind not in (None, *WEIGHTS):
                raise InputError(f"weights {kind!r} of a protocol are unknown; use one of {', '.join(WEIGHTS)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, without the fields that do not apply."""
        return {name: _with_lists(value) for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Protocol:
        """Reads what `to_json` gave.

        Raises:
            InputError: not a protocol, or one with fields that this version does not know.
        """
        _check_fields(cls, data, "protocol", required=("metric",))
        return cls(**data)

    def key(self, compared: Collection[str] = ()) -> str:
        """Twelve hex digits, equal where there are no `differences`; stable over processes and versions of Python."""
        kept = self.to_json()
        if self.reference is not None:
            kept.pop("reference_name", None)
        kept = flat(kept)
        for compared_name in _checked(compared):
            for name in [name for name in kept if name == compared_name or name.startswith(f"{compared_name}.")]:
                del kept[name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol, compared: Collection[str] = ()) -> list[str]:
        """In words, one an unequal field: ["number of samples: 1000 and 5000"]; empty where values are comparable."""
        ignored = {*_checked(compared)}
        if self.reference is not None and other.reference is not None:
            ignored.add("reference_name")
        found = [
            f"{_WORDS[name]}: {_words(getattr(self, name))} and {_words(getattr(other, name))}"
            for name in (*MEASURED, *MADE)
            if name not in (*ignored, *GROUPS) and getattr(self, name) != getattr(other, name)
        ]
        for group in GROUPS:
            if group in ignored:
                continue
            mine, theirs = getattr(self, group) or {}, getattr(other, group) or {}
            found += [
                f"{setting_title(name)}: {_words(mine.get(name))} and {_words(theirs.get(name))}"
                for name in dict.fromkeys([*mine, *theirs])
                if f"{group}.{name}" not in ignored and mine.get(name) != theirs.get(name)
            ]
        return found


@dataclass(frozen=True)
class Value:
    """A number with its protocol and its uncertainty.

    Attributes:
        metric: the protocol's metric.
        value: the number; may be infinite (the PSNR of equal pictures) or NaN.
        low: lower end of the interval, None where none is known.
        high: upper end.
        protocol: how it was made.
        confidence: what the interval is, "95% bootstrap", "95% Wilson", "1 std of KID subsets"; None without one.

    Raises:
        InputError: the metric is not the protocol's, or an interval has one end or no name.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    protocol: Protocol
    confidence: str | None = None

    def __post_init__(self) -> None:
        if self.metric != self.protocol.metric:
            raise InputError(f"a value of {self.metric!r} has the protocol of {self.protocol.metric!r}")
        given = {self.low is not None, self.high is not None, self.confidence is not None}
        if len(given) > 1:
            raise InputError(f"the value of {self.metric} needs low, high and confidence, or none of the three")

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`; JSON has no infinity or NaN, so these become "inf", "-inf", "nan"."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        return {
            "metric": self.metric,
            **{name: _json_number(number) for name, number in numbers.items()},
            "confidence": self.confidence,
            "protocol": self.protocol.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Value:
        """Reads what `to_json` gave.

        Raises:
            InputError: not a value, or one with fields that this version does not know.
        """
        _check_fields(cls, data, "value", required=("metric", "value", "protocol"))
        metric = str(data["metric"])
        value, low, high = (
            _number(data.get(name), f"{name} of a value of {metric}") for name in ("value", "low", "high")
        )
        if value is None:
            raise InputError(f"the value of {metric} has no number")
        return cls(metric, value, low, high, Protocol.from_json(data["protocol"]), data.get("confidence"))


def columns(values: Iterable[Value], compared: Collection[str] = ()) -> list[list[Value]]:
    """Groups values so that those of a group share one protocol and may stand in one column.

    Args:
        values: of any metrics and protocols.
        compared: fields of `MADE` that the table itself compares, such as "guidance" in a sweep.

    Returns:
        The groups in order of their first value, each in the order given.

    Raises:
        InputError: `compared` names a field of how pictures were measured, or none at all.
    """
    groups: dict[str, list[Value]] = {}
    for value in values:
        groups.setdefault(value.protocol.key(compared), []).append(value)
    return list(groups.values())


def refuse_mixed(values: Iterable[Value], compared: Collection[str] = ()) -> None:
    """Raises InputError, which says why, unless the values may be compared (see `columns`)."""
    groups = columns(values, compared)
    if len(groups) > 1:
        first, second = groups[0][0].protocol, groups[1][0].protocol
        more = f" ({counted(len(groups) - 2, 'further protocol')})" if len(groups) > 2 else ""
        why = "; ".join(first.differences(second, compared))
        raise InputError(
            f"values of different protocols cannot be compared: {why}{more}; "
            f"measure them alike, or give each protocol a column of its own"
        )


def setting_title(name: str) -> str:
    """Return a setting's name for people: "aug level", "diffusion schedule" of "process.diffusion.schedule"."""
    for group in GROUPS:
        name = name.removeprefix(f"{group}.")
    return name.replace(".", " ").replace("_", " ")


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol's fields with each setting of the groups by itself: "sampling.spacing"."""
    flattened: dict[str, Any] = {}
    for name, value in fields.items():
        flattened |= {f"{name}.{key}": item for key, item in value.items()} if name in GROUPS else {name: value}
    return flattened


def is_made(name: str) -> bool:
    """Return whether a setting says how images were made, and so can be what a table compares."""
    return name in MADE or name.partition(".")[0] in GROUPS


def _checked(compared: Collection[str]) -> Collection[str]:
    for name in compared:
        if not is_made(name):
            raise InputError(f"{name!r} cannot be what is compared; use one of {', '.join(MADE)}")
    return compared


def _plain(value: Any) -> Any:
    """Lists as tuples, and whole floats as ints, so that 3 and 3.0 are one setting; None for no settings."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()} or None
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Sequence):
        return tuple(_plain(item) for item in value)
    return int(value) if float(value).is_integer() else value


def _with_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_lists(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "(" + ", ".join(_words(item) for item in value) + ")"
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _number(value: Any, what: str) -> float | None:
    try:
        return value if value is None else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is no number but {value!r}") from None


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _check_fields(cls: type, data: Any, name: str, required: Sequence[str]) -> None:
    if not isinstance(data, dict) or any(field not in data for field in required):
        raise InputError(f"this is no {name}: {str(data)[:80]!r}; it needs {', '.join(required)}")
    unknown = sorted(set(data) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise InputError(f"a {name} has unknown fields {', '.join(unknown)}: a newer version wrote it; update this one")
