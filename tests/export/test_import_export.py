"""Pipelines to a cascade and back, to the bit; what is refused, and why."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, IFPipeline, IFSuperResolutionPipeline
from safetensors.torch import load_file, save_file

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.components import describe
from imagen_lightning.diffusion import DiscreteSchedule, DynamicThresholding, Epsilon, LearnedRange, LowResAugmentation
from imagen_lightning.export.export_cascade import export_cascade
from imagen_lightning.export.import_pipelines import import_pipelines
from imagen_lightning.samplers import DDPM, LeadingTimes
from imagen_lightning.types import InputError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SECOND = "larger stage II"  # takes what stage I draws


@pytest.fixture
def cascade(saved, tmp_path):
    """The folder of an imported cascade of two stages."""
    import_pipelines([saved("stage I"), saved(SECOND, with_text=False)]).save(tmp_path / "cascade")
    return tmp_path / "cascade"


def equal(one, other):
    """Whether two state dicts are the same to the bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8))
        for key in one
    )


def manifest(folder):
    return json.loads((folder / "cascade.json").read_text())


# ---- what a pipeline becomes


def test_what_the_stages_are(saved):
    base, larger = import_pipelines([saved("stage I"), saved(SECOND, with_text=False)]).stages
    for stage, most, steps, guidance in ((base, 1.5, 100, 7.0), (larger, 1.0, 50, 4.0)):
        assert describe(stage.diffusion.schedule) == describe(DiscreteSchedule("squaredcos_cap_v2"))
        assert isinstance(stage.diffusion.parametrization, Epsilon)
        assert describe(stage.diffusion.variance) == describe(LearnedRange())
        assert describe(stage.sampling.sampler) == describe(DDPM("learned"))
        assert describe(stage.sampling.spacing) == describe(LeadingTimes())
        assert describe(stage.sampling.thresholding) == describe(DynamicThresholding(0.95, most))
        assert (stage.sampling.num_steps, stage.sampling.guidance) == (steps, guidance)
        assert stage.text.null_text == "empty_caption"
        assert stage.text.encoder is base.text.encoder
        assert (stage.text.encoder.max_tokens, stage.text.encoder.padding) == (77, "attended")
    assert (base.image_size, larger.low_res_size, larger.image_size) == (32, 32, 64)
    assert (larger.aug_level, larger.upsampling) == (0.25, "bilinear_aligned")
    table = LowResAugmentation(DiscreteSchedule("squaredcos_cap_v2"))
    assert describe(larger.augmentation) == describe(table)
    for stage, source in ((base, saved("stage I")), (larger, saved(SECOND, with_text=False))):
        assert stage.origin["source"] == source.name
        assert stage.weights_record == {"kind": "imported", "format": "diffusers"}
        assert stage.origin["licence"] == "deepfloyd-if-license"
        assert stage.origin["licence_text"] == "The licence's text.\n"


def test_stages_alone(saved):
    base = import_pipelines([saved("stage I")])
    assert base.names == ["base"]
    larger = import_pipelines([saved("stage II")])
    assert larger.names == ["sr_32"]
    assert larger.stages[0].low_res_size == 8
    assert import_pipelines([saved("stage II")], low_res_size=16).stages[0].low_res_size == 16
    lent = import_pipelines([saved(SECOND, with_text=False)], text_encoder=saved("stage I"))
    assert lent.stages[0].text.encoder.dim == 32


# ---- round trips


def test_import_then_export_gives_the_same_pipelines(saved, cascade, tmp_path):
    sources = [saved("stage I"), saved(SECOND, with_text=False)]
    folders = export_cascade(cascade, tmp_path / "out")
    assert [folder.name for folder in folders] == ["stage_1", "stage_2"]
    for source, folder, kind in zip(sources, folders, (IFPipeline, IFSuperResolutionPipeline)):
        before, after = kind.from_pretrained(source), kind.from_pretrained(folder)
        assert equal(load_file(source / WEIGHTS), load_file(folder / WEIGHTS))
        assert equal(before.unet.state_dict(), after.unet.state_dict())
        for part in ("unet", "scheduler", "image_noising_scheduler"):
            if not hasattr(before, part):
                continue
            one, two = (dict(getattr(pipeline, part).config) for pipeline in (before, after))
            ignored = {"_use_default_values", "_name_or_path", "_diffusers_version", "lambda_min_clipped"}  # unread
            assert {k: v for k, v in one.items() if k not in ignored} == {
                k: v for k, v in two.items() if k not in ignored
            }
    # The scheduler's file says what the published one does.
    theirs, ours = (
        json.loads((f / "scheduler" / "scheduler_config.json").read_text()) for f in (sources[0], folders[0])
    )
    unread = {"_diffusers_version", "lambda_min_clipped"}
    assert {key: ours[key] for key in theirs.keys() - unread} == {key: theirs[key] for key in theirs.keys() - unread}
    first = IFPipeline.from_pretrained(folders[0])
    assert equal(first.text_encoder.state_dict(), IFPipeline.from_pretrained(sources[0]).text_encoder.state_dict())
    text = "a small red star above"
    assert first.tokenizer(text).input_ids == IFPipeline.from_pretrained(sources[0]).tokenizer(text).input_ids
    assert IFSuperResolutionPipeline.from_pretrained(folders[1]).text_encoder is None


def test_export_then_import_gives_the_same_cascade(cascade, tmp_path):
    loaded = Cascade.load(cascade)
    base, larger = loaded.stages
    base.text.drop, base.seed, base.sampling.num_steps = 0.25, 3, 40
    larger.aug_level, larger.sampling.guidance, larger.diffusion.variance.vlb_weight = 0.1, 2.5, 0.01
    larger.crop_size = 32
    base.weights_record = {"kind": "ema", "decay": 0.9}
    loaded.save(tmp_path / "changed")
    for how in ("reference", "copy"):
        folders = export_cascade(tmp_path / "changed", tmp_path / how, text_encoder=how)
        import_pipelines(folders).save(tmp_path / f"again-{how}")
        one, two = manifest(tmp_path / "changed"), manifest(tmp_path / f"again-{how}")
        for before, after in zip(one["stages"], two["stages"]):
            if how == "copy":  # the encoder lies elsewhere
                assert after["stage"]["init_args"]["text"]["init_args"]["encoder"] != {}
                for entry in (before, after):
                    entry["stage"]["init_args"]["text"]["init_args"].pop("encoder")
                    entry["text"].pop("encoder")
            assert before == after
        for name in ("base", "sr_64"):
            files = [folder / f"{name}.safetensors" for folder in (tmp_path / "changed", tmp_path / f"again-{how}")]
            assert files[0].read_bytes() == files[1].read_bytes()
    states = [
        Cascade.load(folder).stages[0].text.encoder(["a red star"]).states
        for folder in (cascade, tmp_path / "again-copy")
    ]
    assert torch.equal(*states)


def test_changed_configs_outweigh_what_an_export_wrote_beside_them(cascade, tmp_path):
    first, _ = export_cascade(cascade, tmp_path / "out")
    path = first / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_max_value": 1.2}))
    stage = import_pipelines([first]).stages[0]
    assert stage.sampling.thresholding.max_value == 1.2


def test_what_lies_beside_the_configs_runs_no_code(cascade, tmp_path):
    first, _ = export_cascade(cascade, tmp_path / "out")
    path = first / "imagen_lightning.json"
    said = json.loads(path.read_text())
    said["stage"]["init_args"]["network"]["class_path"] = "subprocess.Popen"
    path.write_text(json.dumps(said))
    refused(first, "the stage of 'stage_1': network: class 'subprocess.Popen' is not part of imagen_lightning")
    path.write_text(json.dumps({**said, "format": "another"}))
    refused(first, "is described in no 'imagen-lightning stage'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_stay_or_change_as_asked(copied, tmp_path, dtype):
    folder = copied("stage I")
    half = {key: value.to(dtype) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    import_pipelines([folder]).save(tmp_path / "cascade")
    (out,) = export_cascade(tmp_path / "cascade", tmp_path / "out")
    assert equal(load_file(out / WEIGHTS), half)
    whole = import_pipelines([folder], dtype="float32").stages[0].network
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert torch.equal(whole.conv_in.weight, half["conv_in.weight"].float())


def test_shards_and_variants(copied, saved):
    folder = copied("stage I")
    whole = import_pipelines([folder]).stages[0].state_dict()
    unet = IFPipeline.from_pretrained(folder).unet
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    assert equal(import_pipelines([folder]).stages[0].state_dict(), whole)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    next((folder / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(InputError, match=r"-00002-of-.* is missing"):
        import_pipelines([folder])
    content["weight_map"]["conv_in.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"names '../../elsewhere.safetensors'"):
        import_pipelines([folder])
    for file in (folder / "unet").glob("*safetensors*"):
        file.unlink()
    unet.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
    halved = import_pipelines([folder], variant="fp16").stages[0]
    assert halved.network.conv_in.weight.dtype == torch.float16
    for file in (folder / "unet").glob("*safetensors*"):
        file.unlink()
    unet.save_pretrained(folder / "unet", variant="fp16")
    assert equal(import_pipelines([folder], variant="fp16").stages[0].state_dict(), halved.state_dict())
    with pytest.raises(InputError, match=r"has no diffusion_pytorch_model.safetensors; .* use --variant fp16"):
        import_pipelines([folder])


# ---- the card


def test_licence_and_origin_reach_manifest_and_card(cascade, tmp_path):
    assert all(entry["origin"]["licence"] == "deepfloyd-if-license" for entry in manifest(cascade)["stages"])
    folders = export_cascade(cascade, tmp_path / "out")
    for folder in (tmp_path / "out", *folders):
        card = (folder / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert header["license"] == "other"
        assert header["license_name"] == "deepfloyd-if-license"
        assert header["license_link"] == "https://example.org/licence"
        assert header["library_name"] == "diffusers"
        assert "stage-I" in card
        assert "from_pretrained" in card
    assert all((folder / "LICENSE").read_text() == "The licence's text.\n" for folder in folders)
    assert 'Weights: imported (format="diffusers").' in (folders[1] / "README.md").read_text()
    assert "noise_level=250" in (folders[1] / "README.md").read_text()


def test_the_cards_code_draws(cascade, tmp_path, monkeypatch):
    for how in ("copy", "reference"):
        export_cascade(cascade, tmp_path / how, text_encoder=how)
        code = (tmp_path / how / "README.md").read_text().split("```python\n")[1].split("```")[0]
        for steps in ("100", "50"):
            code = code.replace(f"num_inference_steps={steps}", "num_inference_steps=2")
        monkeypatch.chdir(tmp_path / how)
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["images"].shape == (1, 3, 64, 64)


# ---- what is refused


def refused(folder, message, **options):
    with pytest.raises(InputError, match=message) as error:
        import_pipelines([folder], **options)
    assert "\n" not in str(error.value)


def test_stage_iii_is_refused(copied):
    folder = copied("stage II")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionUpscalePipeline"}))
    refused(folder, r"stage III: .*latent space.* SuperResolutionStage to 1024 px")
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    refused(folder, "'StableDiffusionPipeline'; IFPipeline and IFSuperResolutionPipeline")


def test_pickles_are_refused(copied):
    folder = copied("stage I")
    shutil.move(folder / WEIGHTS, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "diffusion_pytorch_model.bin alone: pickles, which can run code")


def test_weights_that_are_not_the_configs(copied):
    folder = copied("stage I")
    state = load_file(folder / WEIGHTS)
    lacking = {key: value for key, value in state.items() if key not in ("conv_in.bias", "conv_in.weight")}
    save_file(lacking, folder / WEIGHTS)
    refused(folder, "the weights of 'pipeline' lack 'conv_in.bias' and 1 more: they are not those of unet/config.json")
    save_file({**state, "other.weight": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, "have, beyond the U-Net's, 'other.weight'")
    save_file({**state, "conv_in.weight": torch.zeros(32, 4, 3, 3)}, folder / WEIGHTS)
    refused(folder, r"'conv_in.weight' has shape \(32, 4, 3, 3\) in diffusion.*makes it \(32, 3, 3, 3\)")
    (folder / WEIGHTS).write_bytes(b"no weights")
    refused(folder, "damaged")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "out_channels": 3}))
    refused(folder, "images of 3 channels and gives 3; IFPipeline has 3, and gives 3 and 3 of the variance")
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "act_fn": "mish"}))
    refused(folder, "'pipeline': .*act_fn 'mish'")


def test_another_text_encoder_is_refused(saved, copied):
    refused(
        copied("stage I"),
        "takes text of 32 features, but text encoder .* gives 64",
        text_encoder=saved("larger stage I"),
    )
    refused(saved("stage II", with_text=False), "holds no text encoder; name one: --text-encoder")


def test_sizes_that_do_not_chain(saved):
    with pytest.raises(InputError, match="low_res_size 32 must be positive and below image_size 32"):
        import_pipelines([saved("stage I"), saved("stage II")])
    with pytest.raises(InputError, match="put it first"):
        import_pipelines([saved(SECOND, with_text=False), saved("stage I")], text_encoder=saved("stage I"))


def test_schedulers_that_the_samplers_are_not(copied):
    folder = copied("stage II")
    path, noising = (folder / part / "scheduler_config.json" for part in ("scheduler", "image_noising_scheduler"))
    config = json.loads(path.read_text())
    for change, message in (
        ({"_class_name": "EulerDiscreteScheduler"}, "'EulerDiscreteScheduler'; DDPMScheduler and DPMSolverMultistep"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' .'linear' or 'squaredcos_cap_v2'"),
        ({"variance_type": "learned"}, "variance_type 'learned'"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing 'linspace' .'leading' or 'trailing'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    ):
        path.write_text(json.dumps({**config, **change}))
        refused(folder, message)
    path.write_text(json.dumps(config))
    noising.write_text(json.dumps({**json.loads(noising.read_text()), "beta_schedule": "scaled_linear"}))
    refused(folder, "image_noising_scheduler of 'pipeline' cannot be followed: beta_schedule 'scaled_linear'")


def test_solvers_configs_go_to_and_fro(copied, tmp_path):
    folder = copied("stage I")
    config = IFPipeline.from_pretrained(folder).scheduler.config
    solver = DPMSolverMultistepScheduler.from_config(config, lambda_min_clipped=-5.1)
    solver.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    import_pipelines([folder]).save(tmp_path / "cascade")
    (out,) = export_cascade(tmp_path / "cascade", tmp_path / "out")
    again = IFPipeline.from_pretrained(out).scheduler
    assert isinstance(again, DPMSolverMultistepScheduler)
    unread = {"clip_sample", "clip_sample_range", "_use_default_values", "_diffusers_version", "_class_name"}
    assert {k: v for k, v in dict(again.config).items() if k not in unread} == {
        k: v for k, v in dict(solver.config).items() if k not in unread
    }
    solver.register_to_config(use_karras_sigmas=True, solver_order=3)
    solver.save_pretrained(folder / "scheduler")
    refused(folder, r"solver_order 3 \(2\); use_karras_sigmas True")


def test_no_network_is_one_line(monkeypatch):
    def unreachable(*_):
        raise OSError("no route to host")

    monkeypatch.setattr("imagen_lightning.export.diffusers_folder.reach_hub", unreachable)
    message = "'DeepFloyd/IF-I-XL-v1.0' is no local folder and cannot be had from the cache or from Hugging Face"
    refused("DeepFloyd/IF-I-XL-v1.0", message)
    refused("./nowhere/at/all", "is no folder; give a folder that diffusers")


def test_a_hub_name_is_fetched_without_pickles_and_encoders(copied, monkeypatch):
    folder, asked = copied("stage I"), {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("imagen_lightning.export.diffusers_folder.reach_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    stage = import_pipelines(["some-one/if"], text_encoder=folder, revision="main").stages[0]
    assert (asked["name"], asked["revision"]) == ("some-one/if", "main")
    assert asked["ignore_patterns"] == ["*.bin", "*.ckpt"]
    assert not any(pattern.startswith("text_encoder") for pattern in asked["allow_patterns"])
    assert stage.origin["source"] == "some-one/if"
    assert stage.origin["revision"] == folder.name


# ---- the verbs


def test_the_verbs(saved, tmp_path, capsys):
    out = tmp_path / "cascade"
    given = ["import-diffusers", str(saved("stage I")), str(saved(SECOND, with_text=False)), str(out)]
    assert main(given) == 0
    assert "stage-I" in (said := capsys.readouterr().out)
    assert "deepfloyd-if-license" in said
    assert main(["export", str(out), str(tmp_path / "pipelines"), "--format", "diffusers"]) == 0
    assert "stage_2" in capsys.readouterr().out
    assert main(["import-diffusers", "./nowhere", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    assert main(["export", str(out), str(tmp_path / "pipelines"), "--format", "diffusers"]) == 2
    assert "there already" in capsys.readouterr().err
