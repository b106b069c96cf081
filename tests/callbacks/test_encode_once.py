"""Captions encoded once: the encoder is gone before the first step, and training is the same to the bit."""

import gc
import io
import tarfile
import weakref

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from tiny_t5 import save_tiny_t5

from imagen_lightning.callbacks import EMA, EncodeOnce, SampleGrid
from imagen_lightning.components import build
from imagen_lightning.data.datamodule import LaionDataModule, ShapesDataModule
from imagen_lightning.data.dreambooth import DreamBoothDataModule
from imagen_lightning.data.embed import Embedding, Settings
from imagen_lightning.data.folder_datamodule import FolderDataModule
from imagen_lightning.data.shards import open_shards
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, Sampling, TextSettings
from imagen_lightning.text import T5TextEncoder, TinyTextEncoder
from imagen_lightning.types import InputError

PROMPT = "a zebra in no caption of the data"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_t5(
        tmp_path_factory.mktemp("models") / "tiny-t5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, count in (("dog", 5), ("class", 7), ("val", 3)):
        (root / name).mkdir()
        for n in range(count):
            Image.new("RGB", (8, 8), (30 * n, 7, 9)).save(root / name / f"{n}.png")
            (root / name / f"{n}.txt").write_text(f"{name} number {n} with {'many ' * n}words\n{name} {n}")
    return root


def data(images):
    instance = FolderDataModule(images / "dog", images / "val", image_size=8)
    return DreamBoothDataModule(instance, images / "class", batch_size=4)


def make_stage(encoder, null_text="zero"):
    seed_everything(1, verbose=False)
    network = UNet(
        dim=8, multipliers=(1, 2), num_blocks=1, attention=(False, True), text_dim=encoder.dim, groups=4, head_dim=8
    )
    return BaseStage(8, network, TextSettings(encoder, drop=0.3, null_text=null_text), sampling=Sampling(num_steps=2))


class Losses(Callback):
    def __init__(self):
        self.losses, self.loaded = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(pl_module.record.losses)
        self.loaded.append("_model" in vars(pl_module.text.encoder))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.losses.append(pl_module.record.losses)


def fit(stage, data, folder, callbacks, steps=6, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(stage, data)
    return stage, trainer


@pytest.mark.parametrize("null_text", ["zero", "empty_caption"])
def test_training_is_the_same_to_the_bit(images, tmp_path, null_text):
    runs = []
    for extra in ([], [EncodeOnce()]):
        losses = Losses()
        stage, _ = fit(make_stage(TinyTextEncoder(16), null_text), data(images), tmp_path, [losses, EMA(), *extra])
        runs.append((torch.cat(losses.losses), stage.state_dict()))
    (live, live_weights), (kept, kept_weights) = runs
    assert torch.equal(live, kept)
    assert len(live) > 24  # validation was there too
    assert all(torch.equal(value, kept_weights[name]) for name, value in live_weights.items())


def test_t5_is_gone_before_the_first_step_and_while_callbacks_draw(t5, images, tmp_path):
    encoder = T5TextEncoder(str(t5), max_tokens=24)
    encoder(["a cat"])  # its weights are there before
    models = [weakref.ref(encoder._model)]

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            gc.collect()
            assert models[0]() is None

    losses = Losses()
    grid = SampleGrid([PROMPT], every_n_steps=2, num_steps=1)
    load = T5TextEncoder._load
    loads = []

    def counted(self, what, *args, **kwargs):
        loads.append(what)
        return load(self, what, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5TextEncoder, "_load", counted)
        stage, _ = fit(make_stage(encoder), data(images), tmp_path, [Watch(), losses, grid, EncodeOnce()])
    assert losses.loaded == [False] * 6
    assert loads.count("weights") <= 1  # the grids' prompt was encoded with the captions
    assert len(list((tmp_path / "samples").iterdir())) == 3
    assert stage.text.kept is None
    encoder.free()


def test_t5s_losses_agree_to_rounding(t5, images, tmp_path):
    runs = []
    for extra in ([], [EncodeOnce()]):
        losses = Losses()
        fit(make_stage(T5TextEncoder(str(t5), max_tokens=24)), data(images), tmp_path, [losses, *extra])
        runs.append(torch.cat(losses.losses))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-5)


def test_checkpoints_name_the_encoder_itself(images, tmp_path):
    fit(make_stage(TinyTextEncoder(16)), data(images), tmp_path, [Save(tmp_path), EncodeOnce()], 2)
    checkpoint = torch.load(tmp_path / "stage.ckpt", weights_only=True)
    described = checkpoint["hyper_parameters"]["text"]["init_args"]
    assert "kept" not in described
    assert described["encoder"]["class_path"] == "imagen_lightning.text.TinyTextEncoder"
    assert build(checkpoint["hyper_parameters"]["text"]).kept is None


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "stage.ckpt")


def test_further_captions_are_kept(images, tmp_path, caplog):
    class Draws(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.text.encode([PROMPT], pl_module.device)
            self.number = len(pl_module.text.kept)

    draws = Draws()
    fit(make_stage(TinyTextEncoder(16)), data(images), tmp_path, [draws, EncodeOnce([PROMPT])], 1)
    assert draws.number == 2 * (5 + 7 + 3) + 2  # two captions an image, the empty one, and this
    assert "loaded again" not in caplog.text


def test_endless_data_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"captions of ShapesDataset cannot be listed.*drop EncodeOnce"):
        fit(make_stage(TinyTextEncoder(16)), ShapesDataModule(8), tmp_path, [EncodeOnce()])


def test_refusals(images, tmp_path):
    with pytest.raises(InputError, match="max_gb 0"):
        EncodeOnce(max_gb=0)
    with pytest.raises(InputError, match="GiB in memory"):
        fit(make_stage(TinyTextEncoder(16)), data(images), tmp_path, [EncodeOnce(max_gb=1e-6)])
    network = UNet(dim=8, multipliers=(1, 2), num_blocks=1, attention=(False, True), groups=4, head_dim=8)
    with pytest.raises(InputError, match="no text encoder to free"):
        fit(BaseStage(8, network), data(images), tmp_path, [EncodeOnce()])


def write_shard(folder):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for n in range(3):
            for suffix, content in (("png", picture.getvalue()), ("txt", b"one\ntwo %d" % n)):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / "train-0.tar")


def test_shards_list_their_captions(tmp_path):
    data = LaionDataModule(write_shard(tmp_path), image_size=8)
    assert data.captions() == ["one", "two 0", "two 1", "two 2"]


def test_with_stored_states_the_prompts_alone_are_encoded(t5, tmp_path):
    shard, encoder = write_shard(tmp_path), T5TextEncoder(str(t5), max_tokens=24)
    Embedding(open_shards(shard), tmp_path / "states", encoder, Settings()).run(progress=False)
    encoder.free()
    data = LaionDataModule(shard, image_size=8, batch_size=2, text_states=tmp_path / "states")
    assert data.captions() == []

    class Count(Losses):
        def on_train_batch_end(self, trainer, pl_module, *_):
            super().on_train_batch_end(trainer, pl_module)
            self.kept = len(pl_module.text.kept)

    count, grid = Count(), SampleGrid([PROMPT], every_n_steps=1, num_steps=1)
    fit(make_stage(encoder), data, tmp_path, [grid, count, EncodeOnce()], 2, limit_val_batches=0)
    assert count.loaded == [False, False]
    assert count.kept == 2  # the prompt and the empty caption
    assert len(list((tmp_path / "samples").iterdir())) == 2
