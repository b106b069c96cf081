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
    for reading, end in (("better", "better"), ("alike", "no difference that matters"), ("unclear", "from these")):
        differences = [difference("FD-random"), difference(reading=reading)]
        assert part_sentence(differences, "caption accuracy").endswith(f"{end}.")
    assert part_sentence(differences, "caption accuracy").startswith("Caption accuracy rose")
    assert "give --clip" in part_sentence(differences, None)


def near(metric, value, low, high):
    return {"metric": metric, "value": value, "low": low, "high": high}


def rows(near_copies, space_copies=(0.0, 0.0, 0.08), z=0.0, authenticity=(0.9, 0.85, 0.95), distance=(0.05, 0.0, 0.1)):
    """Of `find_copies`, by what is measured of samples; held-out images have an authenticity of 90%."""
    found = [
        {"what": "held-out captions", "space": EVERYWHERE, "values": [near("near copies", *near_copies)], "z": None}
    ]
    for space in ("pixels", "random"):
        values = [near("near copies", *space_copies), near("near by distance", *distance)]
        values.append(near("authenticity", *authenticity))
        found.append({"what": "held-out captions", "space": space, "values": values, "z": z})
        real = [near("authenticity", 0.9, 0.8, 0.97)]
        found.append({"what": "held-out images", "space": space, "values": real, "z": None})
    return found


NONE = (0.0, 0.0, 0.08)
CHANCE = {"z": -6.7, "authenticity": (0.05, 0.01, 0.14)}  # with 45.5% near copies in a wide interval: DreamBooth


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (rows((0.3, 0.06, 0.4)), "copies"),
        (rows((0.455, 0.0, 0.6), **CHANCE), "copies"),
        (rows((0.455, 0.0, 0.6)), "unclear"),
        (rows((0.455, 0.05, 0.6), z=-6.7), "unclear"),
        (rows((0.455, 0.0, 0.6), authenticity=(0.05, 0.01, 0.14)), "unclear"),
        (rows(NONE), "none"),
        (rows((0.04, 0.01, 0.10)), "none"),
        (rows((0.04, 0.01, 0.11)), "unclear"),
        (rows((0.0, 0.0, 0.17)), "unclear"),  # of 20 samples
        (rows(NONE, z=-3.1), "unclear"),
        (rows(NONE, z=-2.9), "none"),
        (rows(NONE, z=9.0), "none"),
        (rows(NONE, authenticity=(0.5, 0.4, 0.6)), "unclear"),
        (rows(NONE, authenticity=(0.8, 0.7, 0.9)), "none"),
        (rows(NONE, space_copies=(0.3, 0.06, 0.4)), "unclear"),
        (rows(NONE, distance=(0.3, 0.06, 0.4)), "unclear"),
        (rows(NONE, **CHANCE), "unclear"),  # blurred images lie near to all
        (rows((0.3, 0.06, 0.4))[1:], "unclear"),
    ],
)
def test_copying_is_judged_by_all_measures(given, said):
    assert copying_verdict(given) == said
    sentence = copying_sentence(given)
    assert ("cannot be told" in sentence, sentence.startswith("No more"), sentence.startswith("More samples")) == (
        said == "unclear",
        said == "none",
        said == "copies",
    )
    said_in_all = verdict(None, None, said, trained=True, asked_old=False)
    assert ("no sign of copies" in said_in_all) == (said == "none")
    assert ("cannot be told from these" in said_in_all) == (said == "unclear")


def test_the_sentence_names_what_hints():
    assert "30% (6 to 40) of held-out captions; of held-out images at most 5%" in copying_sentence(
        rows((0.3, 0.06, 0.4))
    )
    found = copying_sentence(rows(NONE, **CHANCE))
    assert "z -6.7 of held-out captions in pixels" in found
    assert "less authentic in random" in found
    assert leak_words({"leaks": 0, "held_out": 9}) is None
    assert leak_words({"leaks": 1, "held_out": 9}).startswith("1 held-out image of 9 also stand")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("better", "alike", "none"), ("better than BEFORE", "what BEFORE could do is kept", "no sign of copies")),
        (
            ("unclear", "unclear", "unclear"),
            ("Whether AFTER is better", "whether it lost", "whether samples are copies"),
        ),
        (("worse", "worse", "copies"), ("worse than BEFORE", "has lost some", "look at them below")),
        (("alike", "better", None), ("are alike on the new", "does better on what", "copying was not measured")),
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
