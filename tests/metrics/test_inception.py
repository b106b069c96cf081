"""Inception against torch-fidelity and torchmetrics on shared random weights, and what weights files are refused."""

import hashlib
import io
import pickle  # noqa: TID251  (to plant what must not run)

import pytest
import torch
from torch import nn

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features import InceptionFeatures, extract
from imagen_lightning.metrics.features.inception import PUBLISHED, build_inception
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.kid import kernel_distance


def pictures(num, size=64, seed=0, shift=0.0):
    """Smooth random pictures, uint8."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 3, 8, 8, generator=generator) + shift * torch.rand(num, 3, 1, 1, generator=generator)
    return (nn.functional.interpolate(low, (size, size), mode="bilinear") * 160).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's Inception with random weights that keep features apart, in its file's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)
            elif name.endswith("bn.bias"):
                nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(dict(network.state_dict()), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_agrees_with_torch_fidelity_on_shared_weights(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    path, sha256 = inception
    before = torch.get_rng_state()
    ours = InceptionFeatures(path, sha256=sha256)
    sets = [pictures(12, 32, seed=1), pictures(12, 32, seed=2, shift=0.5)]
    found = [extract(ours, x, 5) for x in sets]
    assert torch.equal(torch.get_rng_state(), before)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    expected = [theirs(x) for x in sets]
    for x, (features, logits) in zip(found, expected):
        assert torch.allclose(x, features, rtol=1e-4, atol=1e-5 * float(features.max()))
        assert torch.allclose(ours.logits(x), logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    reference = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x, _ in expected), False)
    distance = frechet_distance(*map(FeatureMoments.of, found))
    assert distance == pytest.approx(reference["frechet_inception_distance"], rel=1e-6)
    kernel = kid_features_to_metric(*(x for x, _ in expected), kid_subsets=1, kid_subset_size=12, verbose=False)
    assert kernel_distance(*found, num_subsets=1, subset_size=12).value == pytest.approx(
        kernel["kernel_inception_distance_mean"], rel=1e-4
    )


def test_inception_agrees_with_torchmetrics_on_shared_weights(inception):
    from torchmetrics.image.fid import FrechetInceptionDistance

    path, sha256 = inception
    ours = InceptionFeatures(path, layer="64", sha256=sha256)
    sets = [pictures(70, 32, seed=1), pictures(75, 32, seed=2, shift=0.5)]
    theirs = FrechetInceptionDistance(feature=64, feature_extractor_weights_path=str(path), antialias=False)
    for real, x in zip((True, False), sets):
        for part in x.split(25):
            theirs.update(part, real=real)
    distance = frechet_distance(*(FeatureMoments.of(extract(ours, x, 25)) for x in sets))
    assert distance == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_only_published_weights_and_features_are_called_fid(inception):
    path, sha256 = inception
    ours = InceptionFeatures(path, sha256=sha256)
    assert (ours.distance_name, ours.kernel_name) == ("FD-inception-v3-compat", "KD-inception-v3-compat")
    assert InceptionFeatures(path, layer="64", sha256=sha256).distance_name == "FD-inception-v3-compat-64"
    published = InceptionFeatures(path)
    published.__dict__["_loaded"] = (None, PUBLISHED.sha256)
    assert (published.distance_name, published.kernel_name) == ("FID", "KID")
    assert ours.name == published.name == "inception-v3-compat"
    assert ours.sha256 == sha256


def test_what_inception_refuses(inception, tmp_path, monkeypatch):
    path, sha256 = inception
    with pytest.raises(InputError, match=f"has SHA-256 {sha256}, not {PUBLISHED.sha256}; give the right file, or its"):
        InceptionFeatures(path)(pictures(1))
    with pytest.raises(InputError, match="there is no file"):
        InceptionFeatures(tmp_path / "absent.pth")(pictures(1))
    with pytest.raises(InputError, match="layer '100' is unknown"):
        InceptionFeatures(path, layer="100")
    with pytest.raises(InputError, match="needs the layer '2048', not '64'"):
        InceptionFeatures(path, layer="64", sha256=sha256).logits(torch.zeros(1, 64))
    with pytest.raises(InputError, match="those of another network"):
        build_inception({"weight": torch.zeros(1)}, "2048")
    # torch.hub's folder, where the published file would lie
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match=r"cannot be downloaded .*no network.*: give the path of a local copy, or put"):
        InceptionFeatures()(pictures(1))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"cut short")
    with pytest.raises(InputError, match="remove it or fetch"):
        InceptionFeatures()(pictures(1))


def test_weights_are_never_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name, write in (("zip.pth", torch.save), ("plain.pth", lambda x, p: p.write_bytes(pickle.dumps(x)))):
        path = tmp_path / name
        write({"weight": Payload()}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(InputError, match="cannot be read as tensors alone; it is damaged or unsafe"):
            InceptionFeatures(path, sha256=digest)(pictures(1))
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    digest = hashlib.sha256((tmp_path / "list.pth").read_bytes()).hexdigest()
    with pytest.raises(InputError, match="is no state_dict of tensors"):
        InceptionFeatures(tmp_path / "list.pth", sha256=digest)(pictures(1))


def test_extractors_reach_no_state_dict(inception):
    path, sha256 = inception

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(2, 2)
            self.features = InceptionFeatures(path, sha256=sha256)

    stage = Stage()
    stage.features(pictures(1))
    assert set(stage.state_dict()) == {"network.weight", "network.bias"}
    assert len(list(stage.parameters())) == 2
