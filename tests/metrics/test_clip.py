"""CLIP from a local folder: features, captions longer than it reads, scores against torchmetrics."""

import json
import warnings

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.features import ClipFeatures, extract
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vocabulary():
    """A tokenizer that reads letters: one token each, and one for a letter that ends a word."""
    bytes_ = [chr(i) for i in range(256, 512)]  # fills up to the size of a real vocabulary's byte tokens
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *bytes_]
    return {token: i for i, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with random weights, saved as the hub has it."""
    import imagen_lightning.torchvision_mend  # noqa: F401

    # isort: split
    import transformers

    vocab = vocabulary()
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": vocab["<|endoftext|>"], "bos_token_id": vocab["<|startoftext|>"]}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(vocab), "pad_token_id": vocab["<|endoftext|>"]},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(path)
    return path


def pictures(num, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(low, (size, size), mode="bilinear") * 255).to(torch.uint8)


def test_features_are_those_of_transformers(folder):
    import transformers

    clip = ClipFeatures(folder)
    x = pictures(5)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        expected = model.get_image_features(**processor(images=list(x), return_tensors="pt")).pooler_output
    found = extract(clip, x, 2)
    assert found.shape == (5, clip.num_features)
    assert clip.num_features == 16
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    assert clip.resize_filter.startswith("antialiased bicubic to 32 px, centre crop, mean 0.4815 0.4578 0.4082, std")
    assert (clip.name, clip.distance_name, clip.kernel_name) == ("tiny-clip", "CLIP-FID", "CLIP-KID")
    assert clip(x[:0]).shape == (0, 16)
    assert clip.text_features([]).shape == (0, 16)


def test_clip_fid_is_the_distance_of_its_features(folder):
    clip = ClipFeatures(folder)
    moments = [FeatureMoments.of(clip(pictures(30, seed=seed))) for seed in (0, 1)]
    assert frechet_distance(*moments) > 0


def test_the_hash_is_of_the_weights(folder, tmp_path):
    import transformers

    clip = ClipFeatures(folder)
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "shards" / name).write_bytes((folder / name).read_bytes())
    assert ClipFeatures(tmp_path / "shards").sha256 == clip.sha256
    model = transformers.CLIPModel.from_pretrained(folder)
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "shards")
    assert ClipFeatures(tmp_path / "shards").sha256 != clip.sha256


def test_the_end_mark_stays_on_captions_that_are_cut(folder):
    import transformers

    clip = ClipFeatures(folder)
    start = "abcdefghij" * 7 + "abcde"  # 75 letters: 77 tokens with both marks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = clip.text_features([start])
    assert clip.num_cut == 0
    with pytest.warns(UserWarning, match="2 of 4 captions so far were cut to CLIP's 77 tokens"):
        longer = clip.text_features([start[:-1] + "exyz", start[:-1] + "exy" * 100, "ab"])
    assert clip.num_cut == 2
    # What is read is the first 75 letters and the end mark, whatever followed. The last letter kept is in the middle
    # of its word there.
    assert torch.allclose(longer[0], longer[1], atol=1e-5)
    assert not torch.allclose(longer[0], longer[2], atol=1e-2)
    ids = transformers.AutoTokenizer.from_pretrained(folder)([start], truncation=True, max_length=77)["input_ids"][0]
    assert len(ids) == 77
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output
        without = model.get_text_features(input_ids=torch.tensor([ids[:-1] + ids[1:2]])).pooler_output
    assert torch.allclose(whole, expected, atol=1e-5)
    # a caption that lost its end mark, as torchmetrics cuts it, is read out at the wrong place
    assert not torch.allclose(whole, without, atol=1e-2)


def test_a_captions_embedding_does_not_depend_on_its_neighbours(folder):
    clip = ClipFeatures(folder)
    alone = torch.cat([clip.text_features([text]) for text in ("a cat", "the dog and the cat", "\ud800")])
    assert torch.allclose(clip.text_features(["a cat", "the dog and the cat", "\ud800"]), alone, atol=1e-5)


def test_scores_agree_with_torchmetrics(folder):
    import transformers
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    clip = ClipFeatures(folder)
    x, captions = pictures(5), ["a cat", "the dog", "b", "red square", "x y z"]
    found = clip_scores(clip, x, captions, batch_size=2)

    class Model(torch.nn.Module):
        """transformers' model as transformers 4 had it, which torchmetrics expects."""

        def __init__(self):
            super().__init__()
            self.model = transformers.CLIPModel.from_pretrained(folder).eval()
            self.config = self.model.config

        def get_image_features(self, *args):
            return self.model.get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return self.model.get_text_features(*args).pooler_output

    with torch.no_grad():
        processor = transformers.CLIPProcessor(
            transformers.CLIPImageProcessor.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
        )
        expected, _ = _clip_score_update(x, captions, Model(), processor)
    assert torch.allclose(found, expected.double(), atol=1e-3)
    assert found.dtype == torch.float64
    assert clip_scores(clip, x[:0], []).shape == (0,)
    with pytest.raises(InputError, match="5 images but 2 captions"):
        clip_scores(clip, x, captions[:2])


def test_nothing_is_loaded_before_use_and_no_generator_moves(folder):
    before = torch.get_rng_state()
    ClipFeatures("/nowhere/clip")
    clip_scores(ClipFeatures(folder), pictures(1), ["a"])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_models_are_refused(folder, tmp_path):
    x = pictures(1)
    with pytest.raises(InputError, match=r"CLIP folder '/nowhere/clip' does not exist; give the folder that holds"):
        ClipFeatures("/nowhere/clip")(x)
    with pytest.raises(
        InputError, match=r"cannot get the preprocessor_config.json of CLIP 'openai/none' in the cache or"
    ):
        ClipFeatures("openai/none")(x)
    with pytest.raises(
        InputError, match=r"cannot get the config.json of CLIP 'openai/none' in the cache or on Hugging"
    ):
        ClipFeatures("openai/none").sha256  # noqa: B018
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="is a 'bert' model; give a CLIP"):
        ClipFeatures(tmp_path / "bert").text_features(["a"])
    # a folder without weights, without a vocabulary
    (tmp_path / "part").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "part" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match=r"cannot get the weights of CLIP .*part' in its folder"):
        ClipFeatures(tmp_path / "part")(x)
    with pytest.raises(InputError, match=r"tokenizer"):
        ClipFeatures(tmp_path / "part").text_features(["a"])
