"""Whole sweeps of a fast program: grids, workers, crashes, kills, Ctrl-C, early stops, machines that share a study."""

import json
import os
import signal
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from imagen_lightning.sweeps.file import read_sweep
from imagen_lightning.sweeps.folder import opened
from imagen_lightning.sweeps.search import open_study

PROGRAM = Path(__file__).with_name("program.py")
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def states(trials):
    return [trial.state for trial in trials]


def test_a_grid_tries_every_combination_once(sweeps):
    file = sweeps.write(parameters={"x": {"values": [1, 2, 3]}, "y": {"values": ["a", "b"]}, "steps": {"value": 3}})
    output = sweeps.run(file, "--workers", "3")
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE] * 6
    tried = sorted((trial.params["x"], trial.params["y"]) for trial in trials)
    assert tried == [(x, y) for x in (1, 2, 3) for y in "ab"]
    assert all(trial.value == pytest.approx((trial.params["x"] - 3) ** 2 + 1 / 3) for trial in trials)
    assert trials[0].intermediate_values == {step: pytest.approx(4 + 1 / step) for step in (1, 2, 3)}
    assert all(len(sweeps.starts(number)) == 1 for number in range(6))
    assert "6 trials: 6 finished\nbest loss 0.333333: trial 4" in output
    assert "6 trials: 6 finished" in sweeps.run(file)  # nothing is left to do
    assert all(len(sweeps.starts(number)) == 1 for number in range(6))


def test_a_crash_is_recorded_and_stops_nothing(sweeps):
    sweeps.run(sweeps.write(parameters={"x": {"values": [1, 2, 3]}, "crash": {"value": 2}}))
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE, FAIL, COMPLETE]
    problem = trials[1].user_attrs["problem"]
    assert problem.startswith(f"exit code 1; the end of {sweeps.out / 'logs' / '0001.log'}:\n")
    assert problem.endswith("RuntimeError: x is 2.0")


def test_a_program_that_is_not_there_is_refused(sweeps):
    file = sweeps.write(program="gone", command=["${program}"], parameters={"x": {"value": 1}})
    assert "there is no program 'gone'" in sweeps.run(file, code=2)
    assert not sweeps.out.exists()


def test_a_metric_that_another_program_does_not_log_costs_one_trial(sweeps):
    file = sweeps.write(metric={"name": "losss"}, parameters={"x": {"values": [1, 2]}, "pause": {"value": 0.3}})
    output = sweeps.run(file, code=1)
    assert "metric 'losss' has not been logged yet; did you mean loss?" in output
    trials = sweeps.trials()
    assert [trial.user_attrs["problem"] for trial in trials] == [
        "metric 'losss' is missing: did you mean loss? it logged loss"
    ]
    assert "1 trial failed; logs: " in output
    assert str(sweeps.out / "logs" / "0000.log") in output


def test_the_exit_code_is_1_where_all_trials_failed(sweeps):
    file = sweeps.write(parameters={"x": {"values": [1, 1.5]}, "steps": {"value": "many"}})
    output = sweeps.run(file, code=1)
    assert "2 trials failed; logs: " in output
    assert str(sweeps.out / "logs" / "0001.log") in output
    sweeps.run(file, code=1)  # nothing is left to do, and that is as bad


def test_a_corrected_sweep_is_begun(sweeps):
    """A refused file leaves nothing, and a study without a trial takes another file."""
    wrong = sweeps.write(program="gone", command=["${program}"])
    sweeps.run(wrong, code=2)
    assert not sweeps.out.exists()
    sweeps.run(sweeps.write(), "--study", "nosuch://x/y", code=2)
    assert not sweeps.out.exists()
    # As a process leaves it that is killed between the study and the first trial.
    first = read_sweep(sweeps.write(parameters={"x": {"value": 7}}))
    with opened(sweeps.out, first, None) as folder:
        open_study(first, folder.study)
    sweeps.run(sweeps.write(metric={"name": "loss", "goal": "maximize"}, parameters={"x": {"value": 2}}))
    assert [trial.user_attrs["values"] for trial in sweeps.trials()] == [{"x": 2}]
    assert json.loads((sweeps.out / "sweep.json").read_text())["metric"] == "loss"
    assert "was begun with" in sweeps.run(sweeps.write(parameters={"x": {"value": 3}}), code=2)  # it has trials now
    file = sweeps.write()
    file.write_text(file.read_text().replace("name: tried", "name: other"))
    assert "holds trials of the sweep 'tried'" in sweeps.run(file, code=2)


def test_a_killed_sweep_goes_on_and_loses_nothing(sweeps, wait):
    file = sweeps.write(parameters={"x": {"values": [1, 2, 3]}, "steps": {"value": 30}, "pause": {"value": 0.1}})
    process = sweeps.start(file, "--workers", "2")
    rows = sweeps.out / "trials" / "0001" / "metrics.csv"
    wait(lambda: rows.exists() and len(rows.read_text().splitlines()) > 18)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(sweeps.trials()) == [RUNNING, RUNNING]
    before = len(rows.read_text().splitlines())
    output = sweeps.run(file, "--workers", "2")
    assert "trial 0 resumes" in output
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE] * 3
    assert [len(sweeps.starts(number)) for number in range(3)] == [2, 2, 1]
    lines = rows.read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == [str(step) for step in range(1, 31)]  # no two wrote at once
    assert before > 18
    assert len(trials[1].intermediate_values) == 30
    assert all(trial.user_attrs["seconds"] >= 0.1 * 30 for trial in trials)  # of both starts


def test_a_sweep_killed_while_it_begins_a_trial_leaves_no_hole(sweeps):
    file = sweeps.write(parameters={"x": {"values": [1, 2, 3]}, "y": {"values": [0, 1]}})
    sweeps.run(file, "--trials", "1")
    study = optuna.load_study(study_name="tried", storage=f"sqlite:///{sweeps.out / 'study.db'}")
    study.ask()  # number 1, without its parameters
    sweeps.run(file)
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE] * 6
    assert len({(trial.params["x"], trial.params["y"]) for trial in trials}) == 6


def test_a_killed_trial_goes_on_where_it_was(sweeps, wait):
    file = sweeps.write(parameters={"x": {"values": [1, 2]}, "steps": {"value": 20}, "pause": {"value": 0.1}})
    process = sweeps.start(file)
    wait(lambda: sweeps.starts(0) and (sweeps.out / "trials/0000/metrics.csv").read_text().count("\n") > 4)
    os.kill(int(sweeps.starts(0)[0][0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert "trial 0 was ended by SIGKILL" in output
    assert states(sweeps.trials()) == [COMPLETE, COMPLETE]
    assert len(sweeps.starts(0)) == 2


def test_what_is_killed_over_and_over_is_given_up(sweeps):
    script = sweeps.folder / "suicide.py"
    script.write_text("import os\nprint('so much memory', flush=True)\nos.kill(os.getpid(), 9)\n")
    sweeps.run(sweeps.write(program=str(script), parameters={"x": {"values": [1, 2]}}), code=1)
    trials = sweeps.trials()
    assert states(trials) == [FAIL, FAIL]
    assert "ended by SIGKILL 3 times" in trials[0].user_attrs["problem"]
    assert trials[0].user_attrs["problem"].endswith("so much memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_same_command_goes_on(sweeps, wait, number):
    file = sweeps.write(parameters={"x": {"values": [1, 2]}, "steps": {"value": 25}, "pause": {"value": 0.1}})
    process = sweeps.start(file)
    rows = sweeps.out / "trials" / "0000" / "metrics.csv"
    wait(lambda: rows.exists() and rows.read_text().count("\n") > 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "trial 0 is left to be resumed" in output
    assert "1 trial: 1 not finished" in output
    assert states(sweeps.trials()) == [RUNNING]
    sweeps.run(file)
    assert states(sweeps.trials()) == [COMPLETE, COMPLETE]
    assert len(rows.read_text().splitlines()) == 26


def test_hyperband_stops_what_is_worse(sweeps):
    file = sweeps.write(
        parameters={"x": {"values": [3, 3.2, 9]}, "steps": {"value": 40}, "pause": {"value": 0.05}},
        early_terminate={"type": "hyperband", "min_iter": 4, "eta": 2},
    )
    sweeps.run(file)
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE, COMPLETE, PRUNED]
    assert 4 <= len(trials[2].intermediate_values) < 40
    assert len(sweeps.starts(2)) == 1


def test_workers_share_the_cpu_or_are_pinned_to_gpus(sweeps):
    file = sweeps.write(parameters={"x": {"values": [1, 2, 3, 4]}, "pause": {"value": 0.2}})
    environment = {key: value for key, value in os.environ.items() if key == "PATH"}
    sweeps.run(file, "--workers", "2", CUDA_VISIBLE_DEVICES="4,GPU-7", OMP_NUM_THREADS="1", **environment)
    seen = [sweeps.starts(number)[0] for number in range(4)]
    assert {device for _, _, device in seen} == {"4", "GPU-7"}
    assert {threads for _, threads, _ in seen} == {"1"}


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_two_sweeps_share_a_study(sweeps, kind):
    study = f"sqlite:///{sweeps.folder}/shared.db" if kind == "sqlite" else str(sweeps.folder / "shared.log")
    file = sweeps.write(parameters={"x": {"values": list(range(8))}, "pause": {"value": 0.05}})
    first = sweeps.start(file, "--study", study, out=sweeps.folder / "one")
    second = sweeps.start(file, "--study", study, out=sweeps.folder / "two")
    for process in (first, second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    storage = study
    if kind == "journal":
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        storage = JournalStorage(JournalFileBackend(study))
    trials = [trial for trial in sweeps.trials(storage) if not trial.user_attrs.get("surplus")]
    assert sorted(trial.params["x"] for trial in trials) == list(range(8))
    assert states(trials) == [COMPLETE] * 8
    parts = [len(list((sweeps.folder / name / "trials").glob("*"))) for name in ("one", "two")]
    assert sum(parts) == 8
    assert min(parts) >= 1


def test_what_does_not_belong_together_is_refused(sweeps):
    file = sweeps.write(parameters={"x": {"value": 1}})
    sweeps.run(file)
    other = sweeps.write("other.yaml", parameters={"x": {"value": 2}})
    assert "was begun with parameters otherwise" in sweeps.run(other, code=2)
    assert "belongs to the study" in sweeps.run(file, "--study", "sqlite:///elsewhere.db", code=2)
    (sweeps.folder / "full").mkdir()
    (sweeps.folder / "full" / "notes").write_text("mine")
    assert "holds no sweep" in sweeps.run(file, out=sweeps.folder / "full", code=2)
    endless = sweeps.write("endless.yaml", method="random", parameters={"x": {"min": 0.0, "max": 1.0}})
    assert "give --trials N" in sweeps.run(endless, out=sweeps.folder / "endless", code=2)
    assert "cannot be opened" in sweeps.run(file, "--study", "nosuch://x/y", out=sweeps.folder / "odd", code=2)


def test_a_sweep_has_its_folder_alone(sweeps, wait):
    file = sweeps.write(parameters={"x": {"value": 1}, "steps": {"value": 60}, "pause": {"value": 0.1}})
    process = sweeps.start(file)
    wait(lambda: sweeps.starts(0))
    refused = sweeps.run(file, code=2)
    assert f"sweep folder {sweeps.out} is in use by process {process.pid} on " in refused
    assert "another --out" in refused
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_bayes_and_random_go_on_with_new_draws(sweeps, kind):
    method = {"method": "bayes", "run_cap": 4, "parameters": {"x": {"min": 0.0, "max": 6.0}, "steps": {"value": 1}}}
    file = sweeps.write(**method)
    sweeps.run(file, "--sampler", kind, "--trials", "3")
    sweeps.run(file, "--sampler", kind, "--trials", "6")
    trials = sweeps.trials()
    assert states(trials) == [COMPLETE] * 6
    assert len({trial.params["x"] for trial in trials}) == 6


def test_a_dry_run_prints_the_commands_and_makes_nothing(sweeps):
    file = sweeps.write(parameters={"x": {"values": [1, 2]}, "flag": {"value": True}})
    assert sweeps.run(file, "--dry-run").splitlines() == [
        f"/usr/bin/env python {PROGRAM} --x={x} --flag=True" for x in (1, 2)
    ]
    assert not sweeps.out.exists()
