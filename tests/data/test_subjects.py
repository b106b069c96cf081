import hashlib
import itertools
from collections import Counter

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import numpy as np
import pytest
import torch

from imagen_lightning.data import SubjectShapesDataModule
from imagen_lightning.data.shapes import COLORS, HELD_OUT_PAIRS, NEW_HELD_OUT_PAIRS, draw, parse_caption
from imagen_lightning.data.subjects import Subject, sample, subject_captions
from imagen_lightning.types import InputError

HOURGLASS = Subject.of("hourglass")


def things(captions):
    return [thing for caption in captions for thing in parse_caption(caption).things]


def test_a_subject_is_read_from_words_in_order():
    assert Subject.of("hourglass") == Subject(None, None, "hourglass")
    assert Subject.of("large purple star", "<zib>") == Subject("large", "purple", "star", "<zib>")
    assert Subject.of("small red") == Subject("small", "red", None)
    assert str(Subject.of("purple star")) == "purple star"


@pytest.mark.parametrize(
    ("text", "word", "message"),
    [
        ("", None, "empty"),
        ("star purple", None, "'purple'"),
        ("large crimson star", None, "'crimson'"),
        ("star", "<z ib>", "one word"),
        ("star", "red", "'red' cannot stand"),
        ("star", "above", "'above' cannot stand"),
        ("large star", "<zib>", "the color lies between"),
    ],
)
def test_other_subjects_and_words_are_refused(text, word, message):
    with pytest.raises(InputError, match=message):
        Subject.of(text, word)


def test_every_scene_holds_the_subject_and_others_of_the_five_shapes():
    captions = subject_captions(HOURGLASS, 600, "train")
    scenes = [parse_caption(caption) for caption in captions]
    assert all(any(thing.shape == "hourglass" for thing in scene.things) for scene in scenes)
    assert 0.6 < np.mean([len(scene.things) == 2 for scene in scenes]) < 0.73
    first = [scene.things[0].shape == "hourglass" for scene in scenes if len(scene.things) == 2]
    assert 0.4 < np.mean(first) < 0.6
    found = Counter(thing.color for thing in things(captions) if thing.shape == "hourglass")
    assert len(found) == len(COLORS) - len(NEW_HELD_OUT_PAIRS)
    assert {(thing.color, thing.shape) for thing in things(captions)}.isdisjoint(HELD_OUT_PAIRS | NEW_HELD_OUT_PAIRS)


def test_held_out_scenes_hold_a_pair_that_training_never_shows():
    unseen = subject_captions(HOURGLASS, 200, "held_out")
    for caption in unseen:
        assert {(thing.color, thing.shape) for thing in parse_caption(caption).things} & NEW_HELD_OUT_PAIRS
    # A subject whose pairs all occur in training has its own.
    assert all(
        "large purple star" in caption for caption in subject_captions(Subject.of("large purple star"), 50, "held_out")
    )
    with pytest.raises(InputError, match="'green star' is held out"):
        sample(0, 0, "train", Subject.of("green star"))


def test_a_sample_is_a_function_of_its_arguments_alone():
    digest = hashlib.sha256()
    for split in ("train", "val", "held_out"):
        for index in (0, 1, 10**9):
            image, caption = sample(7, index, split, HOURGLASS)
            digest.update(image.numpy().tobytes() + caption.encode())
    assert digest.hexdigest() == "29b97e893f80b879fee6addd1c9ce32e569868b4dea75b63de259473e817fde2"
    texts = [subject_captions(HOURGLASS, 30, split) for split in ("train", "val", "held_out")]
    assert all(a[i] != b[i] for a, b in itertools.combinations(texts, 2) for i in range(30))
    assert texts[0] != subject_captions(HOURGLASS, 30, "train", seed=1)
    with pytest.raises(InputError, match="'test'"):
        sample(0, 0, "test", HOURGLASS)
    with pytest.raises(InputError, match="-1"):
        sample(0, -1, "train", HOURGLASS)


def test_a_word_stands_for_the_subject_and_nothing_else_changes():
    plain, worded = Subject.of("large purple star"), Subject.of("large purple star", "<zib>")
    for index in range(100):
        image, caption = sample(0, index, "train", worded)
        same, said = sample(0, index, "train", plain)
        assert image.equal(same)
        assert "<zib>" in caption
        assert "large purple star" not in caption
        assert worded.spell_out(caption) == said
        assert parse_caption(said).caption == said


def test_the_drawing_is_that_of_its_caption():
    for index in range(20):
        image, caption = sample(0, index, "train", HOURGLASS)
        scene = parse_caption(caption)
        drawn = {draw(scene, np.random.default_rng(seed)).tobytes() for seed in range(300)}
        assert image.numpy().transpose(1, 2, 0).tobytes() in drawn


def test_the_same_few_drawings_come_once_an_epoch_each_in_another_order():
    data = SubjectShapesDataModule(num_images=50, image_size=16, batch_size=20, num_val=30)
    batches = [batch for _, batch in zip(range(10), data.train_dataloader())]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(200))
    keys = [key for batch in batches for key in batch.keys]
    epochs = [keys[start : start + 50] for start in range(0, 200, 50)]
    assert all(len(set(epoch)) == 50 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    by_key = {}
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16)
        for key, image, caption in zip(batch.keys, batch.images, batch.captions):
            first = by_key.setdefault(key, (image, caption))
            assert first[0].equal(image)
            assert first[1] == caption
    seen = {caption for batch in batches for caption in batch.captions}
    held_out = data.validation_set()
    assert set(data.captions()) == seen | {held_out[number].caption for number in range(len(held_out))}
    validation = [key for batch in data.val_dataloader() for key in batch.keys]
    assert validation == [f"hourglass-val-{number:06d}" for number in range(30)]


def test_the_position_is_resumed_and_another_subject_refused():
    settings = {"num_images": 7, "image_size": 8, "batch_size": 4, "num_val": 4}
    data = SubjectShapesDataModule(**settings)
    whole = [key for _, batch in zip(range(8), data.train_dataloader()) for key in batch.keys]
    resumed = SubjectShapesDataModule(**settings)
    resumed.load_state_dict({**data.state_dict(), "position": 12})
    rest = [key for _, batch in zip(range(5), resumed.train_dataloader()) for key in batch.keys]
    assert rest == whole[12:]
    for other in ({"subject": "star"}, {"num_images": 8}, {"word": "zib"}):
        with pytest.raises(InputError, match=next(iter(other)).replace("num_images", "samples")):
            SubjectShapesDataModule(**{**settings, **other}).load_state_dict(data.state_dict())


def test_settings_out_of_range_are_named():
    with pytest.raises(InputError, match="num_images 0"):
        SubjectShapesDataModule(num_images=0)
    with pytest.raises(InputError, match="image_size 65"):
        SubjectShapesDataModule(image_size=65)
