"""Every metric that the package logs or writes: its unit, which direction is better, and how its interval is made.

This is the only declaration of a metric's direction. A metric that is not declared has none, and nothing is marked as
its best. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

BOOTSTRAP = "95% bootstrap"
WILSON = "95% Wilson"
SUBSETS = "1 std of KID subsets"
SPLITS = "1 std of splits"
BOTH_SETS = "95% bootstrap of both sets"
AT_LEAST_WILSON = f"{BOTH_SETS}, no narrower than Wilson's"
STANDARD_ERROR = "1 standard error of the mean"

IMAGES, CAPTIONS = "images", "captions"
_PLACEHOLDER = re.compile(r"<\w+>")
_STAGE = re.compile(r"(?:base|sr_\d+)/(.+)")


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of metrics.

    Attributes:
        name: as a `Value` or metrics.csv has it. A family has one placeholder: "FD-<extractor>".
        higher_is_better: None where neither direction is better.
        unit: "%" for a fraction that people are shown in percent, "" where there is none.
        interval: how its interval is made, None where it has none.
        compares: what images are compared with, `IMAGES` or `CAPTIONS`, for metrics that judge a whole set.
    """

    name: str
    higher_is_better: bool | None
    unit: str = ""
    interval: str | None = None
    compares: str | None = None

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(_escaped(self.name))

    @cached_property
    def column(self) -> re.Pattern[str]:
        """Matches the metric in a column such as "base/clip_score_LABEL", without the stage."""
        return re.compile(_escaped(slug(self.name)) + r"(?:_.+)?")


def slug(metric: str) -> str:
    """Return the metric's name as the loggers' columns have it: "clip_score"."""
    return metric.lower().replace(" ", "_").replace(",", "")


def _escaped(name: str) -> str:
    return ".+".join(map(re.escape, _PLACEHOLDER.split(name)))


METRICS = (
    # of generated images
    Metric("caption accuracy", True, "%", WILSON, CAPTIONS),
    Metric("caption accuracy, <part>", True, "%", WILSON),
    Metric("CLIP score", True, "", BOOTSTRAP, CAPTIONS),
    Metric("FID", False, "", BOOTSTRAP, IMAGES),
    Metric("FD-<extractor>", False, "", BOOTSTRAP, IMAGES),
    Metric("CLIP-FID", False, "", BOOTSTRAP, IMAGES),
    Metric("KID", False, "", SUBSETS, IMAGES),
    Metric("KD-<extractor>", False, "", SUBSETS, IMAGES),
    Metric("CLIP-KID", False, "", SUBSETS, IMAGES),
    Metric("precision", True, "%", WILSON),
    Metric("recall", True, "%", WILSON),
    Metric("Inception score", True, "", SPLITS),
    Metric("PSNR", True, "dB", BOOTSTRAP),
    Metric("SSIM", True, "", BOOTSTRAP),
    Metric("LPIPS", False, "", BOOTSTRAP),
    Metric("low-res PSNR", True, "dB", BOOTSTRAP),
    Metric("colour shift", False, "of 255", BOOTSTRAP),
    Metric("samples colour shift", False, "of 255", BOOTSTRAP),
    # of a stage in training
    Metric("denoising ratio", False, "", BOOTSTRAP),
    Metric("text gain", True, "", BOOTSTRAP),
    Metric("text z", True),
    # of copying training images
    Metric("near copies", False, "%", AT_LEAST_WILSON),
    Metric("near by distance", False, "%", AT_LEAST_WILSON),
    Metric("nearer than a held-out image", None, "%", BOTH_SETS),  # 50% is what is expected
    Metric("authenticity", True, "%", WILSON),
    # of a run
    Metric("train/loss", False),
    Metric("val/loss", False),
    Metric("<part>/loss_t/<bin>", False),
    Metric("<part>/loss_aug/<bin>", False),
    Metric("throughput/images_per_second", True),
    Metric("throughput/seconds_per_step", False, "s"),
    Metric("throughput/flops_per_second", True),
    Metric("throughput/matmul_share", True),
    Metric("data/skipped/<reason>", False),
    Metric("data/skipped_val/<reason>", False),
    Metric("lr-<optimizer>", None),
    Metric("epoch", None),
    Metric("seconds_per_image", False, "s"),
)


@lru_cache(maxsize=4096)
def find(name: str) -> Metric | None:
    """Return the declaration of a metric's name or of a column of metrics.csv, None where there is none."""
    found = next((metric for metric in METRICS if metric.pattern.fullmatch(name)), None)
    if found is None and (of_stage := _STAGE.fullmatch(name)) is not None:
        own = [metric for metric in METRICS if "," not in metric.name and "/" not in metric.name]
        found = next((metric for metric in own if metric.column.fullmatch(of_stage[1])), None)
    return found


def higher_is_better(name: str) -> bool | None:
    """Return the metric's direction, None where it has none or is not declared."""
    metric = find(name)
    return None if metric is None else metric.higher_is_better


def is_percent(name: str) -> bool:
    """Return whether people are shown the metric in percent."""
    metric = find(name)
    return metric is not None and metric.unit == "%"


def compares(name: str) -> str | None:
    """Return what the metric compares images with, `IMAGES` or `CAPTIONS`; None for other metrics."""
    metric = find(name)
    return None if metric is None else metric.compares


def is_deviation(confidence: str | None) -> bool:
    """Return whether an interval is one standard deviation or error to either side, rather than 95%."""
    return confidence is not None and confidence.startswith((SUBSETS, SPLITS, STANDARD_ERROR))


def is_of_weights(column: str) -> bool:
    """Return whether a column's rows count the steps behind the weights that were measured, "base/fid".

    Other rows, such as the loss's, are numbered by the step that logged them, from 0.
    """
    return _STAGE.fullmatch(column) is not None
