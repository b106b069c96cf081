"""Where fine-tuning starts: a cascade's stage with its weights, changed as asked."""

import math
from functools import partial

import pytest
import torch
import yaml
from tiny_stages import SMALL, TEXT_DIM, base_stage, generators, make_batch, sr_stage, text_settings

from imagen_lightning.cascade import Cascade
from imagen_lightning.diffusion import (
    DiscreteSchedule,
    Epsilon,
    FixedVariance,
    LearnedRange,
    LowResAugmentation,
    MinSNR,
    ShiftedCosineSchedule,
)
from imagen_lightning.errors import InputError
from imagen_lightning.finetuning import SamplingChanges, from_cascade
from imagen_lightning.networks import LoRA, UNet
from imagen_lightning.samplers import DDPM
from imagen_lightning.stages import BaseStage, Diffusion, Execution, Optimization, Sampling
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A base stage of 8 px that learns its variance on IF's schedule, and one from 8 to 16 px with a text network."""
    network = UNet(**SMALL, attention=[False, True], text_dim=TEXT_DIM, out_channels=6)
    diffusion = Diffusion(DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), variance=LearnedRange())
    base = base_stage(network, diffusion=diffusion, sampling=Sampling(DDPM("learned"), num_steps=4, guidance=2.0))
    text = text_settings(network=TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2))
    larger = sr_stage(text=text, image_size=16, low_res_size=8, augmentation=LowResAugmentation(max_level=0.5))
    folder = tmp_path_factory.mktemp("cascade") / "cascade"
    Cascade([base, larger]).save(folder)
    return folder


def test_it_is_the_cascades_stage(cascade):
    for stage in Cascade.load(cascade).stages:
        start = from_cascade(str(cascade), "base" if isinstance(stage, BaseStage) else "sr_16")
        assert type(start) is type(stage)
        assert start.hyperparameters() == stage.hyperparameters()
        weights = stage.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in start.state_dict().items())
        assert start.training
        assert all(parameter.requires_grad for parameter in start.parameters())
    assert type(from_cascade(str(cascade), "1")) is type(stage)


def test_what_is_changed_is_changed_and_the_rest_is_kept(cascade):
    adapter, optimization = LoRA(2), Optimization(partial(torch.optim.SGD, lr=0.1), warmup_steps=2)
    start = from_cascade(
        str(cascade),
        adapter=adapter,
        text_drop=0.3,
        null_text="empty_caption",
        encoder=TinyTextEncoder(TEXT_DIM, max_tokens=16),
        optimization=optimization,
        sampling=SamplingChanges(num_steps=7, guidance=5.0),
        weighting=MinSNR(4.0),
        execution=Execution(channels_last=True),
        recompute=True,
        seed=9,
    )
    assert (start.text.drop, start.text.null_text, start.seed) == (0.3, "empty_caption", 9)
    assert (start.sampling.num_steps, start.sampling.guidance) == (7, 5.0)
    assert start.sampling.sampler.variance == "learned"
    assert start.optimization is optimization
    assert start.adapter is adapter
    assert start.process.weighting.gamma == 4.0
    assert isinstance(start.process.schedule, DiscreteSchedule)
    assert start.execution.channels_last
    assert start.network.recompute is True


def test_super_resolution_changes(cascade):
    augmentation = LowResAugmentation(max_level=0.8)
    start = from_cascade(str(cascade), "sr_16", augmentation=augmentation, aug_level=0.7, crop_size=8)
    assert (start.augmentation.max_level, start.aug_level, start.crop_size) == (0.8, 0.7, 8)
    assert start.low_res_size == 8
    for changes in ({"aug_level": 0.1}, {"crop_size": 4}, {"low_res_size": 4}):
        with pytest.raises(InputError, match="is of super-resolution, and stage 'base'"):
            from_cascade(str(cascade), "base", **changes)


def test_another_size_needs_a_schedule(cascade):
    shift = f"{2 * math.log(8 / 16):+.2f}"
    with pytest.raises(InputError, match=rf"16 is not the 8 .* 2 log\(8/16\) = \{shift} in log-SNR; give a schedule"):
        from_cascade(str(cascade), image_size=16)
    start = from_cascade(str(cascade), image_size=16, schedule=ShiftedCosineSchedule(16, 8))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    plain = from_cascade(str(cascade), schedule=ShiftedCosineSchedule(8, 8)).process.schedule.log_snr(t)
    assert torch.allclose(start.process.schedule.log_snr(t), plain + 2 * math.log(8 / 16))
    assert start.training_step(make_batch(range(2), size=16), 0).isfinite()
    with pytest.raises(InputError, match=r"ShiftedCosineSchedule \{image_size: 32, reference_size: 16\}"):
        from_cascade(str(cascade), "sr_16", image_size=32)
    larger = from_cascade(str(cascade), "sr_16", image_size=32, schedule=ShiftedCosineSchedule(32, 16))
    assert larger.low_res_size == 16
    with pytest.raises(InputError, match="give low_res_size too"):
        from_cascade(str(cascade), "sr_16", image_size=15)


def test_a_learned_variance_is_kept_or_left_aside(cascade):
    batch = make_batch(range(4))
    kept = from_cascade(str(cascade), text_drop=0.0)
    simple = from_cascade(
        str(cascade), text_drop=0.0, variance=FixedVariance(), sampling=SamplingChanges(sampler=DDPM("small"))
    )
    assert kept.process.learns_variance
    assert not simple.process.learns_variance
    gradients = []
    for stage in (kept, simple):
        stage.training_step(batch, 0).backward()
        gradients.append(stage.network.conv_out.weight.grad)
    assert torch.equal(gradients[0][:3], gradients[1][:3])  # the variance's term gives the mean no gradient
    assert gradients[0][3:].abs().max() > 0
    assert gradients[1][3:].abs().max() == 0
    assert simple.sample(["a dog"], generators(1), num_steps=2).shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match=r"learned variance, which variance FixedVariance leaves aside.*'small'"):
        from_cascade(str(cascade), variance=FixedVariance())


def test_another_text_is_refused_naming_both(cascade):
    with pytest.raises(InputError, match=r"'tiny-bytes-d12-s5' is not 'tiny-bytes-d12-s0', which stage 'base'"):
        from_cascade(str(cascade), encoder=TinyTextEncoder(TEXT_DIM, max_tokens=16, seed=5))
    with pytest.raises(InputError, match="token length 8 is not 16"):
        from_cascade(str(cascade), encoder=TinyTextEncoder(TEXT_DIM, max_tokens=8))
    with pytest.raises(InputError, match=r"null_text 'learned': stage 'base' .* has 'zero'"):
        from_cascade(str(cascade), null_text="learned")


def test_frozen_weights_take_half_the_memory(cascade):
    start = from_cascade(str(cascade), adapter=LoRA(2), dtype="bfloat16")
    assert {parameter.dtype for parameter in start.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert {parameter.dtype for parameter in start.parameters() if parameter.requires_grad} == {torch.float32}
    start.log = lambda *args, **kwargs: None
    start.training_step(make_batch(range(2)), 0).backward()
    gradients = [parameter.grad for parameter in start.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(InputError, match="'bfloat16' would lose small updates"):
        from_cascade(str(cascade), dtype="bfloat16")


def test_no_such_cascade_or_stage(cascade, tmp_path):
    with pytest.raises(InputError, match="no cascade folder"):
        from_cascade(str(tmp_path))
    with pytest.raises(InputError, match="'sr_64' is unknown"):
        from_cascade(str(cascade), "sr_64")


@pytest.fixture(scope="module")
def config(cascade, tmp_path_factory):
    """An experiment's YAML: the base stage with LoRA, its text drop changed."""
    path = tmp_path_factory.mktemp("config") / "lora.yaml"
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    arguments = {
        "cascade": str(cascade),
        "adapter": {"class_path": "imagen_lightning.networks.LoRA", "init_args": {"rank": 2}},
        "text_drop": 0.2,
        "sampling": {"num_steps": 3},
        "optimization": {"optimizer": optimizer, "warmup_steps": 1, "lr_scales": {"*lora_B*": 4.0}},
    }
    data = {"image_size": 8, "batch_size": 4, "num_val": 4}
    content = {
        "model": {"class_path": "imagen_lightning.finetuning.from_cascade", "init_args": arguments},
        "data": {"class_path": "imagen_lightning.data.ShapesDataModule", "init_args": data},
        "trainer": {
            "max_steps": 4,
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        },
        "checkpoint": {"every_n_steps": 2},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def fit(monkeypatch, *arguments):
    from imagen_lightning.cli.main import main

    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main([str(argument) for argument in arguments]) == 0


def test_fit_with_an_adapter_resumes_to_the_bit(config, cascade, tmp_path, monkeypatch):
    fit(monkeypatch, "fit", "--config", config, "--run", tmp_path / "whole")
    fit(monkeypatch, "fit", "--config", config, "--run", tmp_path / "half", "--trainer.max_steps", 2)
    fit(monkeypatch, "fit", "--run", tmp_path / "half", "--resume", "--trainer.max_steps", 4)
    whole, half = (
        torch.load(tmp_path / name / "checkpoints" / "step-4.ckpt", weights_only=True) for name in ("whole", "half")
    )
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == half[part].keys()
        assert all(torch.equal(value, half[part][name]) for name, value in whole[part].items())
    groups = whole["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [0.01, 0.04]
    # the base's weights are those of the cascade, and the adapter's have moved
    base = Cascade.load(cascade).stages[0].state_dict()
    weights = whole["state_dict"]
    plain = {name.replace(".base_layer", ""): value for name, value in weights.items() if "lora" not in name}
    assert plain.keys() == base.keys()
    assert all(torch.equal(value, plain[name]) for name, value in base.items())
    moved = [name for name, value in weights.items() if "lora_B" in name and value.abs().max() > 0]
    assert len(moved) == 12  # to_qkv, text_to_kv and to_out of four layers
    # what validates and what becomes a cascade
    fit(monkeypatch, "validate", "--config", tmp_path / "whole" / "config.yaml", "--ckpt_path",
        tmp_path / "whole" / "checkpoints" / "last.ckpt")  # fmt: skip
    made = Cascade.from_checkpoints([tmp_path / "whole"])
    assert made.stages[0].adapter is None
    assert made.stages[0].state_dict().keys() == base.keys()
    assert made.stages[0].text.drop == 0.2


def test_the_configuration_is_printed(config, capsys):
    from imagen_lightning.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--print_config"])
    assert ended.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"] == "imagen_lightning.finetuning.from_cascade"
    assert model["init_args"]["adapter"]["init_args"]["rank"] == 2


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(config, tmp_path):
    from imagen_lightning.cli.main import main

    options = ["--steps", "12", "--kills", "2", "--out", str(tmp_path / "runs")]
    assert main(["verify-resume", "--config", str(config), *options]) == 0
