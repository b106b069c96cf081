"""The page of a fine-tuning: escaped, whole without its pictures, readable in a browser."""

from dataclasses import replace

import pytest
from PIL import Image

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.finetuning.evidence_schema import Evidence, Part
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.report.finetuning import CELL, build
from imagen_lightning.report.finetuning_runs import adapter_files, duration, origin_words, run_cost, size
from imagen_lightning.report.runs import Problems

BAD = "<b>"


def value(metric, number, **protocol):
    return Value(
        metric, number, number - 0.1, number + 0.1, Protocol(metric, image_size=8, **protocol), "95%"
    ).to_json()


def part(guidance=(2.0, 2.0)):
    def row(weight):
        values = (value("caption accuracy", 0.5, guidance=weight), value("FD-random", 1.0, guidance=weight))
        return Row(BAD, None, {"guidance": weight}, values, 0.5)

    real = Row("real images, 8 px", None, {}, (value("FD-random", 0.0),))
    numbers = {"before": 0.5, "after": 0.5, "value": 0.0, "low": -0.1, "high": 0.1}
    differences = tuple(
        {"metric": metric, **numbers, "confidence": BAD, "verdict": "alike"}
        for metric in ("caption accuracy", "caption accuracy, shape", "FD-random")
    )
    before, after = (row(weight) for weight in guidance)
    return Part(BAD, 3, (before,), (after,), (real,), differences, "FD-random", BAD)


def evidence(folder, **changes):
    names = [f"shown/{side}.png" for side in ("before", "after", "real")]
    for name in names:
        (folder / "shown").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    cell = {"caption": BAD, **dict(zip(("before", "after", "real"), names))}
    share = value("near copies", 0.2)
    near = {"image": names[1], "caption": BAD, "key": BAD, "distance": 1.0, "ratio": 0.5, "nearer_than": 0.97}
    copying = {
        "training": BAD, "num_training": 30, "of": 40, "held_out": 20, "leaks": 1, "sentence": BAD,
        "rows": [{"what": BAD, "space": "pixels", "values": [share], "z": -1.0}],
        "shown": [{"sample": names[0], "caption": BAD, "what": BAD, "nearest": {"pixels": near}}],
    }  # fmt: skip
    stage = {
        "name": BAD, "parameters": 10, "changed": 5, "added": 0, "removed": 0,
        "origin": {"before": None, "after": {"licence": BAD, "parents": [{"cascade": "x"}]}},
    }  # fmt: skip
    made = Evidence(
        BAD,
        BAD,
        "2026-11-25",
        {"command": BAD},
        BAD,
        part(),
        part(),
        copying,
        ({"title": BAD, "cells": [cell]},),
        (stage,),
    )
    return replace(made, **changes)


def body(html):
    return html[html.index("<body") : html.index("<script", html.index("</main>"))]


def test_texts_are_escaped_everywhere(tmp_path):
    problems = Problems()
    html = body(build(evidence(tmp_path), tmp_path, problems).render())
    assert "<b>" not in html.replace("<dd><b>", "")  # the page's own, of metrics
    assert html.count("&lt;b&gt;") > 20
    assert not problems.lines


def test_small_pictures_stand_side_by_side(tmp_path):
    html = build(evidence(tmp_path), tmp_path, Problems()).render()
    assert f"max-width:{3 * CELL + 16}px" in html
    assert f"max-width:{2 * CELL + 8}px" in html


def test_missing_pictures_are_told_and_leave_the_rest(tmp_path):
    made = evidence(tmp_path)
    (tmp_path / "shown/before.png").unlink()
    (tmp_path / "shown/real.png").write_bytes(b"no picture")
    problems = Problems()
    html = build(made, tmp_path, problems).render()
    assert len(problems.lines) == 2
    assert "is missing" in html
    assert "is no whole picture" in html
    assert "Cost and origin" in html


def test_what_was_not_measured_is_told(tmp_path):
    html = build(evidence(tmp_path, old=None, copying=None), tmp_path, Problems()).render()
    assert "give --before-data or --before-prompts" in html
    assert "give --train" in html
    assert "give its run folders as --run" in html


def test_settings_stand_in_columns_where_they_differ(tmp_path):
    same = build(evidence(tmp_path), tmp_path, Problems()).render()
    other = build(evidence(tmp_path, new=part((2.0, 3.0))), tmp_path, Problems()).render()
    assert ">Guidance<" not in same
    assert ">Guidance<" in other


def test_it_reads_in_a_browser(tmp_path, visit):
    path = tmp_path / "page.html"
    build(evidence(tmp_path), tmp_path, Problems()).write(path)
    page = visit(path)
    assert page.locator("section").count() == 7
    assert page.locator("#copying img").count() == 1
    page.locator("#copying img").scroll_into_view_if_needed()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    page.locator("#new details summary", has_text="Every stage").click()
    assert page.locator("#new table").nth(2).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_origins_in_words():
    parent = {"cascade": "emoji", "stage": "base", "sha256": ["388d57f5aefbfb90"], "origin": {"licence": "MIT"}}
    assert origin_words({"licence": "CC0", "parents": [parent]}) == (
        "licence CC0; from stage base of the cascade emoji (weights 388d57f5aefb), licence MIT"
    )


def test_sizes_and_durations():
    assert [size(count) for count in (2048, 1 << 20, 3 << 29)] == ["2.0 KiB", "1.0 MiB", "1,536.0 MiB"]
    assert [duration(seconds) for seconds in (None, 5, 65, 3723)] == ["–", "0:05", "1:05", "1:02:03"]


def test_adapters_are_files_or_folders(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name, count in (("a", 100), ("b", 50)):
        (tmp_path / "adapter" / f"{name}.safetensors").write_bytes(bytes(count))
    assert adapter_files([str(tmp_path / "adapter")])[0]["bytes"] == 150
    with pytest.raises(InputError, match="is no file"):
        adapter_files([str(tmp_path)])


def test_a_run_without_logs_has_no_time(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 5}\n")
    found = run_cost(tmp_path, Problems())
    assert (found["steps"], found["seconds"]) == (None, None)
    assert found["settings"] == {"trainer.max_steps": "5"}
