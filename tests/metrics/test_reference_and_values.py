"""References kept in files, and values that carry their whole protocol."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.digests import digest_tensors
from imagen_lightning.metrics.features import RandomConvFeatures
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.precision_recall import precision_recall
from imagen_lightning.metrics.protocol import Protocol, refuse_mixed
from imagen_lightning.metrics.reference import (
    Reference,
    ReferenceKey,
    cached,
    measure_reference,
    read_reference,
    write_reference,
)
from imagen_lightning.metrics.values import (
    clip_score_value,
    frechet_value,
    inception_score_value,
    kernel_value,
    mean_value,
    precision_recall_values,
    share_value,
)

MADE = Protocol("none", image_size=16, prompts="p" * 64, weights="ema", precision="float32", guidance=2, seed=3)


def pictures(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 16, 16), generator=generator, dtype=torch.uint8)


def batches(images, size=7):
    return list(zip(images.split(size), torch.arange(len(images)).split(size)))


@pytest.fixture
def reference():
    images = pictures(40)
    return measure_reference(RandomConvFeatures(), batches(images), digest_tensors([images]), 16, name="noise")


def test_a_reference_is_measured_once_and_read_back(tmp_path, reference):
    images, extractor = pictures(40), RandomConvFeatures()
    data = digest_tensors([images])
    first = measure_reference(extractor, batches(images), data, 16, name="noise", cache=tmp_path)
    assert torch.equal(first.features, extractor(images)) or torch.allclose(
        first.features, extractor(images), rtol=1e-5
    )
    assert torch.allclose(first.moments.mean, first.features.double().mean(0))

    def unread():
        raise AssertionError("the pictures are read again")
        yield

    again = measure_reference(extractor, unread(), data, 16, cache=tmp_path)
    assert again.name == "noise"
    assert again.moments.count == 40
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.moments.scatter, first.moments.scatter)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    # without the features the sums are kept alone
    write_reference(tmp_path / "sums", replace(first, features=None))
    assert read_reference(tmp_path / "sums", first.key).features is None


def test_anything_a_reference_depends_on_makes_another(tmp_path):
    key = ReferenceKey("d", 16, "bilinear", "e")
    others = [
        replace(key, data="f"),
        replace(key, image_size=32),
        replace(key, resize_filter="area"),
        replace(key, extractor_sha256="g"),
    ]
    assert len({item.digest for item in [key, *others]}) == 5
    moments = FeatureMoments.of(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))
    write_reference(tmp_path / "file", Reference(key, moments))
    for other in others:
        with pytest.raises(InputError, match=r"reference statistics .* have .*, not .*; delete the file"):
            read_reference(tmp_path / "file", other)


def test_a_sample_counts_once(reference):
    images = pictures(40)
    twice = [*batches(images), *batches(images[:10])]
    found = measure_reference(RandomConvFeatures(), twice, reference.key.data, 16)
    assert found.moments.count == 40
    assert torch.allclose(found.moments.scatter, reference.moments.scatter)


def test_damaged_files_are_refused(tmp_path, reference):
    path = tmp_path / "file"
    write_reference(path, reference)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for data in (whole[:-8], b"", b"junk", bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(InputError, match="are damaged; delete the file"):
            read_reference(path, reference.key)
    path.write_bytes(whole)
    assert b'count\\": 40' in whole
    path.write_bytes(whole.replace(b'count\\": 40', b'count\\": 41'))
    with pytest.raises(InputError, match="are damaged; delete the file"):
        read_reference(path, reference.key)
    path.write_bytes(whole)
    save_file(load_file(path), tmp_path / "bare")
    with pytest.raises(InputError, match="are damaged; delete the file"):
        read_reference(tmp_path / "bare", reference.key)


def test_files_are_whole_and_nothing_is_overwritten(tmp_path, reference, monkeypatch):
    path = tmp_path / "folder" / "file"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_reference(path, reference)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()
    write_reference(path, reference)
    before = path.read_bytes()
    write_reference(path, replace(reference, name="other"))
    assert path.read_bytes() == before
    assert cached(tmp_path, reference.key, lambda: reference) is reference
    assert read_reference(tmp_path / "absent", reference.key) is None


def test_what_is_no_reference():
    extractor = RandomConvFeatures()
    with pytest.raises(InputError, match="at least 2 images, not 1"):
        measure_reference(extractor, batches(pictures(1)), "d", 16)
    with pytest.raises(InputError, match=r"reference of 32 px was given images of \(16, 16\) px"):
        measure_reference(extractor, batches(pictures(3)), "d", 32)


def test_values_carry_their_protocol_and_interval(reference):
    extractor = RandomConvFeatures()
    features = extractor(pictures(30, seed=1))
    distance = frechet_value(extractor, features, reference, MADE)
    assert distance.value == frechet_distance(FeatureMoments.of(features), reference.moments)
    kernel = kernel_value(extractor, features, reference, MADE)
    assert kernel.value == kernel_distance(features, reference.features).value
    precision, recall = precision_recall_values(extractor, features, reference, MADE)
    found = precision_recall(features, reference.features)
    assert (precision.value, recall.value) == (found.precision, found.recall)
    names = ["FD-random", "KD-random", "precision", "recall"]
    for name, value in zip(names, (distance, kernel, precision, recall)):
        assert value.metric == value.protocol.metric == name
        assert value.low < value.value < value.high or value.value in (0, 1)
        assert value.protocol.extractor == "random-conv-0"
        assert value.protocol.extractor_sha256 == extractor.sha256
        assert value.protocol.resize_filter == "antialiased bilinear to 64 px"
        assert value.protocol.num_samples == 30
        assert value.protocol.reference == reference.key.data
        assert value.protocol.reference_name == "noise"
        assert "reference of 40 at 16 px" in value.protocol.settings
        for field in ("image_size", "prompts", "weights", "precision", "guidance", "seed"):
            assert getattr(value.protocol, field) == getattr(MADE, field)
        json.dumps(value.to_json(), allow_nan=False)
    assert kernel.protocol.settings.startswith("100 subsets of 15, ")
    assert precision.protocol.settings.startswith("k=3, ")
    assert [v.confidence for v in (distance, kernel, precision)] == [
        "95% bootstrap",
        "1 std of KID subsets",
        "95% Wilson",
    ]
    assert frechet_value(extractor, features, reference, MADE, interval=False).low is None
    fewer = frechet_value(extractor, features[:20], reference, MADE)
    with pytest.raises(InputError, match="number of samples: 30 and 20"):
        refuse_mixed([distance, fewer])


def test_values_without_a_reference():
    extractor = RandomConvFeatures()
    scores = torch.tensor([20.0, 30.0, 40.0])
    clip = clip_score_value(extractor, scores, MADE)
    assert (clip.metric, clip.value, clip.protocol.num_samples) == ("CLIP score", 30, 3)
    assert clip.low <= 30 <= clip.high
    assert clip.protocol.extractor_sha256 == extractor.sha256
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    score = inception_score_value(extractor, logits, MADE)
    assert (score.protocol.settings, score.protocol.reference, score.confidence) == (
        "10 splits",
        None,
        "1 std of splits",
    )
    assert 1 < score.low < score.value < score.high < 6
    share = share_value("caption accuracy", torch.tensor([True, True, False, True]), MADE)
    assert (share.value, share.confidence) == (0.75, "95% Wilson")
    assert share.low < 0.75 < share.high
    assert mean_value("PSNR", torch.tensor([30.0]), MADE).confidence is None


def test_values_of_unfit_references(reference):
    extractor = RandomConvFeatures(1)
    features = extractor(pictures(30))
    with pytest.raises(InputError, match="measured by another extractor than 'random-conv-1'"):
        frechet_value(extractor, features, reference, MADE)
    sums = replace(reference, features=None)
    with pytest.raises(InputError, match="it holds sums alone"):
        kernel_value(RandomConvFeatures(), features, sums, MADE)
