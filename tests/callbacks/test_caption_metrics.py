"""CLIP score and caption accuracy while a stage trains: those of the metric functions on the same images."""

import pytest
import torch

from imagen_lightning.callbacks import EMA, CaptionAccuracy, Checkpoint, CLIPScore
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.shapes import sample
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import to_uint8
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.confidence import bootstrap_mean, wilson
from imagen_lightning.metrics.features import ClipFeatures
from imagen_lightning.types import InputError

PROMPTS = [sample(0, number, "val")[1] for number in range(5)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, whose tokenizer reads letters."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), *(chr(i) for i in range(256, 512))]
    vocab = {token: i for i, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"eos_token_id": vocab["<|endoftext|>"], "bos_token_id": vocab["<|startoftext|>"]}
    text = {**sizes, **ends, "vocab_size": len(vocab), "pad_token_id": vocab["<|endoftext|>"]}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        path
    )
    return path


def drawn(stage):
    generators = [seeded_generator(0, i, stage=0) for i in range(len(PROMPTS))]
    return to_uint8(stage.sample(PROMPTS, generators, num_steps=2))


def test_they_are_those_of_the_metric_functions(fit, clip_folder, tmp_path, read_values):
    clip = ClipFeatures(clip_folder)
    shared = {"prompts": PROMPTS, "num_steps": 2}
    callbacks = [EMA(), CLIPScore(clip, **shared), CaptionAccuracy(**shared), Checkpoint()]
    stage, _ = fit(callbacks, steps=2)
    images = drawn(stage)
    score, accuracy = read_values(tmp_path)
    scores = clip_scores(clip, images, PROMPTS)
    assert score["name"] == "base/clip_score"
    assert score["value"]["value"] == pytest.approx(scores.mean().item(), rel=1e-6)
    assert (score["value"]["low"], score["value"]["high"]) == pytest.approx(bootstrap_mean(scores), rel=1e-6)
    assert score["value"]["protocol"]["extractor_sha256"] == clip.sha256
    right = caption_accuracy(images, PROMPTS).all
    assert accuracy["name"] == "base/caption_accuracy"
    assert accuracy["value"]["value"] == right.double().mean().item()
    assert (accuracy["value"]["low"], accuracy["value"]["high"]) == wilson(int(right.sum()), 5)
    assert accuracy["value"]["protocol"]["num_samples"] == 5
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    names = [*checkpoint["state_dict"], *checkpoint["current_model_state"], *map(str, checkpoint["callbacks"])]
    assert not any("clip" in name.lower() for name in names)
    fit([EMA(), Checkpoint()], steps=2, folder=tmp_path / "without")
    sizes = [(folder / "checkpoints/last.ckpt").stat().st_size for folder in (tmp_path, tmp_path / "without")]
    assert sizes[0] < sizes[1] + 20_000 < sizes[1] + sum(4 * w.numel() for w in clip._model.parameters())


def test_right_pictures_are_right(fit, make_base, make_data, tmp_path, read_values):
    data = make_data(image_size=64, num_val=8)
    truth = {sample.caption: sample.image for sample in map(data.validation_set().__getitem__, range(8))}
    captions = list(truth)

    class Shows:
        def __call__(self, denoise, x, times, **_):
            return torch.stack([truth[caption] for caption in captions[: len(x)]]) / 127.5 - 1

    stage = make_base()
    stage.image_size = 64
    stage.sampling.sampler = Shows()
    fit([CaptionAccuracy(num_samples=8)], steps=1, stage=stage, datamodule=data)
    (entry,) = read_values(tmp_path)
    assert entry["value"]["value"] == 1.0


def test_what_cannot_be_measured_is_refused_before_the_first_step(fit, make_shards, tmp_path):
    shards = make_shards(tmp_path / "train.tar", range(8), caption="a dog")
    data = LaionDataModule(shards, shards, image_size=8, batch_size=4)
    with pytest.raises(InputError, match=r"CaptionAccuracy is for the built-in shapes alone: .*a dog"):
        fit([CaptionAccuracy()], datamodule=data, folder=tmp_path / "run")
    with pytest.raises(InputError, match=r"CLIP folder '.*nowhere' does not exist"):
        fit([CLIPScore(ClipFeatures(tmp_path / "nowhere"))])
