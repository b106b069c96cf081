"""Each setting that can change a pixel changes the name of a cached image, its protocol and every record of it."""

import copy
import inspect
import json
from dataclasses import fields, replace
from types import SimpleNamespace

import torch

from imagen_lightning import diffusion, samplers
from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.cascade.description import model_description, sampling_description
from imagen_lightning.cascade.sampling import protocol_fields
from imagen_lightning.diffusion import LearnedRange, NoThresholding, Parametrization, Thresholding
from imagen_lightning.evaluation.data import load_evaluation_set
from imagen_lightning.evaluation.drawing import Chain, Drawing
from imagen_lightning.metrics.protocol import MADE, Protocol, Value, columns
from imagen_lightning.networks import LoRA
from imagen_lightning.samplers import DDIM
from imagen_lightning.stages import Diffusion, Sampling, TextSettings
from imagen_lightning.text import TransformerEncoder
from imagen_lightning.types import Sampler, Schedule, Spacing

# Only training reads these, or they change rounding alone; anything else, also what is added later, must count.
FREE = ("seed", "crop_size", "optimization", "execution", "text.drop", "diffusion.weighting", "diffusion.times")
# What the weights belong to: another one is another model, which a protocol does not tell apart.
OF_THE_WEIGHTS = ("network", "image_size", "low_res_size")
GROUPS = {"sampling": Sampling, "diffusion": Diffusion, "text": TextSettings}
NEEDED = {"ShiftedCosineSchedule": {"image_size": 64}, "ListedTimes": {"steps": [9, 3]}}
KINDS = {
    "diffusion.schedule": Schedule,
    "diffusion.parametrization": Parametrization,
    "sampling.thresholding": Thresholding,
    "sampling.spacing": Spacing,
    "sampling.sampler": Sampler,
}


class Another:
    """Takes the place of any component."""

    name = "another"


def found(kind):
    """An instance of each class of the kind that the package exports."""
    classes = [getattr(module, name) for module in (diffusion, samplers) for name in module.__all__]
    made = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, kind) and cls is not kind]
    return [cls(**NEEDED.get(cls.__name__, {})) for cls in made]


def arguments(value):
    """The names of the arguments of a component or group of settings; none for plain data."""
    cls = type(value)
    if not cls.__module__.startswith("imagen_lightning") or cls.__init__ is object.__init__:
        return []
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def walk(value, path=()):
    """The paths of all arguments below a component."""
    for name in arguments(value):
        yield (*path, name)
        yield from walk(getattr(value, name), (*path, name))


def other(value):
    if value is None or isinstance(value, str):
        return f"{value} another"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 0.5
    if isinstance(value, list | tuple):
        return [*value, 1]
    return Another()


def changed(stage, path):
    """A copy of the stage with another value at the path."""
    made = copy.deepcopy(stage)
    holder = made
    for name in path[:-1]:
        holder = getattr(holder, name)
    name, value = path[-1], other(getattr(holder, path[-1]))
    inner = f"_{name}" if isinstance(getattr(type(holder), name, None), property) else name
    object.__setattr__(holder, inner, value) if isinstance(value, Another) else setattr(holder, inner, value)
    return made


def keys_of(stage):
    """What caches, records and protocols tell an image of the stage by."""
    own, sampling, model = stage.sampling, sampling_description(stage), model_description(stage)
    aug_level = getattr(stage, "aug_level", None)
    setting = StageSettings("base", own.sampler, own.num_steps, own.guidance, aug_level, sampling, model)
    cascade = SimpleNamespace(stages=[stage], names=["base"])
    data = SimpleNamespace(captions=["a"], images=None, sha256="0")
    name = Drawing(cascade, data, None, identity="weights").name(Chain(0, 0, (setting,)))
    protocol = Protocol("FID", image_size=8, **protocol_fields([setting.described()]))
    assert protocol == Protocol.from_json(json.loads(json.dumps(protocol.to_json())))
    return name, json.dumps(setting.described(), sort_keys=True), protocol


def stages(make_base, make_sr):
    """Stages that hold each component of the package somewhere."""
    text = TransformerEncoder(16, 16, num_layers=1, num_heads=2)
    base = make_base(adapter=LoRA(rank=2), diffusion=Diffusion(variance=None))
    base.text = replace(base.text, network=text)
    yield base, ()
    yield make_sr(), ()
    for place, kind in KINDS.items():
        group, name = place.split(".")
        for component in found(kind):
            stage = make_sr()
            setattr(stage, group, replace(getattr(stage, group), **{name: component}))
            yield stage, (group, name)
    for component in (LearnedRange(), diffusion.FixedVariance()):
        stage = make_sr()
        stage.diffusion.variance = component
        yield stage, ("diffusion", "variance")


def is_free(path):
    return any(".".join(path) == name or ".".join(path).startswith(f"{name}.") for name in FREE)


def test_any_setting_that_can_change_a_pixel_changes_name_record_and_column(make_base, make_sr):
    seen = set()
    for stage, below in stages(make_base, make_sr):
        before = keys_of(stage)
        assert keys_of(copy.deepcopy(stage)) == before
        for path in walk(stage):
            if path[: len(below)] != below or (path[0] in GROUPS and len(path) == 1):
                continue
            name, record, protocol = keys_of(changed(stage, path))
            seen.add(path)
            if is_free(path):
                assert (name, record, protocol) == before, path
                continue
            assert name != before[0], path
            assert record != before[1], path
            if path[0] in OF_THE_WEIGHTS:
                continue
            values = [Value("FID", 1.0, None, None, item) for item in (before[2], protocol)]
            assert len(columns(values)) == 2, path
            assert values[0].protocol.differences(values[1].protocol), path
            assert len(columns(values, compared=MADE)) == 1, path
    for name, group in GROUPS.items():
        assert {(name, field.name) for field in fields(group) if field.init} <= seen
    assert len({path for path in seen if not is_free(path)}) > 60


def test_each_class_of_a_kind_has_a_name_and_column_of_its_own(make_sr):
    for place, kind in KINDS.items():
        group, name = place.split(".")
        components = found(kind)
        assert len(components) >= 3
        keys = []
        for component in components:
            stage = make_sr()
            setattr(stage, group, replace(getattr(stage, group), **{name: component}))
            keys.append(keys_of(stage))
        assert len({key[0] for key in keys}) == len({key[2].key() for key in keys}) == len(components)


def test_equal_settings_have_equal_keys(make_base):
    first, second = make_base(), make_base()
    first.sampling = Sampling(DDIM(eta=0), 3, 2, guidance_interval=(0, 5), guidance_rescale=0)
    second.sampling = Sampling(DDIM(eta=0.0), 3, 2.0, guidance_interval=[0.0, 5.0], guidance_rescale=0.0)
    assert keys_of(first) == keys_of(second)
    second.seed, second.text.drop = 7, 0.5
    assert keys_of(first) == keys_of(second)


def test_ddim_with_noise_and_without_are_two_columns(make_base):
    stage = make_base()
    values = []
    for eta in (0.0, 1.0, 0.0):
        stage.sampling = Sampling(DDIM(eta), 3, 2.0)
        values.append(Value("FID", eta, None, None, keys_of(stage)[2]))
    assert [len(group) for group in columns(values)] == [2, 1]
    assert values[0].protocol.differences(values[1].protocol) == ["sampler: DDIM(eta=0) and DDIM(eta=1)"]


def test_an_edited_manifest_gets_images_of_its_own(cascade, tmp_path):
    data = load_evaluation_set("shapes", 2, 16)
    cascade.save(tmp_path / "cascade")

    def drawn():
        loaded = Cascade.load(tmp_path / "cascade")
        drawing = Drawing(loaded, data, tmp_path / "samples", identity="weights", batch_size=2)
        images = drawing.draw(Chain(0, 1, tuple(loaded.settings()))).images[:]
        assert torch.equal(images, loaded.sample(data.captions, batch_size=2).images)
        return images

    before = drawn()
    path = tmp_path / "cascade" / "cascade.json"
    manifest = json.loads(path.read_text())
    rule = {"class_path": "imagen_lightning.diffusion.NoThresholding", "init_args": {}}
    manifest["stages"][0]["stage"]["init_args"]["sampling"]["init_args"]["thresholding"] = rule
    manifest["stages"][0]["sampling"]["thresholding"] = rule
    path.write_text(json.dumps(manifest))
    assert isinstance(Cascade.load(tmp_path / "cascade").stages[0].sampling.thresholding, NoThresholding)
    assert not torch.equal(drawn(), before)
