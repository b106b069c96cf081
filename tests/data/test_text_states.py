"""Stored text states in training, against the encoder itself, on tiny random checkpoints."""

import io
import json
import os
import shutil
import tarfile

import lightning
import numpy as np
import pytest
import torch
from given_data import copy_tokenizer, t5_tokenizer
from PIL import Image
from safetensors.torch import load_file
from tiny_stages import SIZE, SMALL

from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.embed import Embedding, Settings
from imagen_lightning.data.shards import open_shards
from imagen_lightning.data.skips import Reason
from imagen_lightning.data.text_states import TextStates
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, TextSettings
from imagen_lightning.text import T5TextEncoder, TinyTextEncoder
from imagen_lightning.types import InputError

CAPTIONS = [
    "a small red star above a large blue circle on a white background",
    "a cat\nthe same cat, seen by somebody else",
    "Two Corgis &amp; a cake, see https://example.com/cake.jpg",
    "crème brûlée",
    "日本語",
    "a photograph of " + "very " * 30 + "long grass",
]
T5_SIZES = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
HALF = 2**-11  # the relative rounding of float16


def transformers():
    import transformers

    return transformers


def write_model(folder, kind, seed=0):
    """A random checkpoint of any kind of T5, of 12 features."""
    torch.manual_seed(seed)
    if kind == "ByT5":
        transformers().T5EncoderModel(transformers().T5Config(**T5_SIZES, vocab_size=384)).save_pretrained(folder)
        transformers().ByT5Tokenizer().save_pretrained(folder)
        return folder
    config = getattr(transformers(), f"{kind}Config")(**T5_SIZES, vocab_size=32128)
    getattr(transformers(), f"{kind}EncoderModel")(config).save_pretrained(folder)
    transformers().T5Tokenizer.from_pretrained(t5_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny-byt5", "ByT5"))


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder, sizes=(12, 12), prefix="train", change=lambda number, members: members):
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{prefix}-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                members = {"png": picture(number), "txt": CAPTIONS[number % len(CAPTIONS)].encode()}
                for suffix, data in change(number, members).items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return str(folder / f"{prefix}-*.tar")


def embed(shards, out, encoder, **settings):
    embedding = Embedding(open_shards(shards), out, encoder, Settings(**{"batch_size": 4, **settings}))
    return embedding.run(progress=False)


def laion(shards, out, **settings):
    return LaionDataModule(shards, image_size=SIZE, batch_size=6, text_states=out, **settings)


def make_stage(encoder, **text):
    torch.manual_seed(3)
    network = UNet(**SMALL, attention=[False, True], text_dim=encoder.dim)
    stage = BaseStage(SIZE, network, TextSettings(**{"encoder": encoder, "drop": 0.5, **text}), seed=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():  # layers that begin at zero would hide the text
        if parameter.abs().max() == 0:
            parameter.data.normal_(0, 0.2, generator=generator)
    return stage


class Losses(lightning.Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.train.append(outputs["loss"].item())

    def on_validation_end(self, trainer, stage):
        self.val.append(trainer.callback_metrics["val/loss"].item())


def fit(stage, data, steps=4, folder=None):
    losses = Losses()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_steps=steps,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        callbacks=[losses],
        default_root_dir=folder,
    )
    trainer.fit(stage, data)
    return losses


ENCODERS = {
    "tiny": lambda folder: TinyTextEncoder(12, max_tokens=9),
    "T5": lambda folder: T5TextEncoder(str(write_model(folder, "T5")), max_tokens=16),
    "T5 cleaned": lambda folder: T5TextEncoder(str(write_model(folder, "T5")), clean_captions=True),
    "UMT5": lambda folder: T5TextEncoder(str(write_model(folder, "UMT5"))),
    "ByT5": lambda folder: T5TextEncoder(str(write_model(folder, "ByT5")), max_tokens=64),
    "T5 attended": lambda folder: T5TextEncoder(str(write_model(folder, "T5")), max_tokens=20, padding="attended"),
}


@pytest.mark.filterwarnings("ignore:.*captions so far were cut")
@pytest.mark.parametrize("name", ENCODERS)
def test_batches_bring_the_states_that_the_encoder_gives(tmp_path, name):
    encoder = ENCODERS[name](tmp_path / "model")
    shards = write_shards(tmp_path / "shards")
    embed(shards, tmp_path / "states", encoder)
    batch = next(iter(laion(shards, tmp_path / "states").train_dataloader()))
    assert len(set(batch.captions)) > 2
    live = encoder(batch.captions)
    length = batch.text.states.shape[1]
    if live.mask is None:
        assert batch.text.mask is None
    else:
        assert length == live.mask.sum(1).max()
        assert torch.equal(batch.text.mask, live.mask[:, :length])
        assert not live.mask[:, length:].any()
    rounding = HALF * live.states.abs().max().item()
    torch.testing.assert_close(batch.text.states, live.states[:, :length], rtol=0, atol=rounding + 1e-5)
    torch.testing.assert_close(batch.text.pooled, live.pooled, rtol=0, atol=rounding + 1e-5)
    torch.testing.assert_close(
        batch.empty.states, encoder([""]).states[:, : batch.empty.states.shape[1]], rtol=1e-3, atol=1e-3
    )
    assert batch.text.states.dtype == torch.float32


@pytest.mark.parametrize("null_text", ["zero", "learned", "empty_caption"])
def test_training_is_that_with_the_encoder_and_loads_none_of_its_weights(tmp_path, byt5, null_text):
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    embed(shards, states, T5TextEncoder(byt5))
    live = fit(make_stage(T5TextEncoder(byt5), null_text=null_text), laion(shards, None, val=shards))
    bare = tmp_path / "tiny-byt5"
    shutil.copytree(byt5, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read the weights"):
        T5TextEncoder(str(bare))(["a"])
    stored = fit(make_stage(T5TextEncoder(str(bare)), null_text=null_text), laion(shards, states, val=shards))
    assert len(live.train) == 4
    assert len(set(live.train)) == 4
    np.testing.assert_allclose(stored.train, live.train, rtol=5e-5)
    np.testing.assert_allclose(stored.val, live.val, rtol=5e-5)
    other = fit(make_stage(T5TextEncoder(byt5), null_text=null_text, drop=1.0), laion(shards, None, val=shards))
    assert np.abs(np.array(other.val) - live.val).max() > 4e-3 * live.val[0]  # the text does count


def test_all_captions_of_a_sample_are_stored_and_workers_read_the_same(tmp_path):
    encoder = TinyTextEncoder(12)
    lines = b"a red star\na blue circle\na green ring"
    shards = write_shards(tmp_path / "shards", change=lambda number, members: {**members, "txt": lines})
    result = embed(shards, tmp_path / "states", encoder)
    assert result.num_captions == 2 * 4  # in each shard three and the empty one
    batches = []
    for num_workers in (0, 2):
        loader = iter(laion(shards, tmp_path / "states", num_workers=num_workers).train_dataloader())
        batches.append([next(loader) for _ in range(6)])
    captions = [batch.captions for batch in batches[0]]
    assert len({caption for part in captions for caption in part}) == 3
    assert captions == [batch.captions for batch in batches[1]]
    plain = iter(laion(shards, None).train_dataloader())
    assert captions == [next(plain).captions for _ in range(6)]
    for one, other in zip(*batches):
        assert torch.equal(one.text.states, other.text.states)
        assert torch.equal(one.text.states, encoder(one.captions).states[:, :3].half().float())


def test_a_caption_without_states_is_left_out_and_counted(tmp_path):
    shards = write_shards(tmp_path / "shards", (60,), change=lambda n, m: {**m, "txt": b"number %d" % n})
    encoder = TinyTextEncoder(12)
    embed(shards, tmp_path / "states", encoder)
    write_shards(
        tmp_path / "shards", (60,), change=lambda n, m: {**m, "txt": b"number %d" % (n + 100 * (n in (8, 41)))}
    )
    data = laion(shards, tmp_path / "states", val=shards, max_skip_share=0.1)
    fit(make_stage(encoder), data, 12, tmp_path)
    assert data.train_skips.counts == data.val_skips.counts == {Reason.NO_TEXT_STATES.value: 2}
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in listed} == {"0008", "0041"}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_damaged_states_are_left_out_and_counted(tmp_path, dtype):
    shards = write_shards(tmp_path / "shards", (60,), change=lambda n, m: {**m, "txt": b"number %d" % n})
    encoder = TinyTextEncoder(12)
    embed(shards, tmp_path / "states", encoder, dtype=dtype)
    path = tmp_path / "states" / "train-000.safetensors"
    tensors, header = load_file(path), path.read_bytes()
    (tensors["scales"] if dtype == "int8" else tensors["states"])[5] = float("nan")
    length = 8 + int.from_bytes(header[:8], "little")
    order = [name for name in ("offsets", "scales", "states", "captions") if name in tensors]
    path.write_bytes(header[:length] + b"".join(tensors[name].numpy().tobytes() for name in order))
    data = laion(shards, tmp_path / "states", max_skip_share=0.1)
    fit(make_stage(encoder), data, 12)
    assert data.train_skips.counts == {Reason.NAN_TEXT_STATES.value: 1}


def refused(stage, data, message, folder):
    trainer = lightning.Trainer(accelerator="cpu", logger=False, barebones=True, max_steps=2, default_root_dir=folder)
    with pytest.raises(InputError, match=message):
        trainer.fit(stage, data)
    assert trainer.global_step == 0


def test_states_of_another_encoder_are_refused_before_training(tmp_path, byt5):
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    encoder = T5TextEncoder(byt5)
    embed(shards, states, encoder)
    data = laion(shards, states)
    own = encoder.name
    assert fit(make_stage(encoder), laion(shards, states), 1).train

    def check(other, message):
        refused(make_stage(other), data, f"not those of the stage's encoder: {message}", tmp_path)

    check(TinyTextEncoder(12), rf"encoder is '{own}' there and 'tiny-bytes-d12-s0' in the stage")
    check(T5TextEncoder(byt5, max_tokens=64), r"max_tokens is '128' there and '64' in the stage \(encoders 'tiny-byt5")
    check(T5TextEncoder(byt5, clean_captions=True), rf"encoder is '{own}' there and '{own}\+clean'")
    check(T5TextEncoder(byt5, padding="attended"), rf"encoder is '{own}' there and '{own}\+padded'")
    other_weights = write_model(tmp_path / "tiny-byt5", "ByT5", seed=1)  # of the same name and configuration
    assert T5TextEncoder(str(other_weights)).name == own
    check(T5TextEncoder(str(other_weights)), r"weights is '[0-9a-f]{16}' there and '[0-9a-f]{16}' in the stage")
    shutil.copytree(byt5, other_weights, dirs_exist_ok=True)
    assert fit(make_stage(T5TextEncoder(str(other_weights))), laion(shards, states), 1).train


def test_another_tokenizer_is_another_encoder(tmp_path):
    model = write_model(tmp_path / "model", "T5")
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    encoder = T5TextEncoder(str(model))
    embed(shards, states, encoder)
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    (one,) = (i for i, piece in enumerate(vocabulary) if piece[0] == "▁star")
    (two,) = (i for i, piece in enumerate(vocabulary) if piece[0] == "▁circle")
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    refused(make_stage(T5TextEncoder(str(model))), laion(shards, states), "tokenizer is '[0-9a-f]{16}' there", tmp_path)


def test_the_tokenizer_is_the_same_from_either_of_its_files(tmp_path):
    model = write_model(tmp_path / "model", "T5")
    own = T5TextEncoder(str(model)).identity()
    for file in model.glob("tokenizer*"):
        file.unlink()
    copy_tokenizer(model)
    assert T5TextEncoder(str(model)).identity() == own


def test_another_precision_is_told_and_goes_on(tmp_path, byt5, caplog):
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    embed(shards, states, T5TextEncoder(byt5, dtype="bfloat16"))
    assert fit(make_stage(T5TextEncoder(byt5)), laion(shards, states), 1).train
    assert "made in bfloat16 and the stage's encoder works in float32" in caplog.text


def test_a_stage_without_text_refuses_states(tmp_path):
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    embed(shards, states, TinyTextEncoder(12))
    stage = BaseStage(SIZE, UNet(**SMALL, attention=[False, True], text_dim=None))
    refused(stage, laion(shards, states), "the stage takes no text: drop text_states", tmp_path)


def test_states_within_the_shards_must_be_of_the_stages_encoder(tmp_path):
    def with_states(number, members):
        buffer = io.BytesIO()
        np.savez(buffer, states=np.ones((2, 12), np.float16), encoder=np.array("t5"))
        return {**members, "text.npz": buffer.getvalue()}

    shards = write_shards(tmp_path / "shards", change=with_states)
    refused(
        make_stage(TinyTextEncoder(12)),
        laion(shards, None),
        "of encoder 't5' and the stage's encoder is 'tiny",
        tmp_path,
    )
    embed(shards, tmp_path / "states", TinyTextEncoder(12))
    batch = next(iter(laion(shards, tmp_path / "states").train_dataloader()))  # in place of the shards' own
    assert batch.text.states.std() > 0.1


def test_what_is_missing_is_named_at_setup(tmp_path):
    shards, states = write_shards(tmp_path / "shards", (3, 3, 3)), tmp_path / "states"
    with pytest.raises(InputError, match=r"states' match no file .*shards embed` writes them"):
        laion(shards, states).setup("fit")
    embed(shards, states, TinyTextEncoder(12))
    (states / "train-001.safetensors").unlink()
    with pytest.raises(InputError, match="lack shard 'train-001': run `imagen-lightning shards embed`"):
        laion(shards, states).setup("fit")
    (states / "train-002.safetensors").unlink()
    with pytest.raises(InputError, match="lack 2 of 3 shards, such as 'train-001'"):
        laion(shards, states).setup("fit")
    embed(shards, states, TinyTextEncoder(12))
    laion(shards, states / "train-*.safetensors").setup("fit")
    captioned_anew = {"change": lambda n, m: {**m, "json": json.dumps({"other": f"no {n}"}).encode()}}
    write_shards(tmp_path / "shards", (3, 3, 3), **captioned_anew)
    with pytest.raises(InputError, match=r"none of the first 9 captions, .* caption_field null, the data's is other"):
        laion(shards, states, caption_field="other").setup("fit")


def test_files_of_two_encoders_are_refused(tmp_path):
    shards, states = write_shards(tmp_path / "shards"), tmp_path / "states"
    embed(shards, states, TinyTextEncoder(12))
    (states / "train-001.safetensors").unlink()
    embed(str(tmp_path / "shards" / "train-001.tar"), states, TinyTextEncoder(12, seed=1))
    with pytest.raises(
        InputError, match=r"of two encoders: encoder is 'tiny-bytes-d12-s1' in .*001.* and '.*-s0' in .*000"
    ):
        laion(shards, states).setup("fit")
    folders = tmp_path / "*" / "*.safetensors"
    shutil.copytree(states, tmp_path / "copy")
    with pytest.raises(InputError, match="two files of text states for shard 'train-000'"):
        TextStates(folders, ["train-000"])


def test_a_shard_that_is_cut_meanwhile_gets_no_file(tmp_path):
    shards = write_shards(tmp_path / "shards", (30, 30))
    embedding = Embedding(open_shards(shards), tmp_path / "states", TinyTextEncoder(12), Settings())
    path = tmp_path / "shards" / "train-001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"train-001\.tar' cannot be read to its end"):
        embedding.run(progress=False)
    assert [file.name for file in (tmp_path / "states").iterdir()] == ["train-000.safetensors"]


def test_no_more_than_64_files_are_open(tmp_path):
    stems = [f"s{number:03d}" for number in range(80)]
    encoder = TinyTextEncoder(4)
    write_shards(tmp_path / "shards", (1,))
    embed(str(tmp_path / "shards" / "train-000.tar"), tmp_path / "states", encoder)
    for stem in stems:
        shutil.copy(tmp_path / "states" / "train-000.safetensors", tmp_path / "states" / f"{stem}.safetensors")
    states = TextStates(tmp_path / "states", stems)
    first = [states.read(stem, "").states for stem in stems]
    assert sum(file._file is not None for file in states._states.values()) <= 65  # the first was opened for ""
    assert all(torch.equal(states.read(stem, "").states, first[0]) for stem in reversed(stems))
