"""What trials try, against the file's distributions, and when W&B's hyperband stops them."""

import math
import random
import subprocess
import sys

import numpy as np
import optuna
import pytest
import yaml
from scipy import stats

from imagen_lightning.sweeps.file import Hyperband, read_sweep
from imagen_lightning.sweeps.search import (
    HyperbandBands,
    grid_point,
    grid_size,
    open_study,
    sampler,
    space,
    stops,
    values_of,
)

PARAMETERS = {
    "kind": {"values": ["a", "b", [1, 2]]},
    "count": {"min": 1, "max": 4},
    "real": {"min": 0.0, "max": 2.0},
    "steps": {"distribution": "q_uniform", "min": 0.15, "max": 0.85, "q": 0.2},
    "level": {"distribution": "normal", "mu": 1, "sigma": 2},
    "lr": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.01},
    "fixed": {"value": 7},
}


@pytest.fixture
def read(tmp_path):
    def read(**content):
        base = {"program": "p", "method": "random", "metric": {"name": "loss"}, "parameters": PARAMETERS}
        path = tmp_path / "tried.yaml"
        path.write_text(yaml.safe_dump(base | content, sort_keys=False))
        return read_sweep(path)

    return read


def drawn(sweep, count, seed=0):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler(sweep, "tpe", seed))
    return [values_of(sweep, study.ask(space(sweep)).params) for _ in range(count)]


def test_random_draws_by_the_file_s_distributions(read):
    found = drawn(read(), 2000)

    def of(name):
        return np.array([values[name] for values in found], dtype=float)

    assert stats.kstest(of("real"), stats.uniform(0, 2).cdf).pvalue > 0.01
    assert stats.kstest(of("level"), stats.norm(1, 2).cdf).pvalue > 0.01
    assert stats.kstest(np.log(of("lr")), stats.uniform(math.log(1e-4), math.log(100)).cdf).pvalue > 0.01
    assert stats.chisquare(np.unique(of("count"), return_counts=True)[1]).pvalue > 0.01
    # round(uniform(0.15, 0.85) / 0.2) * 0.2 changes its value at 0.3, 0.5 and 0.7
    levels, counts = np.unique(of("steps"), return_counts=True)
    assert levels.tolist() == [0.2, 0.4, 0.6, 0.8]
    assert stats.chisquare(counts, np.array([0.15, 0.2, 0.2, 0.15]) / 0.7 * len(found)).pvalue > 0.01
    kinds = [str(values["kind"]) for values in found]
    assert stats.chisquare(np.unique(kinds, return_counts=True)[1]).pvalue > 0.01
    assert {values["fixed"] for values in found} == {7}
    assert abs(np.corrcoef(of("real"), of("level"))[0, 1]) < 0.1
    assert drawn(read(), 3) == found[:3]
    assert drawn(read(), 3, seed=1) != found[:3]


def test_a_grid_is_exact(read):
    sweep = read(method="grid", parameters={name: PARAMETERS[name] for name in ("kind", "count", "steps", "fixed")})
    assert grid_size(sweep) == 3 * 4 * 4
    found = drawn(sweep, 48)
    assert [values["steps"] for values in found[:5]] == [0.2, 0.4, 0.6, 0.8, 0.2]  # the last one varies fastest
    assert len({str(values) for values in found}) == 48
    assert grid_point(sweep, 47) == {"kind": "[1, 2]", "count": 4, "steps": 0.8}
    assert found[47]["kind"] == [1, 2]


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_bayes_finds_a_minimum(read, kind):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = read(method="bayes", parameters={"real": PARAMETERS["real"], "level": PARAMETERS["level"]})
    study = optuna.create_study(sampler=sampler(sweep, kind, 0))
    for _ in range(25):
        trial = study.ask(space(sweep))
        values = values_of(sweep, trial.params)
        study.tell(trial, (values["real"] - 1.3) ** 2 + (values["level"] - 2) ** 2)
    late = sorted(trial.value for trial in study.trials[10:])
    early = sorted(trial.value for trial in study.trials[:10])
    assert late[len(late) // 2] < early[len(early) // 2]
    assert study.best_value < 0.3


def test_the_study_says_what_it_is(read, tmp_path):
    sweep = read(metric={"name": "acc", "goal": "maximize"}, early_terminate={"type": "hyperband", "min_iter": 2})
    study = open_study(sweep, f"sqlite:///{tmp_path / 's.db'}")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.metric_names == ["acc"]
    assert isinstance(study.pruner, HyperbandBands)
    assert study.study_name == "tried"


# ---- hyperband

RULE = Hyperband((2, 4, 8), 2.0, strict=True)


def test_bands_compare_runs():
    good, bad, middle = [5, 1, 1, 1], [5, 9], [5, 4]
    assert not stops(RULE, bad[:1], [good, bad, middle])  # no band yet
    assert stops(RULE, bad, [good, bad, middle])
    assert not stops(RULE, middle, [good, bad, middle])  # as good as the best half
    assert not stops(RULE, good, [good, bad, middle])
    assert not stops(RULE, bad, [bad])  # nothing to compare with


def test_strict_looks_at_the_band_itself():
    runs = [[3, 3], [3, 3], [1, 4]]
    assert stops(RULE, runs[2], runs)
    assert not stops(Hyperband((2, 4), 2.0, strict=False), runs[2], runs)


def test_a_maximum_and_what_is_no_number():
    study = optuna.create_study(direction="maximize", pruner=HyperbandBands(RULE))
    verdicts = []
    for values in ([1, 5, 5], [1, 4, 4], [1, math.nan, 2, 2]):
        trial = study.ask()
        for step, value in enumerate(values, 1):
            trial.report(value, step)
        verdicts.append(trial.should_prune())
    assert verdicts == [False, False, True]


def test_it_stops_what_wandb_stops():
    """Against W&B's own rule, where its package is installed."""
    sweeps = pytest.importorskip("sweeps", reason="W&B's package of sweeps (wandb[sweeps]) is not installed")
    draw = random.Random(0)
    for goal in ("minimize", "maximize"):
        for early in ({"min_iter": 2, "eta": 2}, {"max_iter": 9, "s": 2, "eta": 3}, {"min_iter": 3, "strict": False}):
            histories = [[draw.random() for _ in range(draw.randint(1, 12))] for _ in range(9)]
            config = {
                "method": "random",
                "metric": {"name": "loss", "goal": goal},
                "parameters": {"x": {"value": 1}},
                "early_terminate": {"type": "hyperband", **early},
            }
            runs = [
                sweeps.SweepRun(name=str(n), state=sweeps.RunState.running, history=[{"loss": v} for v in history])
                for n, history in enumerate(histories)
            ]
            theirs = {run.name for run in sweeps.stop_runs(config, runs)}
            eta = early.get("eta", 3)
            bands = tuple(early["min_iter"] * eta**k for k in range(6)) if "min_iter" in early else (1, 3)
            rule = Hyperband(bands, float(eta), early.get("strict", True))
            signed = [[-v if goal == "maximize" else v for v in history] for history in histories]
            assert {str(n) for n, history in enumerate(signed) if stops(rule, history, signed)} == theirs


def test_processes_that_make_a_study_at_once(tmp_path):
    """Each opens the database in the same moment, when none has made its tables."""
    program = (
        "import sys; from imagen_lightning.sweeps.search import storage_of; print('ready', flush=True);"
        "sys.stdin.readline(); storage_of(sys.argv[1]).get_all_studies()"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'study.db'}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
