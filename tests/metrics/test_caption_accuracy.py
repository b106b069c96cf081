import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from imagen_lightning.data import subjects
from imagen_lightning.data.shapes import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, parse_caption, sample, shape_mask
from imagen_lightning.data.subjects import Subject
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.types import InputError

ATTRIBUTES = ("background", "number", "color", "shape", "size", "relation")


def drawings(num, split, noise=8.0, blur=0.7, draw=sample):
    rng = np.random.default_rng(0)
    images, captions = [], []
    for index in range(num):
        image, caption = draw(11, index, split)
        pixels = ndimage.gaussian_filter(image.numpy().astype(float), (0, blur, blur), mode="nearest")
        pixels += noise * rng.standard_normal(pixels.shape)
        images.append(torch.from_numpy(pixels.clip(0, 255).round().astype(np.uint8)))
        captions.append(caption)
    return torch.stack(images), captions


def painting(background, *things):
    """An image with each (color, shape, side, left, top) painted at its place, in order."""
    image = np.empty((64, 64, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    for color, shape, side, left, top in things:
        mask = shape_mask(shape, side)[..., None]
        box = image[top : top + side, left : left + side]
        box[:] = mask * np.array(COLORS[color], np.float32) + (1 - mask) * box
    return torch.from_numpy(image.round().astype(np.uint8).transpose(2, 0, 1).copy())[None]


def right(image, caption):
    """The attributes of one picture that are right."""
    result = caption_accuracy(image, [caption])
    return {name for name in (*ATTRIBUTES, "all") if getattr(result, name).item()}


@pytest.fixture(scope="module")
def noisy():
    images, captions = zip(*(drawings(250, split) for split in ("train", "held_out")))
    return torch.cat(images), [*captions[0], *captions[1]]


def test_true_drawings_with_noise_and_blur_are_right(noisy):
    result = caption_accuracy(*noisy)
    assert len(result) == 500
    assert result.mean()["all"] >= 0.99


def test_stronger_blur_and_noise_are_still_read():
    assert caption_accuracy(*drawings(200, "train", noise=16, blur=1.2)).mean()["all"] >= 0.95


def test_shuffled_captions_are_near_chance(noisy):
    images, captions = noisy
    rates = caption_accuracy(images, captions[1:] + captions[:1]).mean()
    # By chance: backgrounds 1/4, numbers (1/3)^2 + (2/3)^2; the relation also needs a picture of two objects.
    assert 0.18 < rates["background"] < 0.32
    assert 0.48 < rates["number"] < 0.63
    assert rates["color"] < 0.25
    assert rates["shape"] < 0.3
    assert rates["size"] < 0.5
    assert rates["relation"] < 0.5
    assert rates["all"] < 0.02


def other(words, word):
    words = list(words)
    return words[(words.index(word) + 1) % len(words)]


def change_thing(attribute, words):
    def change(scene, number):
        things = list(scene.things)
        number %= len(things)
        word = other(words, getattr(things[number], attribute))
        things[number] = replace(things[number], **{attribute: word})
        return replace(scene, things=tuple(things))

    return change


CHANGES = {
    "background": lambda scene, number: replace(scene, background=other(BACKGROUNDS, scene.background)),
    "number": lambda scene, number: replace(scene, things=(scene.things[number % 2],), relation=None),
    "color": change_thing("color", COLORS),
    "shape": change_thing("shape", SHAPES),
    "size": change_thing("size", ("small", "large")),
    "relation axis": lambda scene, number: replace(scene, relation=other(("left of", "above"), scene.relation)),
    "relation order": lambda scene, number: replace(scene, things=scene.things[::-1]),
}


@pytest.fixture(scope="module")
def noisy_hourglasses():
    subject = Subject.of("hourglass")
    images, captions = zip(
        *(drawings(150, split, draw=partial(subjects.sample, subject=subject)) for split in ("val", "held_out"))
    )
    return torch.cat(images), [*captions[0], *captions[1]]


def test_true_drawings_of_the_new_shape_are_right(noisy_hourglasses):
    images, captions = noisy_hourglasses
    assert caption_accuracy(images, captions).mean()["all"] >= 0.99
    clean = [subjects.sample(3, index, "train", Subject.of("hourglass")) for index in range(100)]
    assert caption_accuracy(torch.stack([image for image, _ in clean]), [text for _, text in clean]).all.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_new_shape_is_taken_for_no_other_and_no_other_for_it(noisy, noisy_hourglasses, shape):
    images, captions = noisy_hourglasses
    said = caption_accuracy(images, [caption.replace("hourglass", shape) for caption in captions])
    assert said.mean()["shape"] == 0
    of_shape = [i for i, caption in enumerate(noisy[1]) if caption.split()[3] == shape]
    assert len(of_shape) > 50
    lied = [re.sub(rf"^(a \S+ \S+) {shape}", r"\1 hourglass", noisy[1][i]) for i in of_shape]
    assert caption_accuracy(noisy[0][of_shape], lied).mean()["shape"] == 0


def test_the_new_shape_changes_nothing_for_captions_of_the_five(noisy, noisy_hourglasses):
    """The judgement of each picture, broken ones included, is the same whatever else is judged with it."""
    images = torch.cat([noisy[0][:100], torch.from_numpy(ndimage.minimum_filter(noisy[0][:100].numpy(), (1, 1, 7, 7)))])
    captions = noisy[1][:100] * 2
    alone = caption_accuracy(images, captions)
    assert 0.4 < alone.mean()["shape"] < 0.9
    mixed = caption_accuracy(torch.cat([noisy_hourglasses[0][:50], images]), [*noisy_hourglasses[1][:50], *captions])
    for name in (*ATTRIBUTES, "has_relation"):
        assert getattr(mixed, name)[50:].equal(getattr(alone, name)), name


@pytest.mark.parametrize("change", CHANGES)
def test_one_wrong_attribute_makes_that_one_false_and_no_other(noisy, change):
    attribute = change.split()[0]
    needs_two = attribute in ("number", "relation")
    chosen = []
    for i, caption in enumerate(noisy[1]):
        scene = parse_caption(caption)
        changed = CHANGES[change](scene, i) if len(scene.things) == 2 or not needs_two else scene
        if changed != scene:
            chosen.append((i, changed.caption))
    assert len(chosen) > 150
    result = caption_accuracy(noisy[0][[i for i, _ in chosen]], [caption for _, caption in chosen])
    rates = result.mean()
    assert rates.pop(attribute) == 0
    assert rates.pop("all") == 0
    assert all(rate >= 0.99 for rate in rates.values()), rates


def test_a_picture_not_drawn_by_this_package_is_read():
    picture = Image.new("RGB", (256, 256), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((20, 70, 20 + 116, 70 + 116), fill=(0, 50, 255))
    pen.rectangle((160 + 30, 90, 160 + 58, 90 + 88), fill=(220, 0, 0))
    pen.rectangle((160, 90 + 30, 160 + 88, 90 + 58), fill=(220, 0, 0))
    image = torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())[None]
    caption = "a large blue circle left of a small red plus on a white background"
    assert right(image, caption) == {*ATTRIBUTES, "all"}


@pytest.mark.parametrize("colors", [("red", "red"), ("red", "orange"), ("green", "purple")])
def test_touching_objects_are_two(colors):
    image = painting("gray", (colors[0], "circle", 29, 3, 15), (colors[1], "circle", 22, 31, 18))
    caption = f"a large {colors[0]} circle left of a small {colors[1]} circle on a gray background"
    assert right(image, caption) == {*ATTRIBUTES, "all"}


def test_same_colors_are_told_apart_by_their_shapes():
    image = painting("white", ("red", "ring", 22, 20, 3), ("red", "star", 22, 20, 35))
    assert "all" in right(image, "a small red ring above a small red star on a white background")
    assert right(image, "a small red star above a small red ring on a white background") == {
        "background", "number", "color", "shape", "size",
    }  # fmt: skip


def test_a_missing_object_has_no_attributes():
    image = painting("black", ("cyan", "cross", 22, 10, 10))
    caption = "a small cyan cross left of a small cyan cross on a black background"
    assert right(image, caption) == {"background"}
    assert right(painting("black"), "a small cyan cross on a black background") == {"background"}


def test_a_third_object_is_only_a_wrong_number():
    image = painting("white", ("red", "star", 22, 3, 3), ("blue", "plus", 22, 35, 3), ("green", "ring", 22, 20, 38))
    caption = "a small red star left of a small blue plus on a white background"
    assert right(image, caption) == {*ATTRIBUTES} - {"number"}


def test_a_shapeless_patch_has_neither_shape_nor_size():
    image = painting("white")
    image[..., 30:34, 10:40] = torch.tensor(COLORS["red"], dtype=torch.uint8)[:, None, None]
    for shape in SHAPES:
        for size in ("small", "large"):
            scene = Scene((Thing(size, "red", shape),), None, "white")
            assert right(image, scene.caption) == {"background", "number", "color"}


def test_a_shape_of_a_size_between_or_beyond_is_judged_by_the_nearest_or_none():
    caption = "a {} blue circle on a white background"
    for side, size in ((20, "small"), (24, "small"), (27, "large"), (31, "large")):
        image = painting("white", ("blue", "circle", side, 15, 15))
        assert "all" in right(image, caption.format(size))
    tiny = painting("white", ("blue", "circle", 16, 15, 15))
    assert "size" not in right(tiny, caption.format("small"))


def test_pure_noise_is_never_right():
    images = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = [sample(0, index, "train")[1] for index in range(50)]
    assert caption_accuracy(images, captions).mean()["all"] == 0


def test_mean_counts_the_relation_only_where_there_is_one():
    images = torch.cat([painting("white", ("red", "star", 22, 3, 3))] * 3)
    one = "a small red star on a white background"
    two = "a small red star left of a small red star on a white background"
    result = caption_accuracy(images, [one, one, two])
    rates = result.mean()
    assert rates["relation"] == 0
    assert rates["all"] == pytest.approx(2 / 3)
    assert rates["background"] == 1
    only_one = result.mean(torch.tensor([True, True, False]))
    assert "relation" not in only_one
    assert only_one["all"] == 1


def test_bad_input_is_named():
    caption = "a small red star on a white background"
    with pytest.raises(InputError, match="float32"):
        caption_accuracy(torch.zeros(1, 3, 64, 64), [caption])
    with pytest.raises(InputError, match="1 images but 2 captions"):
        caption_accuracy(painting("white"), [caption] * 2)
    with pytest.raises(InputError, match="'dog'"):
        caption_accuracy(painting("white"), ["a small red dog on a white background"])
