"""Any JSON value that a sweep gives arrives in the configuration of `fit` as what it is."""

import datetime
import re
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from imagen_lightning.sweeps.command import arguments_of, expand, own_command
from imagen_lightning.sweeps.file import read_sweep
from imagen_lightning.sweeps.search import sampler, space, values_of

CLASS = "taking_anything.TakingAnything"
STAGE = {
    "model": {
        "class_path": "imagen_lightning.stages.BaseStage",
        "init_args": {
            "image_size": 8,
            "network": {
                "class_path": "imagen_lightning.networks.UNet",
                "init_args": {"dim": 8, "multipliers": [1], "num_blocks": 1, "attention": [False], "text_dim": 8},
            },
        },
    },
    "data": {"class_path": CLASS},
}
# Texts that YAML would read as something else, or break. Not U+0085: at keys of any type, where jsonargparse reads a
# text as YAML once more, it becomes a space.
TEXTS = st.one_of(
    st.sampled_from(
        [
            *("yes", "no", "null", "None", "~", "true", "12", "1e-5", "0x1f", "1_000", "2020-01-01", "1:30", ".inf"),
            *("[1]", "{a: 1}", "a: b", "- a", "#c", "it's", 'say "so"', "a\nb", "\ttab", " blank ", "", "*a", "&a"),
            *("!t", "%d", "\u2028", "\x7f", "\ufeff", "\U0001f600", "$HOME", "${args}", "\\n", "--x", "a=b"),
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x85"), max_size=8),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 2**60, 1e-5, 1e16, 1e300, -0.0, 5e-324, 0.1]),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
FEW = settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def arrived():
    """Parses words of `fit` by its own parser; what the data module would be given."""
    from imagen_lightning.cli import fit

    class Parsed(fit.StageCLI):
        def instantiate_classes(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setattr("sys.argv", sys.argv[:1])
        keep = {"save_config_callback": None, "trainer_defaults": fit.TRAINER_DEFAULTS, "seed_everything_default": 0}
        cli = Parsed(
            run=False, parser_class=fit.Parser, auto_configure_optimizers=False, **keep, args=[f"--config={STAGE}"]
        )
        yield lambda words: cli.parser.parse_args([f"--config={STAGE}", *words])["data"]["init_args"].as_dict()


def trial(folder, parameters):
    """The words of a sweep's first trial, from the file to the command."""
    path = folder / "sweep.yaml"
    content = {
        **{"program": "imagen-lightning", "command": ["${program}", "fit", "${args}"], "method": "grid"},
        **{"metric": {"name": "train/loss"}, "parameters": parameters},
    }
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    sweep = read_sweep(path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler(sweep, "tpe", 0))
    values = values_of(sweep, study.ask(space(sweep)).params)
    return own_command(expand(sweep, arguments_of(sweep, values)))[1]


def is_exact(value):
    """Whether `fit` takes the value from a stage's YAML as it is: at keys of any type it reads texts as YAML again."""
    if isinstance(value, str):
        if re.fullmatch(r"[-+.\d_]+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
            return False  # numbers, also those that YAML 1.1 does not know
        try:
            return value.strip() == "" or isinstance(yaml_load(value), str | datetime.date)
        except (yaml.YAMLError, ValueError):
            return True
    children = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return all(map(is_exact, children))


def yaml_load(text):
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@FEW
@given(value=VALUES, text=TEXTS, number=NUMBERS)
@example(value={"decay": 0.9, "device": None}, text="null", number=1e-05)
@example(value=[None, [None], {"a": None, "b": "it's", "c": 'a"b\n', "d": 1e-05}], text="yes", number=1)
def test_a_whole_mapping(arrived, tmp_path, value, text, number):
    given_ = {"value": number, "mapping": {"key": value}, "entries": [value, number], "text": text, "maybe": None}
    found = arrived(trial(tmp_path, {"data.init_args": {"values": [given_]}}))
    assert found["text"] == text
    assert found["maybe"] is None
    assert repr(found["value"]) == repr(number)
    if is_exact(value):
        stage = tmp_path / "stage.yaml"
        stage.write_text(
            yaml.safe_dump({"data": {"init_args": given_}}, allow_unicode=True, sort_keys=False), encoding="utf-8"
        )
        assert repr(found) == repr(arrived([f"--config={stage}"]))  # as a stage's YAML says it
        assert repr(found["mapping"]) == repr({"key": value})
        assert repr(found["entries"]) == repr([value, number])


@FEW
@given(value=VALUES, text=TEXTS)
@example(value=None, text="null")
@example(value={}, text="a dog: brown")
@example(value={}, text="#c")
def test_keys_one_by_one(arrived, tmp_path, value, text):
    parameters = {"data.init_args.text": {"values": [text]}, "data.init_args.value": {"value": value}}
    nested = {"maybe": {"value": None}, "mapping": {"values": [{"key": [value]}]}}
    parameters["data"] = {"parameters": {"init_args": {"parameters": nested}}}
    found = arrived(trial(tmp_path, parameters))
    assert found["text"] == text
    assert found["maybe"] is None
    if is_exact(value):
        assert repr(found["value"]) == repr(value)
        assert repr(found["mapping"]) == repr({"key": [value]})


def test_choices_that_look_alike_stay_apart(tmp_path):
    choices = ["[1, 2]", [1, 2], '"[1, 2]"', "null", None, {"a": 1}, '{"a": 1}']
    path = tmp_path / "sweep.yaml"
    content = {"program": "p", "method": "grid", "metric": {"name": "loss"}, "parameters": {"x": {"values": choices}}}
    path.write_text(yaml.safe_dump(content))
    sweep = read_sweep(path)
    study = optuna.create_study(sampler=sampler(sweep, "tpe", 0))
    assert [values_of(sweep, study.ask(space(sweep)).params)["x"] for _ in choices] == choices
