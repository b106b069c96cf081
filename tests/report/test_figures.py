"""The parts of figures that decide what they say."""

import numpy as np
import pytest

from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.report import figures
from imagen_lightning.report.figures import Point
from imagen_lightning.report.report import build
from imagen_lightning.report.runs import Curve, Run
from imagen_lightning.report.sources import read_sources


def points(xs, ys, metrics=("caption accuracy", "FD-random")):
    x, y = metrics
    made = [(Value(x, a, None, None, Protocol(x)), Value(y, b, None, None, Protocol(y))) for a, b in zip(xs, ys)]
    return [Point(a, b, f"p{i}") for i, (a, b) in enumerate(made)]


def test_the_front_is_what_no_point_beats():
    random = np.random.default_rng(0)
    xs, ys = random.normal(size=(2, 60)).round(1)
    found = {point.label for point in figures.pareto_front(points(xs, ys))}
    expected = {
        f"p{i}"
        for i in range(60)
        if not any((xs[j] >= xs[i]) & (ys[j] <= ys[i]) & ((xs[j] > xs[i]) | (ys[j] < ys[i])) for j in range(60))
    }
    assert found == expected
    front = figures.pareto_front(points(xs, ys))
    assert [p.x.value for p in front] == sorted(p.x.value for p in front)


def test_the_front_knows_which_way_is_better():
    both_higher = figures.pareto_front(points([1, 2, 3], [3, 2, 2], ("CLIP score", "PSNR")))
    assert [point.label for point in both_higher] == ["p0", "p2"]
    assert [p.label for p in figures.pareto_front(points([1, 2, 3], [3, 2, 2]))] == ["p2"]


def test_labels_name_what_varies():
    rows = [{"guidance": [g, 1], "steps": [n, 15], "seed": 0, "sampler": "ddim"} for g in (1, 2.5) for n in (10, 25)]
    assert figures.labels(rows) == [f"guidance {g:g}, steps {n}" for g in (1, 2.5) for n in (10, 25)]
    both = [{"guidance": [1, 1]}, {"guidance": [2, 2]}, {"guidance": [2, 3]}]
    assert figures.labels(both) == ["guidance 1", "guidance 2", "guidance 2 / 3"]
    assert figures.labels([{"steps": 10}, {"aug_level": 0.1}]) == ["steps 10, aug level –", "steps –, aug level 0.1"]


def test_fifty_runs_look_different():
    found = figures.styles([str(i) for i in range(50)])
    assert len({(style.colour, style.dash) for style in found}) == 50
    assert len({style.identity for style in found}) == 50


def test_levels_are_those_of_the_last_validation():
    curves = {
        "val/loss_t/0.10-0.20": Curve(np.array([10, 20]), np.array([3.0, 1.0])),
        "val/loss_t/0.00-0.10": Curve(np.array([10, 20]), np.array([4.0, 2.0])),
        "val/loss_t/0.90-1.00": Curve(np.array([10]), np.array([9.0])),  # empty at the last
        "val/loss_aug/0.00-0.10": Curve(np.array([30]), np.array([7.0])),
        "train/loss_t/0.00-0.10": Curve(np.array([40]), np.array([8.0])),
    }
    run = Run(folder="r", name="r", curves=curves)
    assert figures.level_means(run, "val/loss_t/") == [(0.0, 0.1, 2.0), (0.1, 0.2, 1.0)]
    (style,) = figures.styles(["r"])
    figure = figures.by_level([(style, run)], "loss_t", "t")
    np.testing.assert_allclose(figure.data[0].x, [0.05, 0.15])
    assert figures.by_level([(style, run)], "loss_aug", "t").data[0].name == "r"
    run.curves = {"train/loss_t/0.00-0.10": curves["train/loss_t/0.00-0.10"]}
    assert figures.by_level([(style, run)], "loss_t", "t").data[0].name == "r (training)"
    assert figures.by_level([(style, run)], "loss_aug", "t") is None


def test_a_figure_of_levels_says_what_its_means_are_of(tmp_path, make):
    notes = {"val": "Means of the last validation", "train": "Means over the training steps of the last interval"}
    for parts in (("val",), ("train",), ("train", "val")):
        folders = []
        for part in parts:
            folders.append(make.run(tmp_path / "-".join(parts) / part))
            (folders[-1] / "metrics.csv").write_text(f"step,{part}/loss_t/0.00-0.50,{part}/loss_t/0.50-1.00\n9,1,2\n")
        text = build(read_sources([str(folder) for folder in folders])).render()
        for part, note in notes.items():
            assert (note.lower() in text.lower()) == (part in parts)


@pytest.mark.parametrize(
    ("values", "log"), [([1, 20], True), ([1, 5], False), ([0, 20], False), ([-1, 3], False), ([np.nan], False)]
)
def test_axes_are_logarithmic_where_that_helps(values, log):
    assert figures.spans_decades(np.array(values, float)) == log


def test_names_are_no_markup_of_plotly():
    (style,) = figures.styles(["<a href='https://x'>&lt;"])
    figure = figures.curves([(style, Curve(np.arange(3), np.arange(3.0)))])
    assert figure.data[0].name == "&lt;a href='https://x'>&amp;lt;"
