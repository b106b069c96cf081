"""What a filter keeps, what it counts, and what it refuses."""

import copy

import numpy as np
import pytest

from imagen_lightning.data.filters import Filter, FilterCounts
from imagen_lightning.errors import InputError

SAMPLES = {
    "width": np.array([300.0, 200, 600, np.nan, 300, 300]),
    "height": np.array([256.0, 300, 256, 300, 300, 300]),
    "punsafe": np.array([0.1, 0.0, 0.0, 0.0, np.nan, 0.2]),
    "language": np.array(["en", "en", "en", "en", "en", ""]),
}


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ({"min_side": 256}, [0, 2, 4, 5]),
        ({"min_side": 257}, [4, 5]),
        ({"max_aspect": 2}, [0, 1, 4, 5]),
        ({"max_aspect": 600 / 256}, [0, 1, 2, 4, 5]),
        ({"punsafe_max": 0.1}, [0, 1, 2, 3]),
        ({"punsafe_min": 0.1}, [0, 5]),
        ({"width_max": 300}, [0, 1, 4, 5]),
        ({"language": "EN"}, [0, 1, 2, 3, 4]),
        ({"language": ["fr", "de"]}, []),
        ({"licence": "cc0"}, []),
        ({}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_condition_keeps_what_meets_it(condition, kept):
    mask, counts = Filter(condition).select(SAMPLES, 6)
    assert np.flatnonzero(mask).tolist() == kept
    assert counts.left == len(kept)


def test_each_removed_sample_is_counted_once_in_the_conditions_order():
    mask, counts = Filter({"min_side": 256, "max_aspect": 2, "punsafe_max": 0.1, "language": "en"}).select(SAMPLES, 6)
    assert np.flatnonzero(mask).tolist() == [0]
    assert counts.removed == {
        "width or height missing": 1,
        "min_side=256": 1,
        "max_aspect=2": 1,
        "punsafe missing": 1,
        "punsafe_max=0.1": 1,
        "language missing": 0,
        "language=en": 0,
    }
    assert str(counts) == (
        "1 of 6 samples left; removed: 1 width or height missing, 1 min_side=256, 1 max_aspect=2, 1 punsafe missing, "
        "1 punsafe_max=0.1"
    )
    total = FilterCounts()
    total.add(counts)
    total.add(counts)
    assert (total.num_samples, total.left, total.removed["min_side=256"]) == (12, 2, 2)


def test_why_not_names_the_first_condition_that_fails():
    filter_ = Filter.parse("min_side=256,punsafe_max=0.1,language=en,de")
    good = {"WIDTH": 256, "HEIGHT": 512, "NSFW": "UNLIKELY", "LANGUAGE": "de"}
    assert filter_.why_not(good) is None
    assert filter_.why_not({**good, "HEIGHT": 255, "LANGUAGE": "fr"}) == "min_side=256"
    assert filter_.why_not({**good, "HEIGHT": None}) == "width or height missing"
    assert filter_.why_not({**good, "NSFW": "UNSURE"}) == "punsafe_max=0.1"
    assert filter_.why_not({**good, "NSFW": "UNTAGGED"}) == "punsafe missing"
    assert filter_.why_not({**good, "LANGUAGE": "fr"}) == "language=en,de"
    assert filter_.why_not({}) == "width or height missing"


def test_original_size_is_told_from_the_stored_one():
    enlarged = {"width": 512, "height": 512, "original_width": 200, "original_height": 300}
    assert Filter({"min_side": 256}).why_not(enlarged) is None
    assert Filter({"min_original_side": 256}).why_not(enlarged) == "min_original_side=256"


def test_text_and_mapping_say_the_same():
    text = "min_side=256,max_aspect=2,pwatermark_max=0.5,aesthetic_min=5,similarity_min=0.28,language=en,de,license=cc0"
    mapping = {
        "min_side": 256,
        "max_aspect": 2,
        "pwatermark_max": 0.5,
        "aesthetic_min": 5,
        "similarity_min": 0.28,
        "language": ["en", "de"],
        "license": "cc0",
    }
    assert Filter.parse(text).conditions == Filter(mapping).conditions
    assert str(Filter.parse(f" {text.replace(',', ' , ')} ")) == text
    assert copy.deepcopy(Filter(mapping)).conditions == Filter(mapping).conditions


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"punsave_max": 0.1}, "'punsave_max' is unknown; give some of min_side.*punsafe_min/_max.*language"),
        ({"punsafe": 0.1}, "'punsafe' is unknown"),
        ({"language_max": 1}, "'language_max' is unknown"),
        ({3: 1}, "3 is unknown"),
        ({"min_side": "256"}, "min_side: '256' is no number"),
        ({"min_side": True}, "min_side: True is no number"),
        ({"min_side": -1}, "min_side: -1 is out of range; give a number of at least 0"),
        ({"max_aspect": 0.5}, "max_aspect: 0.5 is out of range; give a number of at least 1"),
        ({"punsafe_max": 10}, "punsafe_max: 10 is out of range; give a number from 0 to 1"),
        ({"similarity_min": 28}, "from -1 to 1"),
        ({"aesthetic_min": float("nan")}, "nan is no number"),
        ({"language": False}, "language: False is no word or list of words; quote the word"),
        ({"language": ["en", 3]}, "is no word"),
        ({"language": []}, "is no word"),
        ({"licence": ""}, "is no word"),
    ],
)
def test_wrong_conditions_are_refused(conditions, message):
    with pytest.raises(InputError, match=message):
        Filter(conditions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no '='; write for example"),
        ("en", "'en' has no '='"),
        ("min_side", "'min_side' has no '='"),
        ("min_side=256,512", "min_side takes one number, not '256,512'"),
        ("min_side=large", "min_side takes a number, not 'large'"),
        ("punsafe_max=0.1,punsafe_max=0.2", "names 'punsafe_max' twice"),
        ("language=", "is no word"),
        ("nsfw_max=1", "'nsfw_max' is unknown"),
    ],
)
def test_wrong_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Filter.parse(text)
