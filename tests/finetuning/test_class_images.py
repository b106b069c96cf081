"""Class images: what the cascade draws, whole folders, going on where it stopped, and the verb."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli import main
from imagen_lightning.data.class_images import RECORD, find_class_images, partial_folder
from imagen_lightning.data.dreambooth import DreamBoothDataModule
from imagen_lightning.data.folder_datamodule import FolderDataModule
from imagen_lightning.finetuning.class_images import REQUEST, draw_class_images, weights_of
from imagen_lightning.images import from_pil
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.samplers import LogSNRTimes
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.types import InputError

PROMPTS = ["a small red star", "a large blue circle", "a cross"]
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}
WEIGHTS = {"base": ["11"], "sr_16": ["22"]}


def randomised(stage, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return stage.eval()


@pytest.fixture(scope="module")
def cascade():
    text = TextSettings(TinyTextEncoder(16))
    base = BaseStage(8, UNet(**SMALL, attention=[False, True]), text, sampling=Sampling(num_steps=2, guidance=2.0))
    network = EfficientUNet(**SMALL, attention=["none", "self"])
    sr = SuperResolutionStage(16, 8, network, text, sampling=Sampling(num_steps=2, guidance=1.0))
    return Cascade([randomised(base, 1), randomised(sr, 2)])


def draw(cascade, out, num=7, **settings):
    return draw_class_images(cascade, out, PROMPTS, num, **{"weights": WEIGHTS, "seed": 4, "batch_size": 3, **settings})


def files(folder):
    """Contents by name; the partial folder has the request in the record's place."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def read(folder, stage, index):
    return from_pil(Image.open(folder / stage / f"{index:05d}.png"))


def test_each_stages_own_outputs_with_their_captions(cascade, tmp_path):
    drawn = draw(cascade, tmp_path / "class")
    captions = [PROMPTS[i % 3] for i in range(7)]
    expected = cascade.sample(captions, seed=4, batch_size=3)
    for stage, images in zip(("base", "sr_16"), expected.stages):
        for index, image in enumerate(images):
            # The noise is the same; convolution kernels differ by batch.
            assert (read(tmp_path / "class", stage, index).int() - image.int()).abs().max() <= 1
            assert (tmp_path / "class" / stage / f"{index:05d}.txt").read_text() == captions[index] + "\n"
    assert (drawn.num, drawn.num_made, drawn.stages) == (7, 7, ["base", "sr_16"])
    assert (expected.stages[0][0].int() - expected.stages[0][3].int()).abs().max() > 10  # same caption, another image
    assert not partial_folder(tmp_path / "class").exists()


def test_the_record_says_what_drew_them(cascade, tmp_path):
    draw(cascade, tmp_path / "class", guidance=[3.0, 1.0], steps=[1, 2])
    record = json.loads((tmp_path / "class" / RECORD).read_text())
    assert {key: record[key] for key in ("prompts", "num", "seed", "precision", "weights", "batch_size")} == {
        **{"prompts": PROMPTS, "num": 7, "seed": 4, "precision": "32", "weights": WEIGHTS, "batch_size": 3}
    }
    assert [(s["stage"], s["image_size"], s["steps"], s["guidance"]) for s in record["stages"]] == [
        ("base", 8, 1, 3.0),
        ("sr_16", 16, 2, 1.0),
    ]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_drawing_that_was_stopped_goes_on_to_the_same_bits(cascade, tmp_path, monkeypatch, after):
    draw(cascade, tmp_path / "whole")
    from imagen_lightning.finetuning import class_images

    saved = []

    def stop(image, path):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    save = class_images.save_png
    monkeypatch.setattr(class_images, "save_png", stop)
    with pytest.raises(KeyboardInterrupt):
        draw(cascade, tmp_path / "class")
    monkeypatch.undo()
    assert not (tmp_path / "class").exists()
    with pytest.raises(InputError, match="not all drawn"):
        find_class_images(tmp_path / "class", 8)
    drawn = draw(cascade, tmp_path / "class")
    assert drawn.num_made == 7 if after < 6 else 4
    assert files(tmp_path / "class") == files(tmp_path / "whole")


def test_batches_that_are_there_are_not_drawn_again(cascade, tmp_path):
    draw(cascade, tmp_path / "whole")
    out = tmp_path / "class"
    (tmp_path / "whole").rename(partial_folder(out))
    record = json.loads((partial_folder(out) / RECORD).read_text())
    (partial_folder(out) / RECORD).unlink()
    request = {key: record[key] for key in ("prompts", "num", "seed", "precision", "stages", "weights", "text")}
    (partial_folder(out) / REQUEST).write_text(json.dumps(request))
    (partial_folder(out) / "sr_16/00004.png").unlink()
    reported = []
    assert draw(cascade, out, progress=reported.append).num_made == 3
    assert reported == [6]
    assert draw(cascade, out).num_made == 0


def test_base_images_alone(cascade, tmp_path):
    drawn = draw(cascade, tmp_path / "class", last_stage="base")
    assert drawn.stages == ["base"]
    assert not (tmp_path / "class/sr_16").exists()
    assert find_class_images(tmp_path / "class", 8) == tmp_path / "class/base"
    with pytest.raises(InputError, match=r"of 8 \(base\) px and the instance images of 16 px"):
        find_class_images(tmp_path / "class", 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed is 4 there and 5 now"),
        ({"num": 8}, "number is 7 there and 8 now"),
        ({"guidance": 2.5}, "sampling is .* there and .* now"),
        ({"spacing": LogSNRTimes()}, "sampling is .* there and .* now"),
        ({"weights": {"base": ["11"], "sr_16": ["23"]}}, "weights of the cascade is .*22.* there and .*23.* now"),
    ],
)
def test_other_class_images_are_refused(cascade, tmp_path, change, message):
    draw(cascade, tmp_path / "class")
    before = files(tmp_path / "class")
    if "spacing" in change:
        stages = [copy.copy(stage) for stage in cascade.stages]
        stages[0].sampling = replace(stages[0].sampling, **change)
        cascade, change = Cascade(stages), {}
    with pytest.raises(InputError, match=f"holds other class images: {message}; give another folder"):
        draw(cascade, tmp_path / "class", **change)
    (tmp_path / "class").rename(partial_folder(tmp_path / "class"))
    partial = partial_folder(tmp_path / "class")
    (partial / RECORD).rename(partial / REQUEST)
    with pytest.raises(InputError, match=f"was begun for other class images: {message}.*delete"):
        draw(cascade, tmp_path / "class", **change)
    assert {**files(partial), RECORD: before[RECORD]}.keys() >= before.keys()


def test_refusals(cascade, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(InputError, match="holds no class images"):
        draw(cascade, tmp_path / "other")
    with pytest.raises(InputError, match="number of class images 0"):
        draw(cascade, tmp_path / "class", num=0)
    with pytest.raises(InputError, match="begins with super-resolution"):
        draw(Cascade(cascade.stages[1:]), tmp_path / "class")
    with pytest.raises(InputError, match="stage 'sr_99' is unknown"):
        draw(cascade, tmp_path / "class", last_stage="sr_99")


@pytest.fixture(scope="module")
def saved(cascade, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "cascade"
    cascade.save(folder)
    return folder


def test_the_verb_draws_what_dreambooth_trains_on(saved, tmp_path, capsys):
    out = tmp_path / "class"
    (tmp_path / "prompts.txt").write_text("a cross\n\na ring\n")
    command = ["class-images", str(saved), str(out), "--num", "5", "--device", "cpu", "--prompt", "a  star"]
    assert main.main([*command, "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]) == 0
    assert "Wrote 5 images of each of base, sr_16" in capsys.readouterr().out
    record = json.loads((out / RECORD).read_text())
    assert record["prompts"] == ["a star", "a cross", "a ring"]
    assert record["weights"] == weights_of(saved)
    assert main.main([*command, "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]) == 0
    assert "finished already" in capsys.readouterr().out

    instances = tmp_path / "dog"
    instances.mkdir()
    for n in range(3):
        Image.new("RGB", (16, 16), (n, 0, 0)).save(instances / f"{n}.png")
    for size, stage in ((8, "base"), (16, "sr_16")):
        data = DreamBoothDataModule(FolderDataModule(instances, image_size=size, caption="a <dog>"), str(out))
        batch = next(iter(data.train_dataloader()))
        rows = [row for row, caption in enumerate(batch.captions) if caption != "a <dog>"]
        assert len(rows) == 2
        for row in rows:
            name, file = batch.keys[row].split("/")
            assert name == stage
            assert torch.equal(batch.images[row], read(out, stage, int(Path(file).stem)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there are no captions of the class"),
        (["--prompt", " "], "--prompt number 1 is empty"),
        (["--prompt", "a", "--num", "0"], "--num: '0' is outside"),
        (["--prompts", "nothing.txt"], "cannot be read"),
    ],
)
def test_the_verb_refuses(saved, tmp_path, capsys, options, message):
    assert main.main(["class-images", str(saved), str(tmp_path / "class"), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
