"""What a cascade is joined from: checkpoints, run folders, other cascades and single stages of them."""

import json

import pytest
import torch

from imagen_lightning.cascade import Cascade
from imagen_lightning.networks import LoRA
from imagen_lightning.types import InputError

CAPTIONS = ["a small red star", "a cross"]


def write_run(stage, folder):
    """A run folder with the stage's checkpoint, as training leaves one."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "checkpoints" / "step-4.ckpt")
    return folder


@pytest.fixture
def tuned(make_base, tmp_path):
    return write_run(make_base(seed=11), tmp_path / "tuned")


def equal(stage, other):
    ones, others = stage.state_dict(), other.state_dict()
    return ones.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in ones.items())


@pytest.mark.parametrize("name", ["sr_16", "1"])
def test_a_tuned_base_joins_an_unchanged_stage(cascade, saved, tuned, make_base, tmp_path, name):
    made = Cascade.from_checkpoints([tuned, f"{saved}#{name}"])
    assert made.names == ["base", "sr_16"]
    assert equal(made.stages[0], make_base(seed=11))
    assert equal(made.stages[1], cascade.stages[1])
    made.save(tmp_path / "joined")
    drawn = Cascade([make_base(seed=11), cascade.stages[1]]).sample(CAPTIONS, seed=3)
    assert torch.equal(Cascade.load(tmp_path / "joined").sample(CAPTIONS, seed=3).images, drawn.images)


def test_a_whole_cascade_is_continued(cascade, saved, make_sr, tmp_path):
    larger = write_run(make_sr(seed=5, low_res_size=16, image_size=32), tmp_path / "sr_32")
    made = Cascade.from_checkpoints([saved, larger / "checkpoints" / "step-4.ckpt"])
    assert made.names == ["base", "sr_16", "sr_32"]
    assert all(equal(one, other) for one, other in zip(made.stages, cascade.stages))
    alone = Cascade.from_checkpoints([saved])
    assert alone.names == ["base", "sr_16"]


def test_files_of_a_stage_go_along_with_its_origin_and_without_its_evaluations(saved, edit, tmp_path):
    def change(manifest):
        manifest["stages"][1]["origin"] = {"licence": "MIT"}
        manifest["metrics"] = [{"name": "FID", "value": 3.0}]

    edit(saved, change)
    made = Cascade.from_checkpoints([f"{saved}#base", f"{saved}#sr_16"])
    assert [stage.origin for stage in made.stages] == [None, {"licence": "MIT"}]
    assert made.metrics == []


def test_a_folder_with_the_sign_in_its_name_is_a_folder(tuned, make_base):
    named = tuned.rename(tuned.with_name("run #3"))
    assert equal(Cascade.from_checkpoints([named]).stages[0], make_base(seed=11))
    assert equal(Cascade.from_checkpoints([named / "checkpoints" / "step-4.ckpt"]).stages[0], make_base(seed=11))


def test_a_stage_with_an_adapter_is_merged(make_base, tmp_path):
    stage = make_base(seed=11, adapter=LoRA(rank=2, targets=["attention", "convolutions"]))
    plain = make_base(seed=11)
    assert stage.state_dict().keys() != plain.state_dict().keys()
    run = write_run(stage, tmp_path / "adapted")
    made = Cascade.from_checkpoints([run])
    assert made.stages[0].adapter is None
    assert made.stages[0].state_dict().keys() == plain.state_dict().keys()
    assert made.stages[0].hyperparameters()["adapter"] is None
    made.save(tmp_path / "merged")
    merged, unmerged = Cascade.load(tmp_path / "merged").sample(CAPTIONS), Cascade([stage]).sample(CAPTIONS)
    assert (merged.images.int() - unmerged.images.int()).abs().max() <= 1
    assert not torch.equal(merged.images, Cascade([plain]).sample(CAPTIONS).images)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["{saved}#sr_64"], ["stage 'sr_64' is unknown", "0 (base), 1 (sr_16)"]),
        (["{tmp}/none#base"], ["is no cascade folder"]),
        (["https://example.org/cascade#base"], ["is an address"]),
        (["https://example.org/cascade"], ["is an address"]),
        (["{saved}", "{saved}#base"], ["'base' of 8 px takes no low-resolution image but follows stage 'sr_16'"]),
        (["{tuned}", "{saved}"], ["stage 'base' of 8 px", "follows stage 'base'", "put it first"]),
        (["{saved}#base", "{larger}"], ["'sr_32' takes images of 16 px but stage 'base' before it makes 8 px"]),
        (["{tmp}"], ["has no checkpoints/step-*.ckpt"]),
    ],
)
def test_sources_that_are_none_or_do_not_chain_are_refused(saved, tuned, make_sr, tmp_path, sources, words):
    larger = write_run(make_sr(seed=5, low_res_size=16, image_size=32), tmp_path / "sr_32")
    places = {"saved": saved, "tuned": tuned, "larger": larger, "tmp": tmp_path}
    with pytest.raises(InputError) as error:
        Cascade.from_checkpoints([source.format(**places) for source in sources])
    assert all(word in str(error.value) for word in words), error.value


def test_stages_with_other_text_encoders_stay_apart_and_equal_ones_are_shared(saved, tuned):
    made = Cascade.from_checkpoints([tuned, f"{saved}#sr_16"])
    base, sr = (stage.text.encoder for stage in made.stages)
    assert (base.dim, sr.dim) == (16, 12)
    names = [entry["text"]["encoder"] for entry in json.loads((saved / "cascade.json").read_text())["stages"]]
    assert [base.name, sr.name] == names
