"""Callbacks and loggers as a YAML names them."""

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from imagen_lightning import callbacks
from imagen_lightning.components import describe_args

NAMES = ["EMA", "Checkpoint", "FiniteLoss", "NoiseLevelLoss", "SampleGrid", "SkippedSamples", "Throughput"]


@pytest.mark.parametrize("name", [*NAMES, "RunCSVLogger"])
def test_a_yaml_makes_it_and_gets_it_back(name, tmp_path):
    given = {"SampleGrid": {"prompts": ["a", "b"], "guidance": 2.5}, "RunCSVLogger": {"run_dir": str(tmp_path)}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=Logger if name == "RunCSVLogger" else Callback)
    item = {"class_path": f"imagen_lightning.callbacks.{name}", "init_args": given.get(name, {})}
    config = parser.parse_object({"part": item})
    again = yaml.safe_load(parser.dump(config, skip_none=False))["part"]
    made = parser.instantiate_classes(config).part
    assert type(made) is getattr(callbacks, name)
    assert describe_args(made) == (again.get("init_args") or {})
    assert describe_args(made).items() >= given.get(name, {}).items()
