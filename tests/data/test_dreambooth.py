"""DreamBooth's data: shares to the sample, resume to the bit, the paper's loss, and folders of images."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from fitting import train
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import Dataset

from imagen_lightning.components import describe_args
from imagen_lightning.data.class_images import FORMAT, RECORD
from imagen_lightning.data.datamodule import LaionDataModule, ShapesDataModule
from imagen_lightning.data.dataset import Sample
from imagen_lightning.data.dreambooth import DreamBoothDataModule
from imagen_lightning.data.folder_datamodule import FolderDataModule
from imagen_lightning.data.mixture import PriorMixture, exact_share
from imagen_lightning.data.stream_datamodule import StreamingLaionDataModule
from imagen_lightning.types import InputError


def write_folder(folder, numbers, captions=lambda n: f"number {n}", size=(10, 8)):
    """Pictures whose red value is their number, and whose green values say where a crop was taken."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        picture = Image.new("RGB", size)
        picture.putdata([(n, 20 * x, 9) for _ in range(size[1]) for x in range(size[0])])
        picture.save(folder / f"{n:03d}.png")
        if captions is not None:
            (folder / f"{n:03d}.txt").write_text(captions(n))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Seven instance images, whose number is below 100, and eleven class images, from 100 on."""
    instances = write_folder(tmp_path / "dog", range(7), lambda n: "a photo of <dog>\na picture of <dog>")
    return instances, write_folder(tmp_path / "class", range(100, 111), lambda n: f"dog {n}")


def dreambooth(folders, num_workers=0, batch_size=4, crop="random", **settings):
    instance = FolderDataModule(folders[0], image_size=8, crop=crop, random_flip=True, seed=3)
    return DreamBoothDataModule(
        instance, folders[1], batch_size=batch_size, num_workers=num_workers, **{"seed": 5, **settings}
    )


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.images, self.captions, self.weights, self.validated = [], [], [], [], []

    def training_step(self, batch, _):
        self.keys += batch.keys
        self.captions += batch.captions
        self.images.append(batch.images)
        self.weights += batch.weights.tolist()
        return self.weight * (batch.weights * batch.images.float().mean((1, 2, 3))).mean()

    def validation_step(self, batch, _):
        assert batch.weights is None
        self.validated += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps, resume=None, **settings):
    module = Recorder()
    train(module, data, folder, steps, resume, **settings)
    return module


# ---- the mixture


class Numbers(Dataset):
    def __init__(self, name):
        self.name = name

    def __getitem__(self, position):
        return Sample(torch.zeros(3, 1, 1), self.name, f"{self.name}{position}", position)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.3, 2 / 3, 0.999, 0.001])
def test_any_positions_in_a_row_have_their_share(share):
    exact = exact_share(share)
    mixture = PriorMixture(Numbers("i"), Numbers("c"), exact, 1.0)
    places = [mixture.place(position) for position in range(3000)]
    for kind in (True, False):  # each part is seen in its own order, without a gap
        numbers = [number for is_instance, number in places if is_instance is kind]
        assert numbers == list(range(len(numbers)))
    for start, stop in ((0, 1000), (17, 2017), (5, 12), (2990, 3000)):
        count = sum(is_instance for is_instance, _ in places[start:stop])
        assert abs(count - (stop - start) * exact) < 1


def test_whole_batches_have_exactly_their_share():
    mixture = PriorMixture(Numbers("i"), Numbers("c"), exact_share(0.25), 1.0)
    for batch in range(50):
        assert sum(mixture.place(position)[0] for position in range(8 * batch, 8 * batch + 8)) == 2


@pytest.mark.parametrize(("share", "prior_weight"), [(0.5, 1.0), (0.25, 0.7), (0.75, 0.0)])
def test_the_weighted_mean_is_the_papers_loss(share, prior_weight):
    """Ruiz et al. 2022, eq. 2: the instances' mean plus lambda times the class images' mean."""
    mixture = PriorMixture(Numbers("i"), Numbers("c"), exact_share(share), prior_weight)
    samples = [mixture[position] for position in range(40, 80)]
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    is_instance = torch.tensor([sample.caption == "i" for sample in samples])
    expected = losses[is_instance].mean() + prior_weight * losses[~is_instance].mean()
    assert (weights * losses).mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert [sample.position for sample in samples] == list(range(40, 80))


def test_shares_are_the_fractions_that_were_meant():
    assert exact_share(0.1) == Fraction(1, 10)
    for wrong in (0, 1, -0.2, 1e-9, 1 - 1e-9):
        with pytest.raises(InputError, match="share"):
            exact_share(wrong)


# ---- a folder of images


def test_a_folder_gives_each_image_once_an_epoch(tmp_path):
    data = FolderDataModule(write_folder(tmp_path / "dog", range(7)), image_size=8, batch_size=7)
    batches = iter(data.train_dataloader())
    seen = [next(batches) for _ in range(3)]
    for batch in seen:
        numbers = batch.images[:, 0, 0, 0].tolist()
        assert batch.captions == [f"number {n}" for n in numbers]
        assert batch.keys == [f"dog/{n:03d}.png" for n in numbers]
        assert sorted(numbers) == list(range(7))
        assert batch.weights is None
    assert seen[0].keys != seen[1].keys
    assert torch.cat([batch.positions for batch in seen]).tolist() == list(range(21))


def test_one_caption_may_stand_for_all(tmp_path):
    folder = write_folder(tmp_path / "dog", range(3), captions=None)
    batch = next(iter(FolderDataModule(folder, image_size=8, caption="a <dog>").train_dataloader()))
    assert set(batch.captions) == {"a <dog>"}
    assert FolderDataModule(folder, caption="a <dog>").captions() == ["a <dog>"]
    with pytest.raises(InputError, match="caption is empty"):
        FolderDataModule(folder, caption=" ")


def test_a_table_of_images_is_a_folder_too(tmp_path):
    write_folder(tmp_path / "dog", range(3), captions=None)
    (tmp_path / "dog/metadata.csv").write_text("file_name,text\n000.png,first\n002.png,third\n")
    data = FolderDataModule(tmp_path / "dog", image_size=8, batch_size=2, max_skip_share=1.0)
    assert sorted(data.captions()) == ["first", "third"]
    assert {*next(iter(data.train_dataloader())).captions} <= {"first", "third"}


def test_what_cannot_be_used_is_replaced_and_listed(tmp_path):
    folder = write_folder(tmp_path / "dog", range(6))
    (folder / "002.png").write_bytes(b"no image")
    (folder / "004.txt").unlink()
    data = FolderDataModule(folder, image_size=8, batch_size=3, max_skip_share=1.0)
    module = fit(DreamBoothDataModule(data, folder, batch_size=6), tmp_path / "run", 6)
    assert {key.removeprefix("dog/") for key in module.keys} == {f"{n:03d}.png" for n in (0, 1, 3, 5)}
    lines = map(json.loads, (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    assert {(line["key"], line["reason"]) for line in lines} == {
        ("002.png", "undecodable image"),
        ("004.png", "caption missing or empty"),
    }


def test_images_below_the_size_are_skipped_unless_they_may_be_enlarged(tmp_path):
    folder = write_folder(tmp_path / "dog", range(3))
    assert next(iter(FolderDataModule(folder, image_size=16, allow_upscale=True).train_dataloader())).images.shape[
        -2:
    ] == (16, 16)
    with pytest.raises(InputError, match="image too small"):
        fit(FolderDataModule(folder, image_size=16, batch_size=2), tmp_path, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "does not exist"),
        (lambda folder: folder / "000.png", "neither a folder"),
    ],
)
def test_sources_that_are_none(tmp_path, make, message):
    folder = write_folder(tmp_path / "dog", range(2))
    with pytest.raises(InputError, match=message):
        FolderDataModule(make(folder)).setup("fit")


# ---- the DataModule


def test_batches_hold_both_parts_with_their_weights(folders, tmp_path):
    module = fit(dreambooth(folders, share=0.25, prior_weight=0.5), tmp_path, 11)
    kinds = ["i" if key.startswith("dog/") else "c" for key in module.keys]
    for start in range(0, 44, 4):
        assert kinds[start : start + 4].count("i") == 1
    assert module.weights == [4.0 if kind == "i" else pytest.approx(0.5 / 0.75) for kind in kinds]
    instances = [key for key, kind in zip(module.keys, kinds) if kind == "i"]
    priors = [key for key, kind in zip(module.keys, kinds) if kind == "c"]
    assert len(set(instances[:7])) == 7  # each once an epoch of its own
    assert all(len({*priors[k : k + 11]}) == 11 for k in (0, 11, 22))
    assert {caption for caption, kind in zip(module.captions, kinds) if kind == "i"} == {
        "a photo of <dog>",
        "a picture of <dog>",
    }


@pytest.mark.parametrize(("first_workers", "second_workers"), [(0, 2), (2, 0), (0, 0)])
def test_resume_goes_on_with_the_next_sample(folders, tmp_path, first_workers, second_workers):
    whole = fit(dreambooth(folders), tmp_path, 12)
    fit(dreambooth(folders, first_workers), tmp_path, 8, every=5)
    resumed = fit(dreambooth(folders, second_workers), tmp_path, 12, resume=tmp_path / "step=5.ckpt")
    assert resumed.keys == whole.keys[20:]
    assert resumed.captions == whole.captions[20:]
    assert resumed.weights == whole.weights[20:]
    assert torch.equal(torch.cat(resumed.images), torch.cat(whole.images[5:]))
    assert len({*whole.keys}) == 18
    assert len({tuple(image[1, 0].tolist()) for image in torch.cat(whole.images)}) == 6  # 3 crops, 2 ways


def test_the_batch_size_does_not_change_what_comes(folders, tmp_path):
    small, large = (fit(dreambooth(folders, batch_size=size), tmp_path, 24 // size) for size in (2, 8))
    assert small.keys == large.keys
    assert torch.equal(torch.cat(small.images), torch.cat(large.images))


def test_accumulated_batches_take_the_step_of_a_whole_one(folders, tmp_path):
    """With a share of 1/4, batches of two have no instance or one."""
    settings = {"share": 0.25, "prior_weight": 0.5}
    whole = fit(dreambooth(folders, batch_size=8, **settings), tmp_path, 1)
    parts = fit(dreambooth(folders, batch_size=2, **settings), tmp_path, 1, accumulate_grad_batches=4)
    assert parts.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6)
    assert whole.weight.item() != 0


TWO = """
import sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
import test_dreambooth as tests
module = tests.fit(tests.dreambooth({folders!r}, batch_size=8, share=0.25, prior_weight=0.5), {run!r}, 2,
    devices=2, strategy="ddp")
with open({run!r} + f"-{{module.trainer.global_rank}}.json", "w") as file:
    tests.json.dump([module.weight.item(), module.keys], file)
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(folders, tmp_path):
    """With a share of 1/4, their halves of each batch have one instance each."""
    whole = fit(dreambooth(folders, batch_size=8, share=0.25, prior_weight=0.5), tmp_path, 2)
    script = tmp_path / "script.py"
    run = str(tmp_path / "run")
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folders=[str(f) for f in folders], run=run))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in (0, 1)]
    assert [weight for weight, _ in found] == [pytest.approx(whole.weight.item(), rel=1e-6)] * 2
    halves = [whole.keys[:4] + whole.keys[8:12], whole.keys[4:8] + whole.keys[12:]]
    assert [keys for _, keys in found] == halves


def test_a_run_resumes_with_the_same_parts_alone(folders, tmp_path):
    fit(dreambooth(folders), tmp_path, 5, every=5)
    resume = tmp_path / "step=5.ckpt"
    with pytest.raises(InputError, match="share 1/2"):
        fit(dreambooth(folders, share=0.25), tmp_path, 6, resume)
    write_folder(folders[1], [111])
    with pytest.raises(InputError, match=r"class images .*11.*12"):
        fit(dreambooth(folders), tmp_path, 6, resume)


def test_validation_is_the_instances_own(folders, tmp_path):
    held_out = write_folder(tmp_path / "val", range(50, 53))
    data = DreamBoothDataModule(FolderDataModule(folders[0], held_out, image_size=8), folders[1])
    module = fit(data, tmp_path, 2, limit_val_batches=1.0, val_check_interval=2, check_val_every_n_epoch=None)
    assert module.validated[-3:] == [f"val/{n:03d}.png" for n in range(50, 53)]
    assert dreambooth(folders).val_dataloader() == []


def test_captions_of_both_parts_are_listed(folders):
    assert set(dreambooth(folders).captions()) == {
        *("a photo of <dog>", "a picture of <dog>"),
        *(f"dog {n}" for n in range(100, 111)),
    }
    with pytest.raises(InputError, match="captions of ShapesDataset cannot be listed"):
        ShapesDataModule().captions()


def test_any_data_with_an_order_may_be_either_part(folders, tmp_path):
    data = DreamBoothDataModule(ShapesDataModule(8), ShapesDataModule(8, seed=1), batch_size=6)
    module = fit(data, tmp_path, 2)
    assert sorted(module.keys) == sorted(2 * [f"shapes-train-{n:06d}" for n in range(6)])


# ---- class images of a cascade


def with_record(folder, stages, **changes):
    record = {"format": FORMAT, "version": 1, "stages": [{"stage": n, "image_size": s} for n, s in stages], **changes}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_the_stage_of_the_images_size_is_taken(tmp_path):
    for name, size, start in (("base", 8, 100), ("sr_16", 16, 200)):
        write_folder(tmp_path / "class" / name, range(start, start + 4), size=(size, size))
    folder = with_record(tmp_path / "class", [("base", 8), ("sr_16", 16)])
    for size, expected in ((8, "base"), (16, "sr_16")):
        instance = FolderDataModule(write_folder(tmp_path / f"dog{size}", range(4), size=(16, 16)), image_size=size)
        module = fit(DreamBoothDataModule(instance, folder), tmp_path, 4)
        assert {key.split("/")[0] for key in module.keys} == {f"dog{size}", expected}
    with pytest.raises(InputError, match=r"8 \(base\), 16 \(sr_16\) px and the instance images of 12 px"):
        DreamBoothDataModule(FolderDataModule(tmp_path / "dog16", image_size=12), folder).setup("fit")


def test_class_images_of_another_cascade_are_refused(tmp_path):
    write_folder(tmp_path / "class/base", range(100, 104), size=(8, 8))
    folder = with_record(tmp_path / "class", [("base", 8)], weights={"base": ["1" * 64], "sr_16": ["2" * 64]})
    instance = FolderDataModule(write_folder(tmp_path / "dog", range(4)), image_size=8)

    def train(origin, images=folder):
        module, data = Recorder(), DreamBoothDataModule(instance, images)
        module.origin = origin
        Trainer(accelerator="cpu", logger=False, max_steps=1, enable_checkpointing=False).fit(module, data)

    def parent(sha256, stage="base"):
        return {"parents": [{"cascade": "mine", "stage": stage, "sha256": [sha256 * 64], "origin": None}]}

    for fits in (None, {}, parent("1"), parent("3", "sr_32")):
        train(fits)
    with pytest.raises(
        InputError, match=r"stage 'base' have SHA-256 1{12}…, and the stage starts from 'mine'.* 3{12}…"
    ):
        train(parent("3"))
    train(parent("3"), folder / "base")


def test_class_images_that_are_not_whole_are_refused(folders, tmp_path):
    instance = FolderDataModule(folders[0], image_size=8)
    with pytest.raises(InputError, match="do not exist; `imagen-lightning class-images`"):
        DreamBoothDataModule(instance, tmp_path / "none").setup("fit")
    (tmp_path / "none.partial").mkdir()
    with pytest.raises(InputError, match="not all drawn"):
        DreamBoothDataModule(instance, tmp_path / "none").setup("fit")
    with_record(folders[1], [], version=7)
    with pytest.raises(InputError, match="version 7"):
        DreamBoothDataModule(instance, folders[1]).setup("fit")
    (folders[1] / RECORD).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        DreamBoothDataModule(instance, folders[1]).setup("fit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda instance: DreamBoothDataModule(instance, "class", share=1.0), "share 1.0"),
        (lambda instance: DreamBoothDataModule(instance, "class", prior_weight=-1), "prior_weight -1"),
        (lambda instance: DreamBoothDataModule(instance, "class", prior_weight=float("nan")), "prior_weight nan"),
        (lambda _: DreamBoothDataModule(LaionDataModule("a.tar", crop="bucket"), "class"), "crop 'bucket'"),
        (lambda _: DreamBoothDataModule(LaionDataModule("a.tar", text_states="states"), "class"), "EncodeOnce"),
        (lambda _: DreamBoothDataModule(StreamingLaionDataModule("a.tar"), "class"), "no order by position"),
        (lambda instance: DreamBoothDataModule(instance, StreamingLaionDataModule("a.tar")), "class_images: Streaming"),
    ],
)
def test_refusals(folders, make, message):
    with pytest.raises(InputError, match=message):
        make(FolderDataModule(folders[0]))


def test_they_are_components(folders):
    assert describe_args(FolderDataModule("images"))["train"] == "images"
    described = describe_args(DreamBoothDataModule(FolderDataModule("images"), "class"))
    assert described["instance"]["init_args"]["train"] == "images"
    assert described["share"] == 0.5


def test_a_folders_validation_does_not_depend_on_the_seed(tmp_path):
    folder = write_folder(tmp_path / "val", range(20), lambda n: f"number {n}\n{n}\nno {n}")
    first, second = (
        next(iter(FolderDataModule(folder, folder, image_size=8, batch_size=20, seed=seed).val_dataloader()))
        for seed in (0, 1)
    )
    assert first.captions == second.captions
    assert torch.equal(first.images, second.images)
