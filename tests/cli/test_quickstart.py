"""The quickstart from end to end, with a plan of a few steps."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from imagen_lightning.cli import quickstart
from imagen_lightning.data import shapes
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import load

PLAN = {
    "steps": {"base": 4, "sr": 4},
    "precision": {"base": "bf16-mixed", "sr": "32-true"},
    "step_seconds": {"base": 1.0, "sr": 1.0},
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(quickstart, "NUM_CAPTIONS", 24)
    monkeypatch.setattr(quickstart, "_time_a_step", lambda stage: (2000, {"32-true": 100.0, "bf16-mixed": 90.0}))


def test_plan_keeps_to_the_time(monkeypatch):
    seconds_in = {"base": {"32-true": 1.0, "bf16-mixed": 0.5}, "sr": {"32-true": 0.25, "bf16-mixed": 0.24}}
    monkeypatch.setattr(quickstart, "_time_a_step", lambda stage: (2000, seconds_in[stage]))
    plan = quickstart._make_plan(900, 0)
    assert plan["precision"] == {"base": "bf16-mixed", "sr": "32-true"}  # bf16 only where it is clearly faster
    used = plan["steps"]["base"] * 0.5 + plan["steps"]["sr"] * 0.25
    assert 900 - quickstart.OVERHEAD_SECONDS - 40 < used <= 900 - quickstart.OVERHEAD_SECONDS
    assert quickstart._make_plan(90_000, 0)["steps"] == {"base": 2000, "sr": 2000}


def test_steps_are_timed_in_each_precision(monkeypatch):
    monkeypatch.setattr(quickstart, "CALIBRATION_STEPS", 3)
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    steps, seconds_in = quickstart.calibrate("base")
    recipe = yaml.safe_load((Path(__file__).parents[2] / "experiments/quickstart/base.yaml").read_text())
    assert steps == recipe["trainer"]["max_steps"]
    assert set(seconds_in) == {"32-true", "bf16-mixed"}
    assert all(0 < seconds < 60 for seconds in seconds_in.values())


def test_last_stage_makes_up_for_lost_time():
    def left(seconds):
        return quickstart._fitting({"steps": {"sr": 800}, "step_seconds": {"sr": 0.2}}, "sr", seconds)

    assert [left(1000), left(161), left(120), left(10), left(-5)] == [800, 800, 600, 400, 400]


def test_captions_are_never_trained_on():
    captions = quickstart._captions(0)
    assert len(captions) == 200
    unseen = [shapes.parse_caption(caption).held_out for caption in captions]
    assert sum(unseen) == 100


def test_from_nothing_to_pictures_and_again(short, tmp_path, capfd, monkeypatch):
    out = tmp_path / "quickstart"
    monkeypatch.setattr(quickstart, "_make_plan", lambda seconds, seed: {**PLAN, "seed": seed})
    # the recipe's warm-up is longer than four steps, which a cosine schedule refuses
    original = quickstart._run
    monkeypatch.setattr(
        quickstart,
        "_run",
        lambda verb, *rest: original(
            verb, *rest, *(["--model.init_args.optimization.warmup_steps=1"] if verb == "fit" else [])
        ),
    )
    assert quickstart.main(["--out", str(out), "--seed", "3"]) == 0
    printed = capfd.readouterr().out
    assert "$ imagen-lightning fit --config experiments/quickstart/base.yaml" in printed
    assert "$ imagen-lightning sample" in printed
    assert {"base", "sr", "cascade", "samples", "samples.png", "quickstart.json", "caption_accuracy.json"} <= {
        path.name for path in out.iterdir()
    }
    for stage in ("base", "sr"):
        assert (out / stage / "config.yaml").exists()
        assert (out / stage / "metrics.csv").exists()
        assert (out / stage / "checkpoints" / "step-4.ckpt").exists()
    rates = json.loads((out / "caption_accuracy.json").read_text())["rates"]
    assert set(rates) == {"all captions", "seen pairs", "unseen pairs"}
    assert Image.open(out / "samples.png").width > 6 * 160
    assert f"The report, to open in a browser: {out / 'report.html'}" in printed
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("super-resolution 16 → 64 px", "95% Wilson", "held-out captions are shown"))
    (row,) = load(out / "samples").rows
    values = {value["metric"]: value for value in row.values}
    for kind, words in (("all captions", ""), ("unseen pairs", ", unseen pairs"), ("seen pairs", ", seen pairs")):
        assert values[f"caption accuracy{words}"]["value"] == pytest.approx(rates[kind]["all"])
    for name in ("color", "shape", "relation"):
        assert values[f"caption accuracy, {name}"]["value"] == pytest.approx(rates["all captions"][name])

    assert quickstart.main(["--out", str(out), "--seed", "3"]) == 0
    assert "$ imagen-lightning" not in capfd.readouterr().out  # nothing was left to do
    with pytest.raises(InputError, match="begun with --seed 3"):
        quickstart.main(["--out", str(out), "--seed", "4"])


def test_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no quickstart"):
        quickstart.main(["--out", str(tmp_path)])
    with pytest.raises(InputError, match="'1' is outside"):
        quickstart.main(["--out", str(tmp_path / "new"), "--minutes", "1"])
