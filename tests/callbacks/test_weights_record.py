"""What weights are: recorded where a run saves them, kept by cascades and adapters, never guessed."""

import json

import pytest

from imagen_lightning.callbacks import EMA
from imagen_lightning.cascade import Cascade
from imagen_lightning.cascade.origin import weights_kinds, weights_words
from imagen_lightning.finetuning import adapters
from imagen_lightning.finetuning.start import from_cascade
from imagen_lightning.networks import LoRA
from imagen_lightning.types import InputError

AVERAGED = {"kind": "ema", "decay": 0.9}


def joined(trainer, folder, weights_only=False):
    """The record of the stage of the run's checkpoint, once made a cascade, saved and loaded."""
    trainer.save_checkpoint(folder / "run.ckpt", weights_only=weights_only)
    Cascade.from_checkpoints([folder / "run.ckpt"]).save(folder / "cascade")
    (stage,) = Cascade.load(folder / "cascade").stages
    return stage.weights_record


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_run_with_an_average(fit, tmp_path, weights_only):
    stage, trainer = fit([EMA(0.9, device="cpu")], steps=2)
    assert stage.weights_record == AVERAGED  # in memory too
    assert joined(trainer, tmp_path, weights_only) == AVERAGED


def test_a_run_without_an_average(fit, tmp_path):
    _, trainer = fit([], steps=1)
    assert joined(trainer, tmp_path) == {"kind": "raw"}


def test_a_run_that_goes_on_without_the_average_has_raw_weights(fit, tmp_path, make_base):
    _, trainer = fit([EMA(0.9)], steps=1)
    assert joined(trainer, tmp_path) == AVERAGED
    tuned = from_cascade(str(tmp_path / "cascade"))
    assert tuned.weights_record == AVERAGED
    tuned.log = lambda *_, **__: None
    _, trainer = fit([], steps=1, stage=tuned, folder=tmp_path / "tuned")
    assert joined(trainer, tmp_path / "tuned") == {"kind": "raw"}
    (parent,) = json.loads((tmp_path / "tuned/cascade/cascade.json").read_text())["stages"][0]["origin"]["parents"]
    assert parent["weights"] == AVERAGED


def test_a_merged_adapter_names_both(fit, tmp_path, make_base):
    base = make_base()
    base.weights_record = {"kind": "imported"}
    Cascade([base]).save(tmp_path / "base")
    tuned = from_cascade(str(tmp_path / "base"), adapter=LoRA(rank=2))
    tuned.log = lambda *_, **__: None
    _, trainer = fit([EMA(0.9)], steps=1, stage=tuned)
    merged = {"kind": "merged", "base": {"kind": "imported"}, "adapters": [AVERAGED]}
    assert joined(trainer, tmp_path) == merged
    adapters.save(adapters.of_run(tmp_path / "run.ckpt"), tmp_path / "adapter")
    loaded = Cascade.load(tmp_path / "base")
    adapters.apply(loaded.stages[0], [(tmp_path / "adapter", 0.5)])
    assert loaded.stages[0].weights_record == merged
    assert weights_kinds([loaded.stages[0], make_base()]) == ["merged", "not recorded"]


def test_what_an_older_version_saved_is_not_guessed(fit, tmp_path):
    _, trainer = fit([EMA(0.9)], steps=1)
    joined(trainer, tmp_path)
    path = tmp_path / "cascade" / "cascade.json"
    manifest = json.loads(path.read_text())
    assert manifest["stages"][0]["weights"].pop("record") == AVERAGED
    path.write_text(json.dumps(manifest))
    (stage,) = Cascade.load(tmp_path / "cascade").stages
    assert stage.weights_record is None
    assert weights_words(stage) == "not recorded"
    manifest["stages"][0]["weights"]["record"] = {"kind": "mean"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"record of its weights is \{'kind': 'mean'\}.*use|one of ema, raw"):
        Cascade.load(tmp_path / "cascade")
