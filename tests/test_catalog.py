"""Every metric that the package can produce is declared once, and every reader takes its direction from there."""

from pathlib import Path

import pytest
import torch
import yaml

from imagen_lightning import callbacks, catalog
from imagen_lightning.callbacks import sampled_metric
from imagen_lightning.callbacks.probes import Findings
from imagen_lightning.callbacks.values import column
from imagen_lightning.evaluation import measures
from imagen_lightning.evaluation.measures import Judge
from imagen_lightning.finetuning import evidence_copying
from imagen_lightning.finetuning.evidence_differences import reading
from imagen_lightning.metrics import values
from imagen_lightning.metrics.features import ClipFeatures, InceptionFeatures, RandomConvFeatures
from imagen_lightning.metrics.frechet import FeatureMoments
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.reference import Reference, ReferenceKey
from imagen_lightning.report.comparable import value_columns
from imagen_lightning.report.figures import Point, pareto_front
from imagen_lightning.report.values import best_rows, value_hint
from imagen_lightning.sweeps import file as sweep_file
from imagen_lightning.types import InputError

SWEEPS = sorted(Path(__file__).parents[1].glob("experiments/sweeps/*.yaml"))
PARTS = [f"caption accuracy, {part}" for part in ("background", "number", "color", "shape", "size", "relation")]
OF_IMAGES = [
    *(measures.CAPTION_ACCURACY, measures.CLIP_SCORE, measures.PSNR, measures.SSIM, measures.LPIPS_NAME),
    *("low-res PSNR", "colour shift", "precision", "recall", "Inception score", *PARTS),
]
OF_TRAINING = ["denoising ratio", "text gain", "text z", "samples colour shift"]
OF_COPYING = [getattr(evidence_copying, name) for name in ("NEAR_COPIES", "NEAR_BY_DISTANCE", "NEARER", "AUTHENTICITY")]


class Stage:
    low_res_size, image_size = None, 64


def extractors():
    inception = InceptionFeatures()
    inception.__dict__["_loaded"] = (None, "0")
    other = InceptionFeatures(layer="64")
    return [RandomConvFeatures(), ClipFeatures.__new__(ClipFeatures), other]


DISTANCES = ["FID", "KID", *(getattr(x, name) for x in extractors() for name in ("distance_name", "kernel_name"))]
PRODUCED = [*OF_IMAGES, *DISTANCES, *OF_TRAINING, *OF_COPYING]


def declarations(name):
    return [metric.name for metric in catalog.METRICS if metric.pattern.fullmatch(name)]


@pytest.mark.parametrize("name", PRODUCED)
def test_what_is_produced_is_declared_once(name):
    assert len(declarations(name)) == 1
    if "," not in name:
        for own in (column(Stage(), name), column(Stage(), name) + "_label"):
            assert catalog.find(own) == catalog.find(name)
            assert catalog.is_of_weights(own)


def test_columns_of_a_run_are_declared(tmp_path):
    logged = ["train/loss", "val/loss", "train/loss_t/0.00-0.10", "val/loss_aug/0.90-1.00", "lr-AdamW", "epoch"]
    logged += [f"throughput/{name}" for name in ("images_per_second", "seconds_per_step", "flops_per_second")]
    logged += ["throughput/matmul_share", "data/skipped/too_small", "data/skipped_val/too_small", "seconds_per_image"]
    for name in logged:
        assert len(declarations(name)) == 1
        assert not catalog.is_of_weights(name)


def test_no_two_declarations_share_a_name():
    for metric in catalog.METRICS:
        assert declarations(metric.name.replace("<", "").replace(">", "")) == [metric.name]


@pytest.mark.parametrize(
    "name",
    ["fidelity", "confidence", "base/fidelity", "my loss", "distance", "FDx", "KD", "train/losses", "base/kidney"],
)
def test_what_only_looks_like_a_metric_has_no_direction(name):
    assert catalog.find(name) is None
    assert reading(name, 0.1, 0.2, 1.0) == "unclear"


def test_every_callback_that_measures_logs_what_is_declared():
    """Of the classes that callbacks export; a new one is named here or declared."""
    measuring = {
        name
        for name in callbacks.__all__
        if isinstance(getattr(callbacks, name), type)
        and issubclass(getattr(callbacks, name), sampled_metric.SampledMetric)
    }
    assert measuring == {"FID", "KID", "CLIPScore", "CaptionAccuracy"}
    assert catalog.find(callbacks.CLIPScore.metric)
    assert catalog.find(callbacks.CaptionAccuracy.metric)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_optimise_what_is_declared(path):
    metric = yaml.safe_load(path.read_text())["metric"]
    assert sweep_file._metric(metric).maximize is catalog.higher_is_better(metric["name"])


def test_intervals_are_made_as_declared():
    extractor, numbers = RandomConvFeatures(), torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    key = ReferenceKey.of(extractor, "0", 8)
    reference = Reference(key, FeatureMoments.of(numbers[:50]), numbers[:50])
    none = Protocol("none")
    found = [
        values.share_value("caption accuracy", numbers[:, 0] > 0.5, none),
        values.mean_value("PSNR", numbers[:, 0], none),
        values.frechet_value(extractor, numbers, reference, none),
        values.kernel_value(extractor, numbers, reference, none),
        *values.precision_recall_values(extractor, numbers, reference, none),
        values.inception_score_value(extractor, numbers, none),
        *Findings(numbers[:, 0], numbers[:, 1], numbers[:, 2]).values(none, {}),
        *evidence_copying.copying_values(
            *(evidence_copying.neighbours(part, numbers) for part in (numbers[:30], numbers[30:])), numbers, none
        ),
    ]
    for value in found:
        assert value.confidence == catalog.find(value.metric).interval, value.metric


def values_of(name, numbers):
    return [[Value(name, number, None, None, Protocol(name))] for number in numbers]


OF_RUNS = ["train/loss", "val/loss", "base/fd-random", "sr_64/text_gain"]


@pytest.mark.parametrize("name", [*PRODUCED, *OF_RUNS, "unheard of"])
def test_readers_agree(name):
    better = catalog.higher_is_better(name)
    (found,) = value_columns(values_of(name, [1.0, 3.0, 2.0]))
    assert best_rows(found) == {True: {1}, False: {0}, None: set()}[better]
    assert ("higher is better" in value_hint(found), "lower is better" in value_hint(found)) == (
        better is True,
        better is False,
    )
    assert reading(name, 0.1, 0.2, 1.0) == {True: "better", False: "worse", None: "unclear"}[better]
    for goal in ("minimize", "maximize"):
        if better is None or better == (goal == "maximize"):
            assert sweep_file._metric({"name": name, "goal": goal}).maximize == (goal == "maximize")
        else:
            with pytest.raises(InputError, match="is better when"):
                sweep_file._metric({"name": name, "goal": goal})
    if better is not None:
        assert Judge(name).higher_is_better is better
        time = [row[0] for row in values_of("seconds_per_image", [1.0, 1.0])]
        points = [Point(x, y[0], "") for x, y in zip(time, values_of(name, [1.0, 2.0]))]
        assert [point.y.value for point in pareto_front(points)] == [2.0 if better else 1.0]


def test_a_goal_left_out_never_minimizes_what_is_better_when_higher():
    with pytest.raises(InputError, match="defaults to minimize, but 'caption accuracy' is better when higher"):
        sweep_file._metric({"name": "caption accuracy"})
    assert sweep_file._metric({"name": "val/loss"}).maximize is False
    assert sweep_file._metric({"name": "my own"}).maximize is False


def interval(value, low, high, confidence="95% bootstrap", metric="FD-random"):
    return [Value(metric, value, low, high, Protocol(metric), confidence)]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([interval(1, 0.9, 1.1), interval(2, 1.8, 2.2), interval(3, 2, 4)], {0}),
        ([interval(1, 0.5, 1.6), interval(1.5, 1.2, 1.9), interval(3, 2.5, 3.5)], {0, 1}),
        ([interval(1, 0.5, 1.6), interval(1.5, 1.2, 1.9)], set()),
        # an unbiased kernel distance below 0, and one just above; a third that is worse
        ([interval(v, v - 1e-3, v + 1e-3, catalog.SUBSETS, "KID") for v in (-5e-4, 9e-4, 0.02)], {0, 1}),
        ([interval(v, v - 1e-3, v + 1e-3, catalog.SUBSETS, "KID") for v in (-5e-4, 9e-4)], set()),
        (values_of("FD-random", [3e-13, 1e-12, 0.5]), {0, 1}),
        (values_of("FD-random", [3e-13, 0.0]), set()),
        (values_of("FD-random", [0.123401, 0.123399]), set()),
        (values_of("FD-random", [float("nan"), 1.0, 2.0]), {1}),
    ],
)
def test_only_what_can_be_told_apart_is_the_best(rows, best):
    (found,) = value_columns(rows)
    assert best_rows(found) == best
