"""Plain sentences, and the JSON that the page is made of."""

import json

import pytest

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.finetuning import evidence_schema
from imagen_lightning.finetuning.evidence_schema import Evidence, Part
from imagen_lightning.finetuning.evidence_words import (
    EVERYWHERE,
    change_sentence,
    copying_sentence,
    copying_verdict,
    leak_words,
    part_sentence,
    verdict,
)


def difference(metric="caption accuracy", before=0.12, after=0.78, low=0.58, high=0.73, reading="better"):
    value = after - before
    numbers = {"before": before, "after": after, "value": value, "low": low, "high": high}
    return {"metric": metric, **numbers, "confidence": "95%", "verdict": reading}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (difference(), "caption accuracy rose from 12% to 78% (by +66 points, +58 to +73)"),
        (difference("FD-random", 0.5, 0.25, -0.3, -0.2), "FD-random fell from 0.5 to 0.25 (by -0.25, -0.3 to -0.2)"),
        (difference("CLIP score", 20, 20, -1, 1), "CLIP score stayed at 20 (a difference within -1 to +1)"),
        (difference("PSNR", 20, 21, None, None), "PSNR rose from 20 to 21 (no interval known)"),
    ],
)
def test_a_change_in_words(given, words):
    assert change_sentence(given) == words


def test_a_part_in_words():
    differences = [difference("FD-random"), difference(reading="alike")]
    assert part_sentence(differences, "caption accuracy").endswith("+73): no difference beyond chance.")
    assert part_sentence(differences, "caption accuracy").startswith("Caption accuracy rose")
    assert "give --clip" in part_sentence(differences, None)


def rows(low, space=EVERYWHERE):
    value = {"metric": "near copies", "value": 0.3, "low": low, "high": 0.4}
    return [{"what": "held-out captions", "space": space, "values": [value]}]


def test_copying_is_judged_by_what_is_sure_in_all_spaces():
    assert copying_verdict(rows(0.06)) == "copies"
    assert copying_verdict(rows(0.05)) == "none"
    assert copying_verdict(rows(0.9, "pixels")) == "none"
    assert "30% (6 to 40) of held-out captions; of held-out images at most 5%" in copying_sentence(rows(0.06))
    assert copying_sentence(rows(0.04)).startswith("No more samples than held-out images")
    assert leak_words({"leaks": 0, "held_out": 9}) is None
    assert leak_words({"leaks": 1, "held_out": 9}).startswith("1 held-out image of 9 also stand")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("better", "alike", "none"), ("better than BEFORE", "no loss of what BEFORE", "no sign of copies")),
        (("worse", "worse", "copies"), ("worse than BEFORE", "has lost some", "look at them below")),
        (("alike", "better", None), ("No gain", "does better on what", "copying was not measured")),
        ((None, None, None), ("Nothing judged the new domain", "nothing judged what", "not measured")),
    ],
)
def test_the_verdict(given, words):
    new, old, copying = given
    judged = [None if reading is None else {"verdict": reading} for reading in (new, old)]
    text = verdict(*judged, copying, trained=True, asked_old=True)
    assert all(word in text for word in words)
    assert "was not measured" in verdict(judged[0], None, copying, trained=True, asked_old=False)
    assert "nothing was trained" in verdict(*judged, copying, trained=False, asked_old=True)


def evidence(picture="shown/a.png"):
    row = Row("base", None, {"guidance": 2.0}, ({"metric": "x", "value": "inf"},), 0.5)
    part = Part("data", 3, (row,), (row,), (), (difference(),), "caption accuracy", "words")
    cell = {"caption": "a", "before": picture, "after": None, "real": None}
    grids = ({"title": "t", "cells": [cell]},)
    return Evidence("before", "after", "2026-11-25", {"seed": 0}, "verdict", part, None, None, grids)


def test_the_json_gives_the_evidence_back(tmp_path):
    evidence_schema.save(evidence(), tmp_path / "page.json")
    found = evidence_schema.load(tmp_path / "page.json")
    assert found == evidence()
    assert found.pictures() == ["shown/a.png"]
    assert found.new.judging["metric"] == "caption accuracy"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no whole JSON"),
        ("[]", "format None is unknown"),
        (json.dumps({"format": 2}), "format 2 is unknown"),
        (json.dumps({"format": 1}), "no evidence of a fine-tuning"),
        (json.dumps(evidence("../../etc/x.png").to_json()), "lies outside"),
        (json.dumps(evidence("/etc/x.png").to_json()), "lies outside"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    (tmp_path / "page.json").write_text(content)
    with pytest.raises(InputError, match=words):
        evidence_schema.load(tmp_path / "page.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        evidence_schema.load(tmp_path / "page.json")
