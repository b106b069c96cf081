"""Where weights come from: kept in manifests and checkpoints, passed on, and no more than plain data."""

import json

import pytest
import torch

from imagen_lightning.cascade import Cascade, load_weights
from imagen_lightning.cascade.origin import check_origin, licences
from imagen_lightning.stages import BaseStage
from imagen_lightning.types import InputError

IMPORTED = {
    "source": "DeepFloyd/IF-I-M-v1.0",
    "licence": "DeepFloyd IF License",
    "files": [{"sha256": "ab12", "size": 5}],
    "parents": [{"source": "elsewhere", "license": "MIT", "origin": None}],
}


@pytest.fixture
def imported(make_base, make_sr, tmp_path):
    base = make_base()
    base.origin = IMPORTED
    Cascade([base, make_sr()]).save(tmp_path / "imported")
    return tmp_path / "imported"


def test_an_origin_goes_into_the_manifest_and_comes_back(imported, tmp_path):
    base, sr = json.loads((imported / "cascade.json").read_text())["stages"]
    assert (base["origin"], sr["origin"]) == (IMPORTED, None)
    loaded = Cascade.load(imported)
    assert [stage.origin for stage in loaded.stages] == [IMPORTED, None]
    loaded.save(tmp_path / "again")
    loaded.save_manifest(tmp_path / "again")
    assert Cascade.load(tmp_path / "again").stages[0].origin == IMPORTED


def test_describe_prints_the_licences_of_imported_weights(imported, tmp_path):
    base, sr = Cascade.load(imported).describe().splitlines()
    assert base.endswith(", licence DeepFloyd IF License, licence MIT")
    assert "licence" not in sr


def test_a_stage_that_starts_from_anothers_weights_names_it_as_parent(imported, make_base, tmp_path):
    stage = make_base(seed=5)
    load_weights(stage, f"{imported}#base")
    entry = json.loads((imported / "cascade.json").read_text())["stages"][0]
    (parent,) = stage.origin["parents"]
    wanted = {"cascade": "imported", "stage": "base", "sha256": [entry["weights"]["sha256"]]}
    wanted |= {"weights": None, "origin": IMPORTED}
    assert parent == wanted
    tuned = Cascade([stage])
    assert tuned.describe().endswith("licence DeepFloyd IF License, licence MIT")
    tuned.save(tmp_path / "tuned", max_shard_size=5000)
    assert str(tmp_path) not in (tmp_path / "tuned" / "cascade.json").read_text()
    grandchild = make_base(seed=6)
    load_weights(grandchild, f"{tmp_path / 'tuned'}#0")
    (parent,) = grandchild.origin["parents"]
    assert parent["origin"] == stage.origin
    assert len(parent["sha256"]) > 3
    assert licences(grandchild.origin) == ["DeepFloyd IF License", "MIT"]


def test_an_origin_goes_into_checkpoints_and_comes_back(make_base, tmp_path):
    stage = make_base()
    stage.origin = IMPORTED
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "step-1.ckpt")
    assert Cascade.from_checkpoints([tmp_path / "step-1.ckpt"]).stages[0].origin == IMPORTED
    checkpoint["pytorch-lightning_version"] = "2.6.6"
    torch.save(checkpoint, tmp_path / "step-2.ckpt")
    assert BaseStage.load_from_checkpoint(tmp_path / "step-2.ckpt").origin == IMPORTED
    again = make_base(seed=3)
    again.on_load_checkpoint(checkpoint)
    assert again.origin == IMPORTED


def test_a_checkpoint_from_before_origins_has_none(make_base, tmp_path):
    stage = make_base()
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    del checkpoint["origin"]
    torch.save(checkpoint, tmp_path / "step-1.ckpt")
    assert Cascade.from_checkpoints([tmp_path / "step-1.ckpt"]).stages[0].origin is None


@pytest.mark.parametrize(
    "origin", ["a text", ["a list"], 3, {"weights": torch.ones(2)}, {"parents": [{1: "x"}]}, {"x": (1,)}]
)
def test_an_origin_that_is_no_plain_data_is_refused(make_base, tmp_path, edit, origin):
    stage = make_base()
    stage.origin = origin
    with pytest.raises(InputError, match=r"stage 'base': its origin is no plain data"):
        Cascade([stage]).save(tmp_path / "cascade")
    assert not list(tmp_path.iterdir())
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match=r"bad.ckpt': its origin is no plain data"):
        Cascade.from_checkpoints([tmp_path / "bad.ckpt"])
    if isinstance(origin, str | list | int):
        stage.origin = None
        Cascade([stage]).save(tmp_path / "cascade")
        edit(tmp_path / "cascade", lambda manifest: manifest["stages"][0].update(origin=origin))
        with pytest.raises(InputError, match=r"stage 'base' of .*cascade.json: its origin is no plain data"):
            Cascade.load(tmp_path / "cascade")


def test_an_origin_names_no_class(imported, edit, tmp_path):
    """What would be built elsewhere in a manifest is read as the plain data that it is."""
    planted = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/executed"}, "__reduce__": "x"}
    edit(imported, lambda manifest: manifest["stages"][0].update(origin=planted))
    assert Cascade.load(imported).stages[0].origin == planted
    assert not (tmp_path / "executed").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_an_object_in_a_checkpoints_origin_is_never_unpickled(make_base, tmp_path):
    stage = make_base()
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    checkpoint["origin"] = {"licence": Payload(str(tmp_path / "executed"))}
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="never unpickled"):
        Cascade.from_checkpoints([tmp_path / "bad.ckpt"])
    assert not (tmp_path / "executed").exists()


def test_licences_are_printable_on_one_line():
    planted = {"licence": "MIT\n\x1b[2Jbase: 64 px", "parents": [{"license": "MIT"}, {"origin": {"licence": "MIT"}}]}
    assert licences(planted) == ["MIT[2Jbase: 64 px", "MIT"]
    assert licences(None) == []
    assert check_origin(planted, "it") is planted
