"""Every edit of a manifest either gives a cascade that samples, or is refused in one line."""

import copy
import importlib
import json
import math
import resource
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_lightning.cascade import Cascade
from imagen_lightning.cascade.local import file_sha256
from imagen_lightning.types import InputError

CAPTION = "a small red star"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def described(path, **arguments):
    return {"class_path": f"imagen_lightning.{path}", "init_args": arguments}


# Of every kind: what a key may hold, and what it may not.
VALUES = {
    "null": None,
    "true": True,
    "false": False,
    "no text": "",
    "text": "bilinear",
    "long text": "x" * 5000,
    "an empty list": [],
    "a list of numbers": [1, 2],
    "a list of lists": [[1], {}],
    "an empty object": {},
    "an object": {"a": 1},
    "-1": -1,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "a billion": 10**9,
    "63 bits": 2**63 - 1,
    "10^30": 10**30,
    "1e308": 1e308,
    "1e-308": 1e-308,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "nested": nested(300),
    "a sampler": described("samplers.DDIM", eta=0.0),
    "a spacing": described("samplers.KarrasTimes", sigma_min=0.002, sigma_max=80.0, rho=7.0),
    "a schedule": described("diffusion.DiscreteSchedule", betas="linear", num_steps=10, beta_start=1e-4, beta_end=0.02),
    "a variance": described("diffusion.LearnedRange", vlb_weight=0.001, num_steps=1000),
    "a table of 10^12": described(
        "diffusion.DiscreteSchedule", betas="linear", num_steps=10**12, beta_start=1e-4, beta_end=0.02
    ),
    "an encoder": described("text.TinyTextEncoder", dim=16, max_tokens=10**12, seed=0),
    "a text network": described(
        "text.TransformerEncoder", input_dim=16, dim=16, num_layers=1, num_heads=2, max_tokens=16, dropout=0.0
    ),
    "a layer": described("networks.layers.ResidualBlock", in_channels=3, out_channels=3, time_dim=8),
    "words": described("text.PseudoTokens", words={"<zib>": 10**12}, init=None),
    "a stage": described("stages.BaseStage", image_size=8),
    "a command": described("__main__.x"),
    "a foreign class": {"class_path": "os.system", "init_args": {}},
}
DELETED = object()


def nodes(value, path=()):
    """The place of every value in plain data, but the whole's."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def edited(manifest, path, value):
    made = copy.deepcopy(manifest)
    *outer, last = path
    place = made
    for key in outer:
        place = place[key]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return made


def edits(manifest):
    """(name, the edited manifest's text) of every edit; compiling takes minutes, and is right."""
    for path in nodes(manifest):
        for name, value in {"deleted": DELETED, **VALUES}.items():
            if path[-1] == "compile" and value is True:
                continue
            yield f"{'.'.join(map(str, path))} {name}", json.dumps(edited(manifest, path, value))


def outcome(folder, text):
    """ "sampled", or the line of a refusal; any other error is the test's."""
    (folder / "cascade.json").write_text(text)
    try:
        samples = Cascade.load(folder).sample(CAPTION, steps=1)
        assert all(images.dtype == torch.uint8 for images in samples.stages)
    except InputError as error:
        return str(error)
    return "sampled"


def try_edits(folder, wanted):
    manifest = json.loads((folder / "cascade.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {}
    for name, text in edits(manifest):
        if wanted(name):
            try:
                outcomes[name] = outcome(folder, text)
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert all(said.strip() and "\n" not in said for said in outcomes.values())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB
    return outcomes


def test_a_sample_of_edits(saved):
    outcomes = try_edits(saved, lambda name: zlib.crc32(name.encode()) % 150 == 0)
    assert len(outcomes) > 40


@pytest.mark.slow
def test_every_edit(saved):
    outcomes = try_edits(saved, lambda name: True)
    taken = [name for name, said in outcomes.items() if said == "sampled"]
    assert 0.01 < len(taken) / len(outcomes) < 0.1  # most are of another kind than the key's
    refused = [name for name in outcomes if name.endswith((" nan", " inf", " -inf", " nested", " a foreign class"))]
    free = ("created_with", "metrics", "origin")
    assert [name for name in refused if outcomes[name] == "sampled" and not any(key in name for key in free)] == []


@pytest.mark.parametrize(
    ("stage", "key", "value", "words"),
    [
        (0, "diffusion", DELETED, ["BaseStage lacks its argument 'diffusion'"]),
        (0, "diffusion", None, ["diffusion is null"]),
        (
            0,
            "network.num_blocks",
            10**30,
            ["network.num_blocks 10000000", "000 must be a whole number"],
        ),
        (0, "network.num_blocks", 10**12, ["network", "far more layers"]),
        (0, "network.dim", 10**6, ["network", "tensor of shape", "far larger"]),
        (0, "network.low_res", 1, ["network.low_res 1 must be true or false"]),
        (0, "sampling.sampler", VALUES["a spacing"], ["sampling.sampler: class", "KarrasTimes", "of a Sampler"]),
        (0, "sampling.num_steps", 10**9, ["num_steps 1000000000 must be in [1, 1000000]"]),
        (0, "text.encoder", VALUES["an encoder"], ["text.encoder", "max_tokens 1000000000000"]),
        (1, "text.network", VALUES["a layer"], ["text.network", "ResidualBlock", "not a part of a stage"]),
        (1, "network.attention", "none", ["network.attention 'none' must be a list (each text)"]),
        (1, "low_res_size", 8.0, ["low_res_size 8.0 must be a whole number"]),
        (1, "seed", "0", ["seed '0' must be a whole number"]),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_is_allowed(saved, stage, key, value, words):
    manifest = json.loads((saved / "cascade.json").read_text())
    path = ["stages", stage, "stage"]
    for name in key.split("."):
        path += ["init_args", name]
    said = outcome(saved, json.dumps(edited(manifest, path, value)))
    assert all(word in said for word in words), said


def test_naming_a_command_imports_nothing(saved, monkeypatch):
    imported = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: imported.append(name) or real(name, *rest))
    for path in (
        "__main__.x",
        "cli.main.main",
        "callbacks.EMA",
        "data.ShapesDataModule",
        "types.Schedule",
        "torchvision_mend.x",
    ):
        manifest = json.loads((saved / "cascade.json").read_text())
        text = json.dumps(edited(manifest, ("stages", 0, "stage", "class_path"), f"imagen_lightning.{path}"))
        said = outcome(saved, text)
        assert f"imagen_lightning.{path}" in said
        assert "not a part of a stage" in said
        (saved / "cascade.json").write_text(json.dumps(manifest))
    assert not [
        name for name in imported if name.startswith("imagen_lightning.") and name.split(".")[1] not in ("stages",)
    ]


def test_a_manifest_of_an_earlier_commit_loads(cascade, saved):
    """Written by commit e1bb95f; the weights, which no later commit changed, are written here."""
    now = json.loads((saved / "cascade.json").read_text())
    manifest = json.loads((Path(__file__).parent / "manifest_e1bb95f.json").read_text())
    for entry, written in zip(manifest["stages"], now["stages"]):
        entry["weights"]["sha256"] = written["weights"]["sha256"]
    (saved / "cascade.json").write_text(json.dumps(manifest))
    loaded = Cascade.load(saved)
    for stage, entry in zip(loaded.stages, manifest["stages"]):
        assert json.loads(json.dumps(stage.hyperparameters())) == entry["stage"]["init_args"]
    assert torch.equal(loaded.sample(CAPTION, steps=1).stages[0], cascade.sample(CAPTION, steps=1).stages[0])


# ---- weights


def whole(value):
    return (100 * value).to(torch.int64)


def with_nan(value):
    return torch.where(torch.arange(value.numel()).view_as(value) == 1, torch.nan, value)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("network.conv_in.bias", whole, ["'network.conv_in.bias' holds whole numbers (torch.int64)", "save them as"]),
        ("network.conv_in.bias", lambda value: value > 0, ["boolean numbers"]),
        ("network.conv_in.bias", torch.Tensor.double, ["several types", "'network.conv_in.bias' is torch.float64"]),
        ("network.conv_in.bias", with_nan, ["'network.conv_in.bias' holds NaN or infinite values"]),
        ("network.conv_in.weight", lambda value: value * torch.inf, ["'network.conv_in.weight' holds NaN or infinite"]),
    ],
)
def test_weights_that_no_stage_computes_with_are_refused_by_name(cascade, saved, key, change, words):
    tensors = load_file(saved / "base.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, saved / "base.safetensors")
    manifest = json.loads((saved / "cascade.json").read_text())
    manifest["stages"][0]["weights"]["sha256"] = file_sha256(saved / "base.safetensors")
    said = outcome(saved, json.dumps(manifest))
    assert all(word in said for word in ["weights of stage 'base'", *words]), said
