"""Sweep files are read as W&B reads them, and what is not known is refused by name."""

from pathlib import Path

import pytest
import yaml

from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.command import arguments_of, environment, expand, in_folder, own_command
from imagen_lightning.sweeps.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Normal,
    QUniform,
    Uniform,
)
from imagen_lightning.sweeps.file import read_sweep

LEAST = {
    "program": "train.py",
    "method": "random",
    "metric": {"name": "loss"},
    "parameters": {"x": {"value": 1}},
}


@pytest.fixture
def read(tmp_path):
    def read(text=None, **content):
        path = tmp_path / "tried.yaml"
        path.write_text(yaml.safe_dump(LEAST | content, sort_keys=False) if text is None else text)
        return read_sweep(path)

    return read


def test_distributions_said_and_implied(read):
    sweep = read(
        parameters={
            "constant": {"value": "a"},
            "said": {"distribution": "constant", "value": 2},
            "categorical": {"values": [0, "b", True, [1, 2]]},
            "integers": {"min": 1, "max": 4},
            "reals": {"min": 1, "max": 4.0},
            "uniform": {"distribution": "uniform", "min": 1, "max": 4},
            "int_uniform": {"distribution": "int_uniform", "min": 1, "max": 4},
            "steps": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5},
            "normal": {"distribution": "normal", "mu": 1, "sigma": 2},
            "log": {"distribution": "log_uniform_values", "min": 0.001, "max": 1},
            "model": {"parameters": {"init_args.seed": {"value": 3}, "network": {"parameters": {"dim": {"value": 8}}}}},
        }
    )
    found = {parameter.name: parameter.distribution for parameter in sweep.parameters}
    assert list(found.values()) == [
        *(Constant("a"), Constant(2), Categorical((0, "b", True, [1, 2])), IntUniform(1, 4), Uniform(1, 4)),
        *(Uniform(1, 4), IntUniform(1, 4), QUniform(0, 10, 5), Normal(1, 2), LogUniform(0.001, 1)),
        *(Constant(3), Constant(8)),
    ]
    assert list(found)[-2:] == ["model.init_args.seed", "model.network.dim"]
    assert sweep.name == "tried"
    assert not sweep.metric.maximize


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"methd": "grid"}, "'methd' is not supported; did you mean method?"),
        ({"method": "custom"}, "method is 'custom'"),
        ({"metric": None}, "metric needs a name"),
        ({"metric": {"name": "a", "goal": "min"}}, "metric.goal is 'min'"),
        ({"metric": {"name": "a", "target": 1}}, "'target' is not supported"),
        ({"parameters": {}}, "at least one parameter"),
        ({"parameters": {"x": 3}}, "parameters.x: give `value`"),
        ({"parameters": {"x y": {"value": 3}}}, "'x y' is not a parameter's name"),
        ({"parameters": {"x": {"values": []}}}, "at least one value"),
        ({"parameters": {"x": {"values": [1, 1.0]}}}, "value 1.0 stands twice"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.5]}}}, "probabilities are not supported"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "min 2 is not below max 1"),
        ({"parameters": {"x": {"min": 0.0, "max": "1e-4"}}}, "write 1.0e-4"),
        ({"parameters": {"x": {"min": 0, "max": 1, "mu": 3}}}, "parameters.x: 'mu' is not supported"),
        ({"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "above 0, not 0"),
        ({"parameters": {"x": {"distribution": "int_uniform", "min": 0, "max": 1.5}}}, "whole numbers"),
        ({"parameters": {"a.b": {"value": 1}, "a": {"parameters": {"b": {"value": 2}}}}}, "a.b is given twice"),
        ({"method": "grid", "parameters": {"x": {"min": 0.0, "max": 1.0}}}, "parameters.x: a grid needs values"),
        ({"early_terminate": {"type": "envelope"}}, "must be hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "needs min_iter"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "max_iter needs s"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, "eta is 1"),
        ({"program": None}, "program is missing"),
        ({"command": "run"}, "command must be a list"),
        ({"run_cap": 0}, "run_cap is 0"),
    ],
)
def test_what_is_refused(read, content, words):
    with pytest.raises(InputError) as error:
        read(**content)
    assert words in str(error.value)
    assert "tried.yaml: " in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("log_uniform", "inv_log_uniform", "inv_log_uniform_values", "q_log_uniform", "q_log_uniform_values"),
        *("q_normal", "log_normal", "q_log_normal", "beta", "q_beta", "categorical_w_probabilities"),
    ],
)
def test_other_distributions_are_refused_by_name(read, name):
    with pytest.raises(InputError, match=f"parameters.x: distribution '{name}' is not supported"):
        read(parameters={"x": {"distribution": name, "min": 1, "max": 2}})


def test_no_yaml_and_no_file(read):
    with pytest.raises(InputError, match="is not valid YAML"):
        read("a: [")
    with pytest.raises(InputError, match="holds keys such as"):
        read("- a")
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(Path("gone.yaml"))
    with pytest.raises(InputError, match="is not valid YAML"):
        read("a: !!python/object/apply:os.system ['true']")


def test_bands(read):
    def bands(**given):
        return read(early_terminate={"type": "hyperband", **given}).early_terminate.bands

    assert bands(min_iter=3)[:3] == (3, 9, 27)
    assert bands(min_iter=1, eta=1.5)[:5] == (1, 2, 3, 5, 7)
    assert bands(max_iter=27, s=2) == (3, 9)
    assert bands(max_iter=9, s=5) == (1, 3)


def test_quantiles():
    quantiles = [0.001, 0.25, 0.5, 0.75, 0.999]
    assert [IntUniform(1, 4).at(q) for q in quantiles] == [1, 2, 3, 4, 4]
    assert [Categorical(("a", "b")).at(q) for q in quantiles] == ["a", "a", "b", "b", "b"]
    assert Uniform(2.0, 4.0).at(0.25) == 2.5
    assert [QUniform(0.1, 0.3, 0.1).at(q) for q in (0.1, 0.5, 0.9)] == [0.1, 0.2, 0.3]
    assert [QUniform(0.1, 0.3, 0.1).nth(place) for place in range(QUniform(0.1, 0.3, 0.1).size)] == [0.1, 0.2, 0.3]
    assert [QUniform(0, 10, 5).at(q) for q in quantiles] == [0, 0, 5, 10, 10]  # half to even, as numpy rounds
    assert all(isinstance(QUniform(0, 10, 5).nth(place), int) for place in range(3))
    assert Normal(1.0, 2.0).at(0.5) == 1.0
    assert Normal(0.0, 1.0).at(0.975) == pytest.approx(1.959963984540054)
    assert LogUniform(1e-4, 1e-2).at(0.5) == pytest.approx(1e-3)


# ---- commands

VALUES = {"lr": 1e-05, "on": True, "off": False, "name": "a b", "model.seed": 3, "model.size": [1, 2]}


@pytest.fixture
def sweep(read):
    def sweep(*command):
        return read(
            command=list(command),
            parameters={
                **{name: {"value": VALUES[name]} for name in ("lr", "on", "off", "name")},
                "model": {"parameters": {name: {"value": VALUES[f"model.{name}"]} for name in ("seed", "size")}},
            },
        )

    return sweep


def test_macros(sweep, monkeypatch):
    monkeypatch.setenv("WHERE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)

    def words(*command):
        made = sweep(*command)
        return expand(made, arguments_of(made, VALUES))

    assert words("${env}", "${interpreter}", "${program}", "-x", 3) == ["/usr/bin/env", "python", "train.py", "-x", "3"]
    model = "{'seed': 3, 'size': [1, 2]}"
    assert words("${args}") == ["--lr=1e-05", "--on=True", "--off=False", "--name=a b", f"--model={model}"]
    assert words("${args_no_hyphens}")[:2] == ["lr=1e-05", "on=True"]
    assert words("${args_no_boolean_flags}") == ["--lr=1e-05", "--on", "--name=a b", f"--model={model}"]
    assert words("${envvar:WHERE}/${envvar:NOWHERE}") == ["here/NOWHERE"]
    assert words("a${args}") == ["a${args}"]  # inside of a word W&B replaces nothing
    with pytest.raises(InputError, match=r"\$\{argz\}, which is not supported"):
        words("${argz}")


def test_the_command_is_what_the_agent_would_run(sweep, monkeypatch):
    """Against W&B's own functions, and the loop of its agent over their words."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("WHERE", "here")
    given = [
        *("${env}", "${interpreter}", "${program}", "fit", "${args}", "${args_no_hyphens}", "${args_no_equals}"),
        *("${args_no_boolean_flags}", "${args_json}", "${args_append_hydra}", "${args_override_hydra}"),
        *("--where=${envvar:WHERE}", "--no=${envvar:NOWHERE_AT_ALL}", "a${args}"),
    ]
    made = sweep(*given)
    arguments = arguments_of(made, VALUES)
    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in arguments.items()}})
    macros |= {"interpreter": ["python"], "program": ["train.py"], "env": ["/usr/bin/env"]}
    expected = []
    for word in utils.create_sweep_command(list(given)):
        expected += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    assert expand(made, arguments) == expected


def test_a_trial_gets_its_folder():
    place, samples = Path("/o/trials/0003"), Path("/o/samples")
    fit = ["/usr/bin/env", "imagen-lightning", "fit", "--config", "a.yaml"]
    assert in_folder(fit, place, samples) == [*fit, "--run", "/o/trials/0003", "--resume"]
    module = ["python", "-m", "imagen_lightning", "fit"]
    assert own_command(module) == ("fit", [])
    evaluate = ["imagen-lightning", "evaluate", "c"]
    assert in_folder(evaluate, place, samples)[3:] == ["--out", "/o/trials/0003", "--samples", "/o/samples"]
    assert in_folder(["python", "train.py", "fit"], place, samples) == ["python", "train.py", "fit"]
    with pytest.raises(InputError, match="not 'report'"):
        in_folder(["imagen-lightning", "report"], place, samples)


def test_a_trial_is_no_run_of_an_agent_around_it(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = environment(Path("/o/trials/0003"), "name", 2, "GPU-1")
    assert "WANDB_SWEEP_ID" not in made
    assert (made["OMP_NUM_THREADS"], made["CUDA_VISIBLE_DEVICES"], made["WANDB_RUN_GROUP"]) == ("2", "GPU-1", "name")
    assert made["IMAGEN_LIGHTNING_RUN"] == "/o/trials/0003"
