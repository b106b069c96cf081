"""Extractors that need no Hugging Face model: random convolutions, files, descriptions in YAML."""

import hashlib

import pytest
import torch
from torch import nn

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features import (
    ClipFeatures,
    FeatureExtractor,
    RandomConvFeatures,
    TorchScriptFeatures,
    extract,
    load_extractor,
)
from imagen_lightning.metrics.features.base import exact_float32
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance


def pictures(num, size=64, seed=0, shift=0.0):
    """Smooth random pictures, uint8."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 3, 8, 8, generator=generator) + shift * torch.rand(num, 3, 1, 1, generator=generator)
    return (nn.functional.interpolate(low, (size, size), mode="bilinear") * 160).clamp(0, 255).to(torch.uint8)


class Tiny(nn.Module):
    """Means of the channels and of their squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1)


def torchscript(path, module=None):
    torch.jit.save(torch.jit.script(module or Tiny()), str(path))
    return path


# ---- random convolutions


def test_random_features_are_a_function_of_the_seed():
    before = torch.get_rng_state()
    features = RandomConvFeatures()
    x = pictures(5)
    found = features(x)
    assert found.shape == (5, features.num_features)
    assert torch.equal(torch.get_rng_state(), before)
    # these very weights are the extractor: a change would part its values from those recorded
    assert features.sha256 == "510f9c0be81fa238a87343969c7d6db4817f14781ed7aa2f601f251dc7508395"
    assert torch.allclose(RandomConvFeatures()(x), found, rtol=1e-6)
    assert RandomConvFeatures(1).sha256 != features.sha256
    assert (RandomConvFeatures(1).name, features.name) == ("random-conv-1", "random-conv-0")
    assert torch.allclose(extract(features, x, batch_size=2), found, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="at least 0, not -1"):
        RandomConvFeatures(-1)


def test_distances_of_random_features_are_never_called_fid():
    assert RandomConvFeatures().distance_name == "FD-random"
    assert RandomConvFeatures().kernel_name == "KD-random"


def test_random_features_order_pictures_by_their_damage():
    features = RandomConvFeatures()
    reference = FeatureMoments.of(features(pictures(200, seed=1)))
    clean = pictures(200, seed=2)
    noise = 40 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(FeatureMoments.of(features((clean + share * noise).clamp(0, 255).to(torch.uint8))), reference)
        for share in (0, 0.25, 0.5, 1)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 20 * distances[0]


# ---- files


def test_torchscript_features(tmp_path):
    path = torchscript(tmp_path / "tiny.pt")
    plain = TorchScriptFeatures(path, size=16)
    x = pictures(3, 16)
    unit = x.double() / 255
    expected = torch.cat([unit.mean(dim=(2, 3)), unit.square().mean(dim=(2, 3))], dim=1)
    assert torch.allclose(plain(x).double(), expected, rtol=1e-5)
    assert plain.num_features == 6
    assert plain.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (plain.name, plain.distance_name) == ("tiny.pt", "FD-tiny.pt")
    assert plain.resize_filter == "antialiased bilinear to 16 px, range 0..1, mean 0 0 0, std 1 1 1"
    named = TorchScriptFeatures(path, size=16, name="mine", sha256=plain.sha256)
    assert torch.equal(named(x), plain(x))
    assert named.distance_name == "FD-mine"


def test_preprocessing_is_as_the_words_say(tmp_path):
    path = torchscript(tmp_path / "tiny.pt")
    x = pictures(2, 24)
    made = TorchScriptFeatures(path, 8, "area", "-1..1", mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)).prepare(x).double()
    area = x.double().reshape(2, 3, 8, 3, 8, 3).mean(dim=(3, 5)) / 127.5 - 1
    mean, std = (torch.tensor(row).double().view(1, 3, 1, 1) for row in ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)))
    assert torch.allclose(made, (area - mean) / std, atol=1e-5)
    assert torch.equal(TorchScriptFeatures(path, 24, value_range="0..255").prepare(x), x.float())
    from PIL import Image

    from imagen_lightning.images import from_pil, to_pil

    # the antialiased filters are Pillow's
    for words, filter_ in (("antialiased bicubic", Image.BICUBIC), ("antialiased bilinear", Image.BILINEAR)):
        made = TorchScriptFeatures(path, 10, words, "0..255").prepare(x)
        expected = torch.stack([from_pil(to_pil(image).resize((10, 10), filter_)) for image in x])
        assert (made.round() - expected.float()).abs().max() <= 1


def test_what_files_are_refused(tmp_path):
    path = torchscript(tmp_path / "tiny.pt")
    x = pictures(2, 16)
    (tmp_path / "junk").write_bytes(b"junk")
    for make, message in [
        (lambda: TorchScriptFeatures(path, 16, "lanczos"), "resize_filter 'lanczos' .* unknown; use one of nearest"),
        (lambda: TorchScriptFeatures(path, 16, value_range="1"), "value_range '1' .* unknown; use one of 0..1"),
        (lambda: TorchScriptFeatures(path, 0), "needs a size above 0"),
        (lambda: TorchScriptFeatures(path, 16, std=(1, 0, 1)), "three std other than 0"),
        (lambda: TorchScriptFeatures(tmp_path / "absent", 16)(x), "cannot be read: No such file"),
        (lambda: TorchScriptFeatures(path, 16, sha256="0" * 64)(x), f"not {'0' * 64}; it is not opened"),
        (lambda: TorchScriptFeatures(tmp_path / "junk", 16)(x), "no TorchScript; make it by torch.jit.save"),
        (
            lambda: TorchScriptFeatures(torchscript(tmp_path / "map.pt", nn.ReLU()), 16)(x),
            r"gives \(2, 3, 16, 16\) for 2",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            make()


# ---- descriptions


def test_an_extractor_from_yaml(tmp_path):
    path = torchscript(tmp_path / "tiny.pt")
    file = tmp_path / "extractor.yaml"
    file.write_text(
        f"class_path: imagen_lightning.metrics.features.TorchScriptFeatures\n"
        f"init_args: {{path: {path}, size: 16, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], value_range: 0..1}}\n"
    )
    found = load_extractor(file)
    same = TorchScriptFeatures(path, 16, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert torch.equal(found(pictures(2)), same(pictures(2)))
    assert found.resize_filter == same.resize_filter
    file.write_text("class_path: imagen_lightning.metrics.features.RandomConvFeatures\n")
    assert load_extractor(file).sha256 == RandomConvFeatures().sha256


def test_what_descriptions_are_refused(tmp_path):
    own = "imagen_lightning.metrics.features"
    file = tmp_path / "extractor.yaml"
    for text, message in [
        (": :", "is not valid YAML"),
        ("[1]", "needs class_path and init_args"),
        ("{class_path: a.b, seed: 1}", "needs class_path and init_args, and nothing else"),
        ("{class_path: os.system}", "not part of imagen_lightning; if you trust the package 'os'"),
        (
            f"{{class_path: {own}.FeatureExtractor}}",
            "no feature extractor; .* there are ClipFeatures, InceptionFeatures",
        ),
        (f"{{class_path: {own}.extract}}", "no feature extractor"),
        (f"{{class_path: {own}.load.Path}}", "is not a part of a stage"),
        (f"{{class_path: {own}.RandomConvFeatures, init_args: {{color: 1}}}}", "unexpected keyword argument 'color'"),
        (f"{{class_path: {own}.RandomConvFeatures, init_args: [1]}}", "must be names and values"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_extractor(file)
    with pytest.raises(InputError, match="cannot be read"):
        load_extractor(tmp_path / "absent.yaml")


# ---- all of them


def test_extractors_do_not_depend_on_the_precision_around_them():
    x = pictures(4)
    features = RandomConvFeatures()
    plain = features(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = features(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert not features(x).requires_grad


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_off_inside_and_as_before_after(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        conv = torch.backends.cudnn.allow_tf32
        # only the flags: no GPU is asked for
        with exact_float32(torch.device("cuda")):
            if hasattr(torch.backends.cudnn, "conv"):
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == conv
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_pictures_are_refused():
    features = RandomConvFeatures()
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8).byte()):
        with pytest.raises(InputError, match=r"features need uint8 images \(B, 3, H, W\), not"):
            features(x)
    assert features(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 224)
    assert extract(features, torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 224)
    with pytest.raises(TypeError):
        FeatureExtractor()
    assert ClipFeatures("openai/clip-vit-large-patch14").distance_name == "CLIP-FID"
