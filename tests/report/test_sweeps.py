"""Sweeps on a report's page: trials, what mattered, seeds."""

import json
import math
import shutil

import optuna
import pytest
import yaml
from scipy import stats

from imagen_lightning.cli.main import main
from imagen_lightning.report import sweeps
from imagen_lightning.report.report import build
from imagen_lightning.report.runs import Problems
from imagen_lightning.report.seeds import Group, difference, groups, within
from imagen_lightning.report.sources import read_sources
from imagen_lightning.report.studies import read_sweep
from imagen_lightning.report.sweeps import verdict
from imagen_lightning.sweeps.file import read_sweep as read_file
from imagen_lightning.sweeps.folder import opened
from imagen_lightning.sweeps.search import open_study, space, values_of

METRICS = {"minimize": "val/loss", "maximize": "score"}
PARAMETERS = {
    "model.init_args.diffusion.parametrization": {
        "values": ["imagen_lightning.diffusion.X0", "imagen_lightning.diffusion.V"]
    },
    "seed": {"values": [0, 1, 2]},
}


@pytest.fixture
def sweep(tmp_path, make):
    """A sweep's folder with its study; `metric` gives a trial's value from its parameters, None for a failure."""

    def sweep(metric, name="tried", method="grid", parameters=PARAMETERS, goal="minimize", trials=6, runs=0):
        content = {
            **{"name": name, "program": "p", "method": method, "metric": {"name": METRICS[goal], "goal": goal}},
            "parameters": parameters,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        read = read_file(file)
        out = tmp_path / name
        with opened(out, read, None) as folder:
            study = open_study(read, folder.study)
            for number in range(trials):
                trial = study.ask(space(read))
                values = values_of(read, trial.params)
                trial.set_user_attr("values", values)
                trial.set_user_attr("folder", str(folder.trial(number)))
                value = metric(values)
                if value is None:
                    trial.set_user_attr("problem", "exit code 1; the end of <log>")
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, value)
                if number < runs:
                    make.run(folder.trial(number), samples={"steps": (500,)})
        return out

    return sweep


def clear(values):
    return (1.0 if values["model.init_args.diffusion.parametrization"].endswith("V") else 5.0) + 0.1 * values["seed"]


def noisy(values):
    return (1.0 if values["model.init_args.diffusion.parametrization"].endswith("V") else 1.1) + 2.0 * values["seed"]


def test_settings_are_compared_over_their_seeds(sweep):
    found = read_sweep(sweep(clear), Problems())
    assert [trial.value for trial in found.finished] == pytest.approx([1.0, 1.1, 1.2, 5.0, 5.1, 5.2])
    best, other = groups(found)
    assert best.values == {"model.init_args.diffusion.parametrization": "imagen_lightning.diffusion.V"}
    assert best.mean == pytest.approx(1.1)
    assert best.half == pytest.approx(4.302652729911275 * 0.1 / 3**0.5)  # t of 2 degrees of freedom
    assert within(best, other) is False
    assert any("beyond the seeds' spread" in line for line in verdict(found))
    found = read_sweep(sweep(noisy, "noisy"), Problems())
    assert any("within the seeds' spread" in line for line in verdict(found))


def test_welch_s_interval():
    one, other = Group({}, [1.0, 2.0, 4.0], None), Group({}, [2.0, 7.0, 9.0, 4.0], None)
    expected = stats.ttest_ind(one.metric, other.metric, equal_var=False).confidence_interval(0.95)
    assert difference(one, other) == pytest.approx((expected.low, expected.high))
    assert difference(one, Group({}, [1.0], None)) is None


def test_a_sweep_without_seeds_is_not_compared(sweep):
    parameters = {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0},
        "drop": {"min": 0.2, "max": 1.0},
    }
    folder = sweep(lambda v: v["drop"] + 0.001 * v["lr"], "free", "random", parameters, "maximize", 30)
    found = read_sweep(folder, Problems())
    assert groups(found) == []
    assert found.maximize
    assert found.finished[0].value == max(trial.value for trial in found.trials)
    assert sum(found.importance.values()) == pytest.approx(1.0)
    assert found.importance["drop"] > 0.8
    figure = sweeps.parallel(found)
    assert list(figure.layout.xaxis.ticktext) == ["lr (log)", "drop", "score"]
    assert len(figure.data) == 30
    strong = figure.data[-1]  # the best trial, on top
    assert strong.hovertext.startswith(f"trial {found.finished[0].number}: ")
    assert strong.y[2] == 1.0
    ticks = {note.text: note.y for note in figure.layout.annotations if note.x == 0}
    lines = sorted(math.log10(trial.values["lr"]) for trial in found.finished)
    assert ticks["1e-2"] == pytest.approx((-2 - lines[0]) / (lines[-1] - lines[0]))


@pytest.mark.parametrize(
    ("parameter", "label"),
    [
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-3}, "lr (log)"),
        ({"min": 1e-5, "max": 1.0}, "lr"),
        ({"values": [1e-5, 1e-4, 1e-3]}, "lr (log)"),
        ({"values": [1e-4, 1e-3]}, "lr"),
        ({"values": [0.0, 1e-3]}, "lr"),
    ],
)
def test_a_parameter_is_drawn_on_the_scale_it_was_searched_on(sweep, parameter, label):
    method = "random" if "min" in parameter else "grid"
    count = 8 if "min" in parameter else len(parameter["values"])
    found = read_sweep(sweep(lambda v: v["lr"], "scaled", method, {"lr": parameter}, trials=count), Problems())
    figure = sweeps.parallel(found)
    assert figure.layout.xaxis.ticktext[0] == label
    ticks = [note.y for note in figure.layout.annotations if note.x == 0]
    assert len(ticks) >= 2
    heights = sorted(trace.y[0] for trace in figure.data)
    assert (heights[0], heights[-1]) == (0, 1)
    if label.endswith("(log)"):
        lrs = sorted(math.log10(trial.values["lr"]) for trial in found.finished)
        assert heights == pytest.approx([(lr - lrs[0]) / (lrs[-1] - lrs[0]) for lr in lrs])


def test_without_two_seeds_chance_is_not_judged(sweep):
    parameters = {"lr": {"values": [1, 2]}}
    said = verdict(read_sweep(sweep(lambda v: v["lr"], "few", parameters=parameters, trials=2), Problems()))
    assert "cannot be told from these trials" in said[-1]
    assert not any("cannot be told" in line for line in verdict(read_sweep(sweep(clear), Problems())))


def test_the_page(sweep, tmp_path, capsys):
    folder = sweep(lambda v: None if v["seed"] == 2 else clear(v), runs=6)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "1 sweep, 4 runs" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert "<h1>tried</h1>" in text
    assert "6 trials: 4 finished, 2 failed. val/loss: less is better." in text
    for words in ("Trials, the best first", "Settings over their seeds", "exit code 1; the end of &lt;log&gt;"):
        assert words in text
    assert "What mattered" in text


def test_folders_that_share_a_study_are_one_sweep_and_broken_ones_are_noted(sweep, tmp_path):
    folder = sweep(clear)
    other = tmp_path / "machine"
    other.mkdir()
    shutil.copy(folder / "sweep.json", other)
    assert len(read_sources([folder, other]).sweeps) == 1
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(folder)
    assert len(read_sources([tmp_path / "moved"]).sweeps) == 1
    (tmp_path / "broken").mkdir()
    info = json.loads((other / "sweep.json").read_text())
    (tmp_path / "broken" / "sweep.json").write_text(json.dumps({**info, "study": str(tmp_path / "gone.log")}))
    found = read_sources([tmp_path / "moved", tmp_path / "broken"])
    assert len(found.sweeps) == 1
    assert "there is no journal" in found.problems.lines[0]


def test_it_draws_in_a_browser(sweep, tmp_path, visit):
    page = build(read_sources([sweep(clear, runs=2)]))
    path = tmp_path / "page.html"
    page.write(path)
    shown = visit(path)
    shown.wait_for_selector("#sweep-tried .plot .scatterlayer .trace", state="attached")
    assert shown.locator("#sweep-tried .plot").first.locator(".scatterlayer .trace").count() == 6
    assert shown.locator("#sweep-tried table").count() == 2
    assert shown.locator("#sweep-tried tbody tr").count() == 2 + 6
