"""What diffusers cannot express is refused by name, before anything is written."""

from dataclasses import replace

import pytest

from imagen_lightning.cascade import Cascade
from imagen_lightning.diffusion import (
    CosineSchedule,
    DynamicThresholding,
    Flow,
    LearnedRange,
    LowResAugmentation,
    NoThresholding,
    StaticThresholding,
    V,
)
from imagen_lightning.export.export_cascade import export_cascade
from imagen_lightning.export.export_stage import stage_configs
from imagen_lightning.export.import_pipelines import import_pipelines
from imagen_lightning.networks import EfficientUNet, PatchTransformer
from imagen_lightning.samplers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    DPMSolverPPSDE,
    LinspaceTimes,
    TrailingTimes,
    UniformTimes,
)
from imagen_lightning.stages import BaseStage, SuperResolutionStage, TextSettings
from imagen_lightning.text import T5TextEncoder, TinyTextEncoder, TransformerEncoder
from imagen_lightning.types import InputError

SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


@pytest.fixture
def stages(saved):
    return import_pipelines([saved("stage I"), saved("larger stage II", with_text=False)]).stages


def test_a_cascade_of_other_networks_is_refused_whole(tmp_path):
    text = TextSettings(TinyTextEncoder(16))
    base = BaseStage(
        16, PatchTransformer(dim=16, num_layers=1, patch_size=4, bottleneck=8, head_dim=8, text_dim=16), text
    )
    larger = SuperResolutionStage(32, 16, EfficientUNet(**SMALL, attention=["none", "self"]), text)
    Cascade([base, larger]).save(tmp_path / "cascade")
    with pytest.raises(InputError) as error:
        export_cascade(tmp_path / "cascade", tmp_path / "out")
    message = str(error.value)
    for part in (
        "stage 'base' cannot be a pipeline of DeepFloyd IF in diffusers",
        "schedule CosineSchedule (DiscreteSchedule)",
        "variance null (LearnedRange or FixedVariance: the pipelines take 6 channels)",
        "sampler DDIM (DDPM, DPMSolverPP or DPMSolverPPSDE)",
        "spacing UniformTimes (LinspaceTimes)",
        "network PatchTransformer (UNet)",
        "text encoder TinyTextEncoder (T5TextEncoder)",
        "stage 'sr_32' cannot be",
        "network EfficientUNet (UNet)",
        "augmentation.schedule CosineSchedule (DiscreteSchedule)",
        "upsampling 'bilinear' ('bilinear_aligned')",
    ):
        assert part in message, part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cascade"]


def settings(stage, part, **changes):
    setattr(stage, part, replace(getattr(stage, part), **changes))


def encoder(stage, **changes):
    old = stage.text.encoder
    arguments = {"max_tokens": 77, "padding": "attended", "clean_captions": "lowercase", **changes}
    places = {"subfolder": old.subfolder, "tokenizer_subfolder": old.tokenizer_subfolder}
    stage.text.encoder = T5TextEncoder(old.name_or_path, **arguments, **places)


def patched(stage):
    stage.network.patch_size = 2


REFUSED = {
    r"schedule CosineSchedule \(DiscreteSchedule\)": lambda s: settings(s, "diffusion", schedule=CosineSchedule()),
    r"parametrization Flow \(Epsilon, V or X0\)": lambda s: settings(s, "diffusion", parametrization=Flow()),
    r"sampler DDIM": lambda s: settings(s, "sampling", sampler=DDIM()),
    r"spacing UniformTimes \(LeadingTimes or TrailingTimes\)": lambda s: settings(
        s, "sampling", spacing=UniformTimes()
    ),
    r"spacing TrailingTimes \(LinspaceTimes\)": lambda s: settings(
        s, "sampling", sampler=DPMSolverPP(15), spacing=TrailingTimes()
    ),
    r"lower_order_below 7 \(0 or 15\)": lambda s: settings(
        s, "sampling", sampler=DPMSolverPP(7), spacing=LinspaceTimes()
    ),
    r"thresholding StaticThresholding \(DynamicThresholding or NoThresholding\)": lambda s: settings(
        s, "sampling", sampler=DPMSolverPPSDE(), spacing=LinspaceTimes(), thresholding=StaticThresholding()
    ),
    r"guidance_interval \[0.1, 5.0\] \(null\)": lambda s: settings(s, "sampling", guidance_interval=(0.1, 5.0)),
    r"guidance_rescale 0.7 \(0\)": lambda s: settings(s, "sampling", guidance_rescale=0.7),
    r"max_tokens 128 \(77\)": lambda s: encoder(s, max_tokens=128),
    r"padding 'masked' \('attended'\)": lambda s: encoder(s, padding="masked"),
    r"clean_captions True \('lowercase'\)": lambda s: encoder(s, clean_captions=True),
    r"null_text 'zero' \('empty_caption'\)": lambda s: setattr(s.text, "null_text", "zero"),
    r"text network TransformerEncoder \(null\)": lambda s: setattr(s.text, "network", TransformerEncoder(32, 32)),
    r"patch_size 2 \(not 1\)": patched,
}


@pytest.mark.parametrize("message", REFUSED)
def test_each_setting_that_the_pipelines_have_not(message, stages):
    stage_configs(stages[0])
    REFUSED[message](stages[0])
    with pytest.raises(InputError, match=message):
        stage_configs(stages[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsampling": "bilinear"}, r"upsampling 'bilinear' \('bilinear_aligned'\)"),
        ({"augmentation": LowResAugmentation()}, r"augmentation.schedule CosineSchedule"),
        ({"aug_level": 0.12345}, r"aug_level 0.12345 \(a whole noise_level of 1000\)"),
    ],
)
def test_each_setting_of_super_resolution(change, message, stages):
    stage_configs(stages[1])
    for name, value in change.items():
        setattr(stages[1], name, value)
    with pytest.raises(InputError, match=message):
        stage_configs(stages[1])


def test_what_else_they_can_express(stages):
    stage = stages[0]
    settings(stage, "diffusion", parametrization=V())
    for sampler, rule, expected in (
        (
            DDPM("small"),
            StaticThresholding(),
            {"variance_type": "fixed_small", "thresholding": False, "clip_sample": True},
        ),
        (
            DDPM("large"),
            NoThresholding(),
            {"variance_type": "fixed_large", "thresholding": False, "clip_sample": False},
        ),
        (DDPM("learned"), DynamicThresholding(0.99, 2.0), {"thresholding": True, "sample_max_value": 2.0}),
    ):
        settings(stage, "sampling", sampler=sampler, thresholding=rule, spacing=TrailingTimes())
        config = stage_configs(stage).scheduler
        assert {**expected, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}.items() <= config.items()
    assert isinstance(stage.diffusion.variance, LearnedRange)
    settings(stage, "sampling", sampler=DPMSolverPPSDE(), spacing=LinspaceTimes(-5.1))
    config = stage_configs(stage).scheduler
    assert config["algorithm_type"] == "sde-dpmsolver++"
    assert (config["lambda_min_clipped"], config["lower_order_final"]) == (-5.1, False)


def test_an_encoder_is_copied_or_named(stages, tmp_path):
    Cascade(stages[:1]).save(tmp_path / "cascade")
    with pytest.raises(InputError, match="text encoder 'both' is unknown; use copy or reference"):
        export_cascade(tmp_path / "cascade", tmp_path / "out", text_encoder="both")
    assert not (tmp_path / "out").exists()
