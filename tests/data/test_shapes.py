import hashlib
import itertools
import re

import numpy as np
import pytest

from imagen_lightning.data.shapes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    HELD_OUT_PAIRS,
    NEW_HELD_OUT_PAIRS,
    NEW_SHAPES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw,
    held_out_captions,
    parse_caption,
    sample,
    shape_mask,
)
from imagen_lightning.types import InputError

THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
GRAMMAR = re.compile(rf"{THING}( (left of|above) {THING})? on a ({'|'.join(BACKGROUNDS)}) background")


def pairs(caption):
    """The (color, shape) pairs of a caption, read without the module's own parser."""
    groups = GRAMMAR.fullmatch(caption).groups()
    return [pair for pair in ((groups[1], groups[2]), (groups[6], groups[7])) if pair[0]]


def drawn(image, background):
    """(64, 64) bool: the pixels that differ from the background."""
    return (image != np.array(BACKGROUNDS[background])).any(-1)


def test_vocabulary():
    assert (len(COLORS), len(SHAPES), len(SIZES), len(BACKGROUNDS)) == (8, 5, 2, 4)
    assert {"red", "blue"} <= set(COLORS)
    assert {"circle", "star"} <= set(SHAPES)
    assert "white" in BACKGROUNDS
    assert not set(COLORS) & set(BACKGROUNDS)
    palette = [*COLORS.values(), *BACKGROUNDS.values()]
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)) > 100


def test_held_out_pairs_are_a_tenth_and_spread():
    assert len(HELD_OUT_PAIRS) == 4
    assert all(color in COLORS and shape in SHAPES for color, shape in HELD_OUT_PAIRS)
    assert len({color for color, _ in HELD_OUT_PAIRS}) == 4
    assert len({shape for _, shape in HELD_OUT_PAIRS}) >= 3


def test_the_new_shape_is_in_no_split_and_in_no_word_list_of_the_five():
    assert not set(NEW_SHAPES) & set(SHAPES)
    assert all(color in COLORS and shape in NEW_SHAPES for color, shape in NEW_HELD_OUT_PAIRS)
    for split in ("train", "val", "held_out"):
        words = {word for index in range(500) for word in sample(0, index, split)[1].split()}
        assert not words & set(NEW_SHAPES)


def test_the_new_shape_is_farther_from_the_five_than_these_from_each_other():
    masks = {shape: shape_mask(shape, 20).reshape(5, 4, 5, 4).mean((1, 3)) for shape in (*SHAPES, *NEW_SHAPES)}
    nearest = min(np.linalg.norm(masks[a] - masks[b]) for a, b in itertools.combinations(SHAPES, 2))
    assert nearest == pytest.approx(1.77, abs=0.01)
    for new in NEW_SHAPES:
        assert min(np.linalg.norm(masks[new] - masks[shape]) for shape in SHAPES) == pytest.approx(2.66, abs=0.01)


def test_training_never_shows_a_held_out_pair_and_shows_all_others():
    for split in ("train", "val"):
        seen = {pair for index in range(3000) for pair in pairs(sample(0, index, split)[1])}
        assert len(seen) == 36
        assert not seen & HELD_OUT_PAIRS


def test_held_out_captions_each_have_an_unseen_pair():
    captions = held_out_captions(300)
    assert all(set(pairs(caption)) & HELD_OUT_PAIRS for caption in captions)
    assert {pair for caption in captions for pair in pairs(caption)} >= HELD_OUT_PAIRS
    assert captions[:5] == [sample(0, index, "held_out")[1] for index in range(5)]
    assert captions[:20] == held_out_captions(20)
    assert captions[:20] != held_out_captions(20, seed=1)


def test_captions_use_every_word_evenly():
    captions = [sample(0, index, "train")[1] for index in range(3000)]
    assert 0.62 < np.mean([len(pairs(caption)) == 2 for caption in captions]) < 0.71
    groups = [GRAMMAR.fullmatch(caption).groups() for caption in captions]
    for place, words in ((0, SIZES), (1, COLORS), (2, SHAPES), (8, BACKGROUNDS)):
        found = [group[place] for group in groups]
        shares = [found.count(word) / len(found) for word in words]
        assert min(shares) > 0.7 / len(words)
    relations = [group[4] for group in groups if group[4]]
    assert 0.45 < relations.count("above") / len(relations) < 0.55


def test_a_sample_is_a_function_of_its_arguments_alone():
    digest = hashlib.sha256()
    for split in ("train", "val", "held_out"):
        for index in (0, 1, 2, 10**9):
            image, caption = sample(7, index, split)
            digest.update(image.numpy().tobytes() + caption.encode())
    assert digest.hexdigest() == "6a10981c32c4ea0e0b7a7592485613d2b9bb5a8782f50dd040b5e7cd934f0267"
    streams = [sample(0, 0, "train"), sample(0, 0, "val"), sample(1, 0, "train"), sample(0, 1, "train")]
    assert all(not a[0].equal(b[0]) for a, b in itertools.combinations(streams, 2))


def test_sample_rejects_what_it_does_not_know():
    with pytest.raises(InputError, match=r"'test'.*train, val, held_out"):
        sample(0, 0, "test")
    with pytest.raises(InputError, match="-1"):
        sample(-1, 0, "train")


def test_captions_parse_back():
    for index in range(200):
        caption = sample(3, index, "held_out")[1]
        assert parse_caption(caption).caption == caption
    assert parse_caption("a small red star above a large blue circle on a white background") == Scene(
        (Thing("small", "red", "star"), Thing("large", "blue", "circle")), "above", "white"
    )
    assert parse_caption("a large pink ring on a gray background") == Scene(
        (Thing("large", "pink", "ring"),), None, "gray"
    )
    new = parse_caption("a large pink hourglass above a small red star on a gray background")
    assert new.things[0].shape == "hourglass"
    assert new.held_out
    assert not parse_caption("a large red hourglass on a gray background").held_out


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "'a' instead of the end"),
        ("a tiny red star on a white background", r"'tiny' \(number 2\)"),
        ("a small crimson star on a white background", "'crimson'"),
        ("a small red dog on a white background", "'dog'"),
        ("a small red star below a small red star on a white background", "'below'"),
        ("a small red star left a small red star on a white background", "'left'"),
        ("a small red star on a red background", "'red' .number 7"),
        ("a small red star on a white", "'background' instead of the end"),
        ("a small red star on a white background please", "'please'"),
    ],
)
def test_parse_names_the_word_that_does_not_fit(caption, message):
    with pytest.raises(InputError, match=message):
        parse_caption(caption)


@pytest.mark.parametrize("shape", [*SHAPES, *NEW_SHAPES])
def test_sizes_measured_in_pixels(shape):
    rng = np.random.default_rng(0)
    sides = {}
    for size in SIZES:
        for _ in range(20):
            image = draw(Scene((Thing(size, "red", shape),), None, "white"), rng)
            rows, columns = np.nonzero(drawn(image, "white"))
            sides.setdefault(size, set()).update({np.ptp(rows) + 1, np.ptp(columns) + 1})
    assert sides == {size: {side} for size, side in SIZES.items()}  # hence never cut by the border
    assert min(sides["small"]) >= 20
    assert min(sides["large"]) - max(sides["small"]) >= 6


def test_two_objects_stand_apart_in_the_named_order():
    starts = set()
    for index in range(400):
        image, caption = sample(0, index, "train")
        scene = parse_caption(caption)
        if len(scene.things) == 1 or scene.things[0].color == scene.things[1].color:
            continue
        image = image.numpy().transpose(1, 2, 0)
        occupied = drawn(image, scene.background).any(0 if scene.relation == "left of" else 1)
        edges = np.flatnonzero(np.diff(np.r_[False, occupied, False].astype(int)))
        assert len(edges) == 4, caption
        assert edges[2] - edges[1] >= 3
        assert edges[0] >= 1  # clear of the canvas's edge
        assert edges[3] <= CANVAS - 1
        places = []
        for thing, start, stop in zip(scene.things, edges[::2], edges[1::2]):
            assert stop - start == SIZES[thing.size]
            exact = (image == np.array(COLORS[thing.color])).all(-1)
            along = np.flatnonzero(exact.any(0 if scene.relation == "left of" else 1))
            assert start <= along.min() <= along.max() < stop
            places.append(np.argwhere(exact).mean(0))
        down, right = places[1] - places[0]
        assert (right > 1.5 * abs(down)) if scene.relation == "left of" else (down > 1.5 * abs(right))
        starts.add(
            tuple(drawn(image, scene.background).any(1 if scene.relation == "left of" else 0).nonzero()[0][[0, -1]])
        )
    assert len(starts) >= 8  # places across the axis vary


def test_drawings_have_the_captions_colors_and_soft_edges():
    for index in range(100):
        image, caption = sample(1, index, "train")
        scene = parse_caption(caption)
        image = image.numpy().transpose(1, 2, 0)
        expected = {COLORS[thing.color] for thing in scene.things} | {BACKGROUNDS[scene.background]}
        exact = {color for color in (*COLORS.values(), *BACKGROUNDS.values()) if (image == color).all(-1).sum() > 20}
        assert exact == expected
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > len(expected)
