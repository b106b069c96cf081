"""values.jsonl: whole at any moment, rewound where a run goes on, one entry a step and name."""

import json
from types import SimpleNamespace

import pytest

from imagen_lightning.callbacks.values import VALUES, column, log_values, rewind_values, stage_name
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.types import InputError


class Log:
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


def trainer_at(folder, step, rank=0):
    return SimpleNamespace(
        default_root_dir=str(folder), global_step=step, is_global_zero=rank == 0, loggers=[Log()], global_rank=rank
    )


def value(number, metric="CLIP score"):
    return Value(metric, number, None, None, Protocol(metric, seed=1))


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / VALUES).read_text().splitlines()]


BASE = SimpleNamespace(image_size=64)
HIGH = SimpleNamespace(image_size=256, low_res_size=64)


def test_names():
    assert (stage_name(BASE), stage_name(HIGH)) == ("base", "sr_256")
    assert column(BASE, "CLIP score") == "base/clip_score"
    assert column(HIGH, "FD-random") == "sr_256/fd-random"
    assert column(BASE, "caption accuracy, shape") == "base/caption_accuracy_shape"


def test_entries_read_back_as_values(tmp_path):
    trainer = trainer_at(tmp_path, 100)
    log_values(trainer, {"base/clip_score": value(0.5), "base/psnr": value(float("inf"), "PSNR")})
    assert trainer.loggers[0].rows == [(100, {"base/clip_score": 0.5, "base/psnr": float("inf")})]
    first, second = map(json.loads, (tmp_path / VALUES).read_text().splitlines())
    assert (first["step"], first["name"]) == (100, "base/clip_score")
    assert Value.from_json(first["value"]) == value(0.5)
    assert Value.from_json(second["value"]).value == float("inf")


def test_a_step_measured_again_has_its_last_values(tmp_path):
    for number in (0.1, 0.2):
        log_values(trainer_at(tmp_path, 100), {"base/clip_score": value(number), "base/psnr": value(1.0, "PSNR")})
        log_values(trainer_at(tmp_path, 200), {"base/clip_score": value(number)})
    lines = [json.loads(line) for line in (tmp_path / VALUES).read_text().splitlines()]
    assert [(line["step"], line["name"], line["value"]["value"]) for line in lines] == [
        (100, "base/clip_score", 0.2),
        (100, "base/psnr", 1.0),
        (200, "base/clip_score", 0.2),
    ]


def test_rewinding_keeps_what_lies_behind_the_checkpoint(tmp_path):
    for step in (100, 200, 300):
        log_values(trainer_at(tmp_path, step), {"base/clip_score": value(0.5)})
    rewind_values(trainer_at(tmp_path, 100, rank=1))
    assert steps(tmp_path) == [100, 200, 300]
    rewind_values(trainer_at(tmp_path, 200))
    assert steps(tmp_path) == [100, 200]
    rewind_values(trainer_at(tmp_path, 0))
    assert steps(tmp_path) == []
    rewind_values(trainer_at(tmp_path / "new", 0))
    assert not (tmp_path / "new").exists()


def test_the_file_is_whole_at_any_moment(tmp_path, monkeypatch):
    log_values(trainer_at(tmp_path, 100), {"base/clip_score": value(0.5)})
    before = (tmp_path / VALUES).read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        log_values(trainer_at(tmp_path, 200), {"base/clip_score": value(0.5)})
    assert (tmp_path / VALUES).read_text() == before


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"name": "base/fid"}\n', "3\n"])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / VALUES).write_text(content)
    with pytest.raises(InputError, match=r"values\.jsonl holds no values; move it out of the run folder"):
        rewind_values(trainer_at(tmp_path, 5))
    assert (tmp_path / VALUES).read_text() == content
