import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagen_lightning.components import build, class_path, describe, describe_args, find_class
from imagen_lightning.diffusion import CosineSchedule, DynamicThresholding, MinSNR, ShiftedCosineSchedule, V
from imagen_lightning.networks import UNet
from imagen_lightning.samplers import DDIM, LogSNRTimes
from imagen_lightning.types import InputError

HERE = __name__.split(".")[0]


class Own:
    def __init__(self, size, inner=None, *, scale=1.0):
        self.size, self.inner, self.scale = size, inner, scale


class Forgetful:
    def __init__(self, kept, lost):
        self.kept = kept


class Open:
    def __init__(self, **options):
        self.options = options


@dataclass
class Record:
    values: list
    path: Path = Path("a/b")


@pytest.mark.parametrize(
    "value",
    [
        CosineSchedule(),
        ShiftedCosineSchedule(256, 128),
        V(),
        MinSNR(3.0),
        DDIM(0.5),
        LogSNRTimes(-7.0, 8.0),
        DynamicThresholding(0.9, 2.0),
        UNet(dim=8, multipliers=(1, 2), num_blocks=1, attention=(False, True), groups=4, head_dim=8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_and_its_description(value):
    described = describe(value)
    assert json.loads(json.dumps(described)) == described
    again = build(described)
    assert type(again) is type(value)
    assert describe(again) == described
    # the shortest public path, not the file it lies in
    assert described["class_path"].split(".")[:-1] == ["imagen_lightning", type(value).__module__.split(".")[1]]


def test_plain_data_stays():
    data = {"a": [1, 2.5, None, True, "x"], "b": {"c": []}}
    assert describe(data) == data
    assert build(data) == data
    assert describe((1, Path("a") / "b")) == [1, "a/b"]


def test_objects_within_objects():
    described = describe(Own(3, {"first": [Own(4, DDIM(0.25), scale=2.0)]}))
    again = build(described, trust=[HERE])
    assert (again.size, again.scale) == (3, 1.0)
    inner = again.inner["first"][0]
    assert (inner.size, inner.scale, inner.inner.eta) == (4, 2.0, 0.25)
    record = build(describe(Record([DDIM(1.0)])), trust=[HERE])
    assert record.values[0].eta == 1.0
    assert record.path == "a/b"


def test_describe_reads_what_the_object_is_now():
    sampler = DDIM(0.5)
    sampler.eta = 1.0
    assert describe(sampler)["init_args"] == {"eta": 1.0}
    assert describe_args(Own(1, 2), skip=("inner",)) == {"size": 1, "scale": 1.0}


def test_arguments_that_are_not_kept():
    with pytest.raises(InputError, match=r"'lost'.*self\.lost = lost"):
        describe(Forgetful(1, 2))
    with pytest.raises(InputError, match="'options'"):
        describe(Open(a=1))


def test_foreign_classes_are_not_imported():
    for path in ("os.system", "subprocess.Popen", "torch.optim.AdamW", "imagen_lightning_evil.Net"):
        with pytest.raises(InputError, match=rf"--trust {path.split('.')[0]}"):
            build({"class_path": path, "init_args": {}})
    nested = {"class_path": class_path(DDIM), "init_args": {"eta": [{"class_path": "os.system"}]}}
    with pytest.raises(InputError, match="--trust os"):
        build(nested["init_args"]["eta"])
    with pytest.raises(InputError, match=r"^eta \[.*must be a finite number"):
        build(nested)
    with pytest.raises(InputError, match=r"write imagen_lightning\.callbacks\.EMA"):
        build({"class_path": "callbacks.EMA"})


def test_classes_that_do_not_exist():
    for path in ("imagen_lightning.samplers.Nope", "imagen_lightning.samplers.nowhere.Nope"):
        with pytest.raises(InputError, match="does not exist"):
            find_class(path)
    with pytest.raises(InputError, match="not a class"):
        find_class("imagen_lightning.diffusion.guide")


def test_arguments_that_do_not_fit():
    path = "imagen_lightning.samplers.DDIM"
    with pytest.raises(InputError, match=rf"{path}.*'zeta'"):
        build({"class_path": path, "init_args": {"zeta": 1}})
    with pytest.raises(InputError, match="eta 2"):
        build({"class_path": path, "init_args": {"eta": 2}})
    assert build({"class_path": path}).eta == 0
    assert build({"class_path": path, "init_args": None}).eta == 0
