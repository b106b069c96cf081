"""evaluation.json: there and back, and what is refused."""

import json

import pytest

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import EVALUATION, Evaluation, Row, load, save

VALUE = {"metric": "fid", "value": 12.5, "low": 12.0, "high": 13.0, "protocol": {"num_samples": 200}}


def evaluation(**changes):
    rows = (
        Row("base", None, {"guidance": 1.5, "steps": 30, "sampler": "DPMSolverPP", "seed": 0}, (VALUE,), 0.02, 10**9),
        Row("sr_64", "real", {"aug_level": 0.1}, (VALUE, VALUE), None, None, "samples/sr_64-real.png"),
        Row("sr_64", "chain"),
    )
    known = {
        "kind": "matrix",
        "cascade": "runs/c",
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"torch": "2"},
    }
    return Evaluation(**{**known, "rows": rows, "verdict": "sr_64 costs most", "best": {"guidance": 2}, **changes})


def test_there_and_back(tmp_path):
    saved = evaluation()
    save(saved, tmp_path / "new")
    assert load(tmp_path / "new") == saved
    assert [path.name for path in (tmp_path / "new").iterdir()] == [EVALUATION]
    content = json.loads((tmp_path / "new" / EVALUATION).read_text())
    assert content["format"] == 1
    assert set(content) == {"format", "kind", "cascade", "created", "environment", "rows", "verdict", "best"}
    assert set(content["rows"][0]) == {
        *("stage", "input", "settings", "values", "seconds_per_image", "peak_memory_bytes", "samples")
    }
    save(evaluation(kind="sweep", verdict=None, best=None), tmp_path / "new")  # in the earlier one's place
    assert load(tmp_path / "new") == evaluation(kind="sweep", verdict=None, best=None)


def test_numbers_that_json_lacks(tmp_path):
    row = Row("base", values=({"value": float("nan"), "high": float("inf")},))
    save(evaluation(rows=(row,)), tmp_path)
    assert load(tmp_path).rows[0].values == ({"value": "nan", "high": "inf"},)


def test_entries_of_later_versions_are_left_out():
    content = evaluation().to_json()
    content["new"] = content["rows"][0]["new"] = 1
    assert Evaluation.from_json(content) == evaluation()


def changed(path, value):
    content = evaluation().to_json()
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "format None is unknown"),
        (changed(["format"], 2), "format 2 is unknown; this version reads format 1"),
        (changed(["kind"], "table"), "kind 'table'.*use one of matrix, sweep"),
        (changed(["rows"], None), "rows is missing"),
        (changed(["rows"], {}), r"rows is \{\}, of the wrong type"),
        (changed(["rows", 1], "text"), r"rows\[1\] is no object"),
        (changed(["rows", 1, "stage"], None), r"rows\[1\].stage is missing"),
        (changed(["rows", 1, "input"], "noise"), "input 'noise'.*real, generated, chain, null"),
        (changed(["rows", 1, "values"], [1]), r"rows\[1\].values are not all objects"),
        (changed(["rows", 1, "seconds_per_image"], "fast"), "seconds_per_image is 'fast'"),
        (changed(["rows", 1, "peak_memory_bytes"], True), "peak_memory_bytes is True"),
        (changed(["rows", 1, "samples"], "../../secret.png"), "outside of the evaluation's folder"),
        (changed(["rows", 1, "samples"], "/secret.png"), "outside of the evaluation's folder"),
        (changed(["verdict"], 3), "verdict is 3"),
    ],
)
def test_what_is_refused(content, message, tmp_path):
    (tmp_path / EVALUATION).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / EVALUATION) in str(caught.value)


def test_half_written_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(tmp_path)
    (tmp_path / EVALUATION).write_text(json.dumps(evaluation().to_json())[:-40])
    with pytest.raises(InputError, match="no whole JSON"):
        load(tmp_path)
    (tmp_path / EVALUATION).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no whole JSON"):
        load(tmp_path)
