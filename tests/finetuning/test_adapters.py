"""Adapters in files: from a run, onto a cascade's stage, combined; peft reads ours and we read its."""

import json
from functools import partial

import lightning
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_stages import TEXT_DIM, base_stage, make_batch, sr_stage, text_settings
from torch.utils.data import DataLoader

from imagen_lightning.callbacks import EMA
from imagen_lightning.cascade import Cascade
from imagen_lightning.diffusion import ShiftedCosineSchedule
from imagen_lightning.errors import InputError
from imagen_lightning.export.peft_adapter import CONFIG, WEIGHTS
from imagen_lightning.finetuning import adapters, from_cascade
from imagen_lightning.networks import LoRA, lora
from imagen_lightning.networks.lora import Factors
from imagen_lightning.stages import Optimization
from imagen_lightning.text import TransformerEncoder

ALL = ["attention", "convolutions"]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    text = text_settings(network=TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2))
    folder = tmp_path_factory.mktemp("cascade") / "cascade"
    Cascade([base_stage(text=text), sr_stage(text=text_settings(), image_size=16, low_res_size=8)]).save(folder)
    return folder


def stage_of(cascade, name="base"):
    return next(stage for stage in Cascade.load(cascade).stages if (name == "base") != hasattr(stage, "low_res_size"))


def filled(cascade, targets=ALL, rank=3, alpha=6.0, seed=3, name="base"):
    """A stage with an adapter that does something, and that adapter apart."""
    stage = from_cascade(str(cascade), name, adapter=LoRA(rank, alpha, targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.adapter_parameters(stage.network):
        parameter.data.normal_(0, 0.2, generator=generator)
    return stage, adapters.Adapter(lora.factors(stage.network), adapters.base_identity(stage))


def output(stage):
    stage.eval()
    x0, conditioning = stage.condition(make_batch(range(2), stage.image_size), 0, training=False)
    with torch.no_grad():
        return stage.predict(x0, torch.tensor([0.3, 0.8]), conditioning)


@pytest.fixture(scope="module")
def run(cascade, tmp_path_factory):
    """A run's checkpoint, after two steps with an average of the weights."""
    folder = tmp_path_factory.mktemp("run")
    optimization = Optimization(partial(torch.optim.AdamW, lr=0.05))
    stage = from_cascade(str(cascade), adapter=LoRA(3, 6.0, ALL), optimization=optimization)
    data = DataLoader([make_batch([i]) for i in range(3)], batch_size=None)
    (folder / "checkpoints").mkdir()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMA(0.5)],
    )  # fmt: skip
    trainer.fit(stage, data)
    trainer.save_checkpoint(folder / "checkpoints" / "step-3.ckpt")
    return folder


@pytest.mark.parametrize("place", ["folder", "file"])
def test_the_adapter_of_a_run_makes_of_the_cascade_what_the_run_made(cascade, run, tmp_path, place):
    adapter = adapters.of_run(run)
    adapters.save(adapter, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
    stage = stage_of(cascade)
    before = output(stage)
    adapters.apply(stage, [(tmp_path / "out" / (WEIGHTS if place == "file" else ""), 1.0)])
    merged = Cascade.from_checkpoints([run]).stages[0]
    merged.merge_adapter()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, stage.state_dict()[name])
    assert (output(stage) - before).abs().max() > 1e-3
    content = torch.load(run / "checkpoints" / "step-3.ckpt", weights_only=True)
    key = "network.mid_attention.to_qkv.lora_B.default.weight"
    assert adapter.base["origin"]["parents"][0]["cascade"] == cascade.name  # and its licences, where it has any
    assert torch.equal(adapter.layers["mid_attention.to_qkv"].b, content["state_dict"][key])
    assert not torch.equal(content["state_dict"][key], content["current_model_state"][key])  # the average, not these


def test_from_a_run_to_a_cascade_by_the_verbs(cascade, run, tmp_path, capsys):
    from imagen_lightning.cli.main import main

    assert main(["adapter", str(run), str(tmp_path / "adapter")]) == 0
    assert "for a stage 'base' with weights" in capsys.readouterr().out
    made = tmp_path / "cascade"
    assert main(["cascade", str(cascade), str(made), "--adapter", str(tmp_path / "adapter")]) == 0
    merged, whole = Cascade.from_checkpoints([run]).stages[0].state_dict(), Cascade.load(made)
    assert whole.names == ["base", "sr_16"]
    assert all(torch.equal(value, merged[name]) for name, value in whole.stages[0].state_dict().items())
    # the second time it is another base
    assert main(["cascade", str(made), str(tmp_path / "twice"), "--adapter", str(tmp_path / "adapter")]) == 2
    assert "is for a stage 'base' with weights" in capsys.readouterr().err
    assert main(["adapter", str(run), str(tmp_path / "theirs"), "--format", "diffusers"]) == 2
    assert "text_norm 'layer' ('group' or 'none')" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_a_run_that_trained_more_is_refused(cascade, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stage, _ = filled(cascade)
    with torch.no_grad():
        next(stage.text_network.parameters()).add_(0.1)
    trainer = lightning.Trainer(max_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(stage)
    trainer.save_checkpoint(tmp_path / "checkpoints" / "step-1.ckpt", weights_only=True)
    with pytest.raises(InputError, match="trained other weights beside its adapter"):
        adapters.of_run(tmp_path)


def test_several_add_up(cascade, tmp_path):
    one, first = filled(cascade, ["attention"], seed=1)
    _, second = filled(cascade, ALL, rank=2, alpha=3.0, seed=2)
    adapters.save(first, tmp_path / "one")
    adapters.save(second, tmp_path / "two")
    stage, base = stage_of(cascade), stage_of(cascade).network.state_dict()
    adapters.apply(stage, [(tmp_path / "one", 0.75), (tmp_path / "two", -0.5)])
    for name, value in stage.network.state_dict().items():
        layer, delta = name.removesuffix(".weight"), torch.zeros(value.shape, dtype=torch.float64)
        for adapter, weight in ((first, 0.75), (second, -0.5)):
            if name.endswith(".weight") and layer in adapter.layers:
                delta += weight * adapter.layers[layer].delta(torch.float64)
        torch.testing.assert_close(value.double(), base[name].double() + delta, atol=1e-6, rtol=1e-6)
    joint = adapters.combine([(first, 0.75), (second, -0.5)])
    assert joint.layers["mid_attention.to_qkv"].a.shape[0] == 5
    assert joint.layers["conv_in"].a.shape[0] == 2
    adapters.save(joint, tmp_path / "joint")
    again = stage_of(cascade)
    adapters.apply(again, [(tmp_path / "joint", 1.0)])
    for name, value in stage.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-6)
    wanted, alone = output(one), stage_of(cascade)
    adapters.apply(alone, [(tmp_path / "one", 1.0)])
    torch.testing.assert_close(output(alone), wanted, atol=2e-5, rtol=2e-5)


def test_combining_is_exact_in_float64():
    generator = torch.Generator().manual_seed(0)

    def factors(rank, scale):
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, 7), (5, rank)))
        return Factors(a, b, scale)

    first, second = factors(2, 1.5), factors(3, 0.4)
    both = adapters.combine([(adapters.Adapter({"x": first}, None), 0.3), (adapters.Adapter({"x": second}, None), 2.0)])
    wanted = 0.3 * 1.5 * first.b @ first.a + 2.0 * 0.4 * second.b @ second.a
    torch.testing.assert_close(both.layers["x"].delta(torch.float64), wanted, atol=1e-14, rtol=1e-14)


# ---- peft itself


@pytest.mark.parametrize("name", ["base", "sr_16"])
def test_peft_reads_ours(cascade, tmp_path, name):
    from peft import PeftModel

    _, first = filled(cascade, ["attention"], seed=1, name=name)
    trained, second = filled(cascade, ALL, rank=2, alpha=3.0, seed=2, name=name)
    adapters.save(second, tmp_path / "second")
    adapters.save(adapters.combine([(first, 0.5), (second, 1.0)]), tmp_path / "joint")  # ranks differ by layer
    for folder in ("second", "joint"):
        stage = stage_of(cascade, name)
        model = PeftModel.from_pretrained(stage.network, tmp_path / folder)
        theirs = output(stage)  # its layers are in our network
        if folder == "second":
            torch.testing.assert_close(theirs, output(trained), atol=2e-5, rtol=2e-5)
            for layer, pair in lora.factors(stage.network).items():
                assert torch.equal(pair.a, second.layers[layer].a)
                assert torch.equal(pair.b, second.layers[layer].b)
                assert pair.scale == second.layers[layer].scale
        model.merge_and_unload()
        ours = stage_of(cascade, name)
        adapters.apply(ours, [(tmp_path / folder, 1.0)])
        torch.testing.assert_close(output(ours), theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_out": 20}, "rank_pattern": {"to_out": 5}}]
)
def test_we_read_pefts(cascade, tmp_path, settings):
    from peft import LoraConfig, get_peft_model

    stage = stage_of(cascade)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_qkv", "to_out", "conv1"], **settings)
    model = get_peft_model(stage.network, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    wanted = output(stage)
    ours = stage_of(cascade)
    with pytest.warns(UserWarning, match="does not say which base it is for"):
        adapters.apply(ours, [(tmp_path / "theirs", 1.0)])
    torch.testing.assert_close(output(ours), wanted, atol=2e-5, rtol=2e-5)


# ---- what is refused


@pytest.fixture(scope="module")
def saved(cascade, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapters.save(filled(cascade)[1], folder)
    return folder


def test_another_base_is_refused_naming_both(cascade, saved, tmp_path):
    def refused(stage, message):
        before = {name: value.clone() for name, value in stage.state_dict().items()}
        with pytest.raises(InputError, match=message):
            adapters.apply(stage, [(saved, 1.0)])
        assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())

    stage = stage_of(cascade)
    with torch.no_grad():
        stage.network.mid_in.conv1.weight.mul_(1.5)
    own, other = lora.weights_digest(stage_of(cascade)), lora.weights_digest(stage)
    refused(stage, f"'base' with weights '{own}', and stage 'base' has '{other}'")
    network = TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2)
    encoder = type(stage.text.encoder)
    refused(
        base_stage(text=text_settings(network=network, encoder=encoder(TEXT_DIM, max_tokens=16, seed=7))),
        "text encoder 'tiny-bytes-d12-s0', and stage 'base' has 'tiny-bytes-d12-s7'",
    )
    refused(
        base_stage(text=text_settings(network=network, encoder=encoder(TEXT_DIM, max_tokens=9))),
        "token length 16, and stage 'base' has 9",
    )
    refused(stage_of(cascade, "sr_16"), "image size 8, and stage 'sr_16' has 16")
    resized = from_cascade(str(cascade), schedule=ShiftedCosineSchedule(8, 4))
    refused(resized, r"schedule CosineSchedule, and stage 'base' has ShiftedCosineSchedule image_size 8")
    mine, _ = filled(cascade)
    with pytest.raises(InputError, match="adapter of its own"):
        adapters.apply(mine, [(saved, 1.0)])
    other_base = adapters.Adapter({}, adapters.base_identity(stage_of(cascade, "sr_16")))
    with pytest.raises(InputError, match="'sr_16' with image size 16"):
        adapters.combine([(filled(cascade)[1], 1.0), (other_base, 1.0)])


def changed(saved, folder, change=None, **config):
    """A copy of an adapter without what it says of itself, its tensors and config changed."""
    folder.mkdir()
    tensors = load_file(saved / WEIGHTS)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / WEIGHTS)
    content = json.loads((saved / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


KEY = "base_model.model.mid_attention.to_qkv.lora_A.weight"


def drop(tensors):
    del tensors[KEY]


def narrow(tensors):
    tensors[KEY] = tensors[KEY][:, :5].clone()


def lower(tensors):
    tensors[KEY] = tensors[KEY][:2].clone()


def rename(tensors):
    for part in ("A", "B"):
        key = KEY.replace("lora_A", f"lora_{part}")
        tensors[key.replace("mid_", "middle_")] = tensors.pop(key)


def magnitude(tensors):
    tensors[KEY.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(48)


def nothing(tensors):
    pass


@pytest.mark.filterwarnings("ignore:.*does not say")
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (drop, {}, "'mid_attention.to_qkv' has lora_B and no lora_A"),
        (narrow, {}, r"'mid_attention.to_qkv' is for a weight of \(48, 5\).*\(48, 16\)"),
        (lower, {}, r"A \(2, 16\) and B \(48, 3\)"),
        (rename, {}, r"layer 'middle_attention.to_qkv', and the network \(UNet\) none"),
        (magnitude, {}, "no part of a plain LoRA"),
        (nothing, {"use_dora": True}, "use_dora True makes it more than a plain LoRA"),
        (nothing, {"modules_to_save": ["conv_in"]}, "modules_to_save"),
        (nothing, {"bias": "all"}, "bias 'all'"),
        (nothing, {"init_lora_weights": "pissa"}, "changes the base too"),
        (nothing, {"peft_type": "LOHA"}, "is not of a LoRA"),
        (nothing, {"lora_alpha": "7"}, "lora_alpha '7' .* is no number"),
    ],
)
def test_what_does_not_fit_is_refused(cascade, saved, tmp_path, change, config, message):
    folder = changed(saved, tmp_path / "changed", change, **config)
    stage = stage_of(cascade)
    with pytest.raises(InputError, match=message):
        adapters.apply(stage, [(folder, 1.0)])


def test_a_whole_layer_that_is_missing_is_noticed(cascade, saved, tmp_path):
    folder = changed(saved, tmp_path / "short")
    from safetensors import safe_open

    with safe_open(saved / WEIGHTS, "pt") as content:
        header = content.metadata()
    tensors = {name: value for name, value in load_file(saved / WEIGHTS).items() if "mid_attention.to_qkv" not in name}
    save_file(tensors, folder / WEIGHTS, header)
    with pytest.raises(InputError, match=r"'mid_attention.to_qkv' was written with rank 3, and the file has none"):
        adapters.load(folder, stage_of(cascade))


def test_no_file_runs_code(cascade, saved, tmp_path):
    # class names in a config are looked at by nobody
    auto = {"base_model_class": "Popen", "parent_library": "subprocess"}
    folder = changed(saved, tmp_path / "named", auto_mapping=auto)
    with pytest.warns(UserWarning, match="does not say"):
        assert adapters.load(folder, stage_of(cascade)).layers
    pickled = tmp_path / "adapter_model.bin"
    torch.save({}, pickled)
    with pytest.raises(InputError, match=r"no \.safetensors file; others can hold code"):
        adapters.load(pickled, stage_of(cascade))
    with pytest.raises(InputError, match="holds no adapter"):
        adapters.load(tmp_path, stage_of(cascade))
    with pytest.raises(InputError, match="is an address"):
        adapters.load("https://example.com/adapter_model.safetensors", stage_of(cascade))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged"):
        adapters.load(damaged, stage_of(cascade))


def test_a_folder_that_is_not_empty_is_kept(cascade, saved):
    with pytest.raises(InputError, match="not empty"):
        adapters.save(filled(cascade)[1], saved)
    with pytest.raises(InputError, match="'kohya' is unknown"):
        adapters.save(filled(cascade)[1], saved, "kohya")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_adds_nothing(cascade, tmp_path, weight):
    _, adapter = filled(cascade)
    adapters.save(adapter, tmp_path / "one")
    stage = stage_of(cascade)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    for merge in (
        lambda: adapters.apply(stage, [(tmp_path / "one", 1.0), (tmp_path / "one", weight)]),
        lambda: adapters.combine([(adapter, 1.0), (adapter, weight)]),
        lambda: lora.add_factors(stage.network, adapter.layers, weight),
    ):
        with pytest.raises(InputError, match="of an adapter is not a finite number"):
            merge()
    with pytest.raises(InputError, match="alpha"):
        LoRA(2, weight)
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())


def test_factors_that_are_not_finite_or_overflow_are_refused_by_layer(cascade, tmp_path):
    _, adapter = filled(cascade)
    stage = stage_of(cascade)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    with pytest.raises(InputError, match=r"layer .* times weight 1e\+39 is too large for torch.float32 weights"):
        lora.add_factors(stage.network, adapter.layers, 1e39)
    adapter.layers[next(iter(adapter.layers))].b[0] = torch.nan
    adapters.save(adapter, tmp_path / "broken")
    with pytest.raises(InputError, match=r"broken.*layer .* holds NaN or infinite values"):
        adapters.apply(stage, [(tmp_path / "broken", 1.0)])
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
