"""What differs between configurations."""

import pytest
import yaml

from imagen_lightning.errors import InputError
from imagen_lightning.report.differences import differing, flatten


def test_classes_and_their_arguments_are_one_level():
    config = {
        "model": {
            "class_path": "imagen_lightning.stages.BaseStage",
            "init_args": {
                "image_size": 16,
                "network": {"class_path": "my.Net", "init_args": {"dim": 8, "wide": [1, 2]}},
            },
        },
        "trainer": {
            "callbacks": [{"class_path": "a.B", "init_args": {"n": 1}}, {"class_path": "a.C", "init_args": {}}]
        },
        "data": None,
        "empty": {},
    }
    assert flatten(config) == {
        "model": "imagen_lightning.stages.BaseStage",
        "model.image_size": 16,
        "model.network": "my.Net",
        "model.network.dim": 8,
        "model.network.wide": [1, 2],
        "trainer.callbacks.0": "a.B",
        "trainer.callbacks.0.n": 1,
        "trainer.callbacks.1": "a.C",
        "data": None,
        "empty": {},
    }


def test_only_what_differs_and_not_where_the_run_lies(make):
    first, second = make.configuration(lr=1e-3), make.configuration(lr=1e-4, cond_drop=True)
    first["run"], second["run"] = "runs/a", "runs/b"
    second["trainer"]["default_root_dir"] = "elsewhere"
    second["data"]["class_path"] = "imagen_lightning.data.LaionDataModule"
    assert differing([first, second]) == {
        "model.optimization.optimizer.lr": ["0.001", "0.0001"],
        "data": ["ShapesDataModule", "LaionDataModule"],
        "model.cond_drop": ["—", "true"],
    }
    assert differing([first, first]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "\n".join(["a0: &a0 [x, x]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))]),
    ],
)
def test_endless_configurations_are_refused(text):
    with pytest.raises(InputError, match="more than 20000 entries"):
        flatten(yaml.safe_load(text))
