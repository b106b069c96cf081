"""Run folders are read as plain data, and what is broken is named."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from imagen_lightning.errors import InputError
from imagen_lightning.report.report import build
from imagen_lightning.report.runs import Problems, read_run
from imagen_lightning.report.sample_sets import open_picture
from imagen_lightning.report.sources import read_sources


def read(folder):
    problems = Problems()
    return read_run(folder, problems), [line.replace(str(folder), "RUN") for line in problems.lines]


def test_a_whole_run(make, tmp_path):
    folder = make.run(tmp_path / "run", samples={"steps": (500, 1000)})
    (folder / "skipped.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    run, problems = read(folder)
    assert problems == []
    assert run.config["model"]["init_args"]["image_size"] == 16
    assert run.info["git"].endswith("-dirty")
    assert run.num_steps == 200 * 50
    assert list(run.curves["val/loss"].steps[:2]) == [499, 999]
    assert [item.step for item in run.samples] == [500, 1000]
    assert run.samples[0].samples[1].key == ("a blue circle", 0, 1)
    assert run.num_skipped == 2
    lines = ["step,data/skipped/no_image,data/skipped/bad_json,data/skipped_val/no_image", "0,1,,5", "9,4,3,"]
    (folder / "metrics.csv").write_text("\n".join(lines))
    assert read(folder)[0].num_skipped == 7  # as the run counted


def test_rows_and_cells_that_are_no_numbers_are_counted(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,val/loss\n0,0.5,\n9,nan,0.25\nx,1,1\n19,bad,0.125\n29,0.1\n" + "9" * 5000 + ",1,1\n"
    )
    run, problems = read(tmp_path)
    assert problems == ["RUN/metrics.csv: rows or cells that are no numbers are left out: 4"]
    np.testing.assert_array_equal(run.curves["train/loss"].values, [0.5, np.nan])
    assert list(run.curves["val/loss"].steps) == [9, 19]


def test_steps_are_counted_in_one_way_whatever_was_logged_last(tmp_path):
    """The loss of the 20th step has the row 19, what was measured of the weights after it the row 20."""
    rows = {"loss alone": "19,0.5,", "measured after it": "19,0.5,\n20,,4", "measured alone": "20,,4"}
    for name, text in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train/loss,base/fd-random\n{text}\n")
        assert read(tmp_path / name)[0].num_steps == 20
    (tmp_path / "none").mkdir()
    (tmp_path / "none/metrics.csv").write_text("step\n")
    assert read(tmp_path / "none")[0].num_steps is None


def test_what_a_callback_could_not_measure_is_said(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,1\n")
    (tmp_path / "failures.jsonl").write_text('{"step": 5, "callback": "FID", "error": "ValueError: no"}\n')
    assert read(tmp_path)[1] == ["RUN: FID failed at step 5 and logged nothing there: ValueError: no"]
    (tmp_path / "failures.jsonl").write_text("{")
    assert read(tmp_path)[1] == ["RUN/failures.jsonl: is broken or half-written, and left out"]


def test_values_and_the_verdict(make, tmp_path):
    folder = make.run(tmp_path / "run")
    fid = make.value("FID", 3.0)
    make.values(folder, [(20, "base/fid", fid), (10, "base/fid", make.value("FID", 4.0)), (20, "base/kid", {"no": 1})])
    (folder / "values.jsonl").open("a").write('{"step": 30, "name": "torn')
    (folder / "verdict.json").write_text(json.dumps({"step": 20, "stage": "base", "verdict": ["text is ignored"]}))
    run, problems = read(folder)
    assert [(item.step, item.name, item.value.value) for item in run.measurements] == [
        (10, "base/fid", 4.0),
        (20, "base/fid", 3.0),
    ]
    assert run.measurements[-1].value.to_json() == fid
    assert run.verdict == ["text is ignored (step 20)"]
    assert problems == ["RUN/values.jsonl: lines that are no values are left out: 2"]
    (folder / "verdict.json").write_text(json.dumps({"step": 20, "verdict": []}))
    assert read(folder)[0].verdict == ["nothing ails (step 20)"]


BROKEN = {
    "verdict.json": ["{", "[]", "{}"],
    "metrics.csv": ["", "\0\1\2", "time,loss\n1,2\n", b"step,a\n\xff\xfe"],
    "run.json": ['{"created": "2026', "[1]", "", "[" * 100_000],
    "config.yaml": ["a: [", "- 1", "!!python/object/apply:os.system [echo]", "a: &a [*a]", b"\xff"],
    "samples/0000500/samples.json": ['{"step": 5', "[]", '{"step": 500}', '{"images": [{"file": "../../x.png"}]}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, item) for name, items in BROKEN.items() for item in items])
def test_a_broken_file_is_named_and_the_rest_is_read(make, tmp_path, name, content):
    folder = make.run(tmp_path / "run", samples={"steps": (500, 1000)})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    run, problems = read(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"RUN/{name}: ")
    assert bool(run.curves) == (name != "metrics.csv")
    assert bool(run.config) == (name != "config.yaml")
    assert bool(run.info) == (name != "run.json")
    assert len(run.samples) == (1 if name.startswith("samples") else 2)


def test_half_written_folders(make, tmp_path):
    folder = make.run(tmp_path / "run", samples={"steps": (500, 1000)})
    (folder / "metrics.csv").unlink()
    (folder / "samples/0001000/samples.json").unlink()
    _, problems = read(folder)
    assert problems == [
        "RUN: no metrics.csv: nothing was logged yet",
        "RUN/samples/0001000: has no samples.json: half-written, and left out",
    ]


def test_file_names_do_not_lead_out_of_the_folder(make, tmp_path):
    folder = make.run(tmp_path / "run", samples={"steps": (500,)})
    path = folder / "samples/0000500/samples.json"
    for name in ("../0000500/00000.png", "/etc/passwd", "..\\x.png"):
        content = json.loads(path.read_text())
        content["images"][0]["file"] = name
        path.write_text(json.dumps(content))
        run, problems = read(folder)
        assert run.samples == []
        assert "left out" in problems[0]


PICKLE = b"cbuiltins\nprint\n(S'executed'\ntR."  # prints a word where it is unpickled


def test_nothing_is_unpickled(make, tmp_path, capsys):
    folder = make.run(tmp_path / "run", samples={"steps": (500,)})
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/last.ckpt", "metrics.csv", "config.yaml", "run.json", "samples/0000500/00000.png"):
        (folder / name).write_bytes(PICKLE)
    run, problems = read(folder)
    assert open_picture(run.samples[0].samples[0].path, lambda *_: None) is None
    assert len(problems) == 3
    assert "executed" not in capsys.readouterr().out


def test_broken_pictures_are_named(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", format="BMP")
    problems = Problems()
    assert open_picture(tmp_path / "whole.png", problems.add).size == (64, 64)
    for name in ("cut.png", "other.png", "missing.png"):
        assert open_picture(tmp_path / name, problems.add) is None
        assert name in problems.lines[-1]


# ---- finding them


def test_everything_below_a_folder_is_found_and_named(make, tmp_path):
    for name in ("q/base", "q/sr", "other/deep/run"):
        make.run(tmp_path / name)
    make.matrix(tmp_path / "q/matrix")
    make.run(tmp_path / "q/base/checkpoints/not_a_run")  # never looked into
    sources = read_sources([tmp_path / "q", tmp_path / "other", tmp_path / "q/base/metrics.csv"])
    assert [run.name for run in sources.runs] == ["q/base", "q/sr", "other/deep/run"]
    assert [found.name for found in sources.evaluations] == ["q/matrix"]
    assert sources.problems.lines == [f"{tmp_path / 'q/base/metrics.csv'}: is a file; give the folder that holds it"]
    assert read_sources([tmp_path / "q"]).title == "q"
    alone = read_sources([tmp_path / "q/base"])
    assert (alone.title, alone.runs[0].name) == ("base", "base")


def test_what_is_missing_is_named_but_not_fatal(make, tmp_path):
    make.run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/evaluation.json").write_text("{")
    sources = read_sources([tmp_path / "run", tmp_path / "empty", tmp_path / "eval", tmp_path / "nowhere"])
    assert len(sources.runs) == 1
    for name in ("empty", "eval", "nowhere"):
        assert any(name in line for line in sources.problems.lines)


def test_nothing_left_is_an_input_error(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "run.json", "metrics.csv"):
        (tmp_path / "run" / name).write_text("{[")
    with pytest.raises(InputError, match=r"nothing to report on: .*nowhere.*config.yaml.*run.json.*metrics.csv"):
        read_sources([tmp_path / "run", tmp_path / "nowhere"])


ODD = (None, [], {}, 3, -1.5, "x", True, [None, {"a": [1]}], {"class_path": 3, "init_args": []}, float("nan"))


def mutations(content):
    """Every copy of plain data in which one part is odd."""
    yield from ODD
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        for changed in mutations(item):
            copy = dict(content) if isinstance(content, dict) else list(content)
            copy[key] = changed
            yield copy


FILES = (
    "run/values.jsonl",
    "run/verdict.json",
    "run/config.yaml",
    "run/run.json",
    "run/samples/0000500/samples.json",
    "matrix/evaluation.json",
)


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_holds_a_page_is_made(make, tmp_path, name):
    make.run(tmp_path / "run", samples={"steps": (500,)}, metrics={"num": 20})
    make.values(tmp_path / "run", [(500, "base/fid", make.value("FID", 3.0, steps=[10, 20]))])
    (tmp_path / "run" / "verdict.json").write_text(json.dumps({"step": 500, "verdict": ["x"]}))
    make.matrix(tmp_path / "matrix")
    path = tmp_path / name
    whole = yaml.safe_load(path.read_text())
    if name.startswith("matrix"):
        whole["rows"] = whole["rows"][:1]
    changes = list(mutations(whole))
    for changed in changes[:: max(1, len(changes) // 20)]:
        path.write_text(json.dumps(changed))  # JSON is YAML
        page = build(read_sources([tmp_path]))
        assert "Runs" in [section.title for section in page.sections]
