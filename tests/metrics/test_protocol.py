import json
from dataclasses import fields, replace

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.digests import digest_file, digest_tensors, digest_texts
from imagen_lightning.metrics.protocol import GROUPS, MADE, MEASURED, Protocol, Value, columns, refuse_mixed

FULL = Protocol(
    metric="FID",
    extractor="inception-v3-compat",
    extractor_sha256="6" * 64,
    resize_filter="bilinear-tf1",
    image_size=64,
    num_samples=1000,
    reference="a" * 64,
    reference_name="coco",
    prompts="b" * 64,
    precision="float32",
    settings="features 2048",
    weights=("ema", "raw"),
    guidance=(1.5, 8.0),
    steps=(25, 10),
    sampler=("ddim", "dpmpp"),
    aug_level=(None, 0.1),
    seed=0,
    sampling={"spacing": ("UniformTimes", "UniformTimes"), "guidance_rescale": (0, 0)},
    process={"diffusion.schedule": ("CosineSchedule", "CosineSchedule"), "augmentation": (None, "LowResAugmentation")},
)
OTHER = {
    "metric": "KID",
    "extractor": "clip",
    "extractor_sha256": "7" * 64,
    "resize_filter": "area",
    "image_size": 256,
    "num_samples": 999,
    "reference": "c" * 64,
    "reference_name": "laion",
    "prompts": "d" * 64,
    "precision": "bf16-mixed",
    "settings": "features 768",
    "weights": "imported",
    "guidance": (1.5, 7.0),
    "steps": (25, 11),
    "sampler": ("ddim", "heun"),
    "aug_level": (None, 0.2),
    "seed": 1,
    "sampling": {**FULL.sampling, "spacing": ("UniformTimes", "LogSNRTimes(low=-9, high=9)")},
    "process": {**FULL.process, "augmentation": (None, "LowResAugmentation(max_level=0.5)")},
}


def value(protocol, number=1.0):
    return Value(protocol.metric, number, number - 0.5, number + 0.5, protocol, "95% bootstrap")


def test_every_field_is_how_pictures_were_measured_or_made():
    names = [field.name for field in fields(Protocol)]
    assert [*MEASURED, *MADE] == names
    assert set(OTHER) == set(names)


@pytest.mark.parametrize("name", [name for name in OTHER if name != "reference_name"])
def test_any_differing_field_parts_two_values(name):
    other = replace(FULL, **{name: OTHER[name]})
    assert len(FULL.differences(other)) == 1
    assert FULL.key() != other.key()
    assert len(columns([value(FULL), value(other)])) == 2
    with pytest.raises(InputError, match="different protocols cannot be compared"):
        refuse_mixed([value(FULL), value(other)])


@pytest.mark.parametrize("name", [name for name in OTHER if name != "reference_name"])
def test_a_field_that_is_missing_parts_values_too(name):
    if name == "metric":
        with pytest.raises(InputError, match="name of its metric"):
            replace(FULL, metric="")
        return
    other = replace(FULL, **{name: None})
    assert len(other.differences(FULL)) == (2 if name in GROUPS else 1)
    assert FULL.key() != other.key()


def test_what_is_compared_parts_no_values_if_it_is_how_they_were_made():
    sweep = [value(replace(FULL, guidance=g)) for g in (1, 2, 3)]
    assert len(columns(sweep)) == 3
    assert columns(sweep, compared=("guidance",)) == [sweep]
    refuse_mixed(sweep, compared=("guidance",))
    odd = value(replace(FULL, guidance=4, num_samples=10))
    assert columns([*sweep, odd], compared=("guidance",)) == [sweep, [odd]]
    for name in MEASURED:
        with pytest.raises(InputError, match=f"'{name}' cannot be what is compared"):
            columns(sweep, compared=(name,))


def test_one_setting_of_a_group_is_compared_apart_from_the_others():
    spacing = replace(FULL, sampling=OTHER["sampling"])
    both = replace(spacing, process=OTHER["process"])
    assert spacing.differences(FULL) == [
        "spacing: (UniformTimes, LogSNRTimes(low=-9, high=9)) and (UniformTimes, UniformTimes)"
    ]
    for compared in (("sampling",), ("sampling.spacing",)):
        assert spacing.key(compared) == FULL.key(compared)
        assert not spacing.differences(FULL, compared)
        assert both.key(compared) != FULL.key(compared)
    assert both.key(("sampling.spacing", "process.augmentation")) != FULL.key()
    assert both.key(MADE) == FULL.key(MADE) == replace(FULL, **dict.fromkeys(MADE)).key()


def test_the_refusal_says_why_in_words():
    other = replace(FULL, num_samples=5000, resize_filter="area", seed=7)
    message = (
        r"resize filter: bilinear-tf1 and area; number of samples: 1000 and 5000; seed: 0 and 7; measure them alike, or"
    )
    with pytest.raises(InputError, match=message):
        refuse_mixed([value(FULL), value(other)])
    third = replace(other, weights="raw")
    with pytest.raises(InputError, match=r"\(1 further protocol\)"):
        refuse_mixed([value(FULL), value(other), value(third)])
    assert FULL.differences(replace(FULL, reference="c" * 64)) == [
        "reference's SHA-256: aaaaaaaaaaaa… and cccccccccccc…"
    ]
    assert FULL.differences(replace(FULL, aug_level=None)) == ["augmentation level: (none, 0.1) and none"]
    refuse_mixed([])
    refuse_mixed([value(FULL), value(FULL, 3.0)])


def test_the_references_name_counts_only_where_a_hash_is_unknown():
    assert FULL.differences(replace(FULL, reference_name="elsewhere")) == []
    assert FULL.key() == replace(FULL, reference_name="elsewhere").key()
    named, renamed = (replace(FULL, reference=None, reference_name=name) for name in ("coco", "laion"))
    assert named.differences(renamed) == ["reference: coco and laion"]
    assert named.key() != renamed.key()


def test_the_key_is_stable_and_does_not_tell_3_from_3_0():
    assert Protocol("FID", guidance=3, steps=(25, 10)).key() == Protocol("FID", guidance=3.0, steps=[25, 10.0]).key()
    assert Protocol("FID", extractor="e", num_samples=10).key() == "48183023d4dd"


@pytest.mark.parametrize("protocol", [FULL, Protocol("CLIP score")])
def test_json_keeps_everything(protocol):
    assert json.loads(json.dumps(protocol.to_json())) == protocol.to_json()
    assert Protocol.from_json(json.loads(json.dumps(protocol.to_json()))) == protocol
    for number in (value(protocol), Value(protocol.metric, 2, None, None, protocol)):
        assert Value.from_json(json.loads(json.dumps(number.to_json(), allow_nan=False))) == number


def test_json_keeps_what_json_has_no_number_for():
    for number in (float("inf"), float("-inf"), float("nan")):
        infinite = Value("FID", number, None, None, FULL)
        back = Value.from_json(json.loads(json.dumps(infinite.to_json(), allow_nan=False)))
        assert str(back.value) == str(number)


def test_what_is_no_protocol_or_value_is_refused():
    for data, message in [
        ({}, "this is no protocol"),
        ([], "this is no protocol"),
        ({"metric": "FID", "colour": "red"}, "unknown fields colour"),
        ({"metric": "FID", "weights": "mean"}, "'mean'"),
    ]:
        with pytest.raises(InputError, match=message):
            Protocol.from_json(data)
    whole = value(FULL).to_json()
    for change, message in [
        ({"value": "much"}, "value of a value of FID is no number but 'much'"),
        ({"value": None}, "has no number"),
        ({"metric": "KID"}, "'KID' has the protocol of 'FID'"),
        ({"low": None}, "low, high and confidence, or none"),
        ({"confidence": None}, "low, high and confidence, or none"),
        ({"mean": 1}, "unknown fields mean"),
    ]:
        with pytest.raises(InputError, match=message):
            Value.from_json({**whole, **change})


def test_digests(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_texts(["a", "bc"]) != digest_texts(["ab", "c"])
    assert digest_texts(["a", "b"]) != digest_texts(["b", "a"])
    assert digest_texts(["\ud800"]) != digest_texts([""])
    images = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    assert digest_tensors([images]) == digest_tensors([images.clone()])
    assert digest_tensors([images]) == digest_tensors([images.to(memory_format=torch.channels_last)])
    assert digest_tensors([images]) != digest_tensors([images.reshape(1, 3, 2, 8)])
    assert digest_tensors([images]) != digest_tensors([images.view(torch.int8)])
