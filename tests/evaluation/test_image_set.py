"""Images that are read as they are needed."""

import torch

from imagen_lightning.evaluation import image_set
from imagen_lightning.evaluation.image_set import ImageSet, reduce
from imagen_lightning.images import downsample, to_float, to_uint8

IMAGES = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def counting(keep):
    read = []

    def one(number):
        read.append(number)
        return IMAGES[number]

    return ImageSet(5, 8, one, keep), read


def test_rows_and_blocks():
    images = ImageSet.of(IMAGES)
    assert (len(images), images.size) == (5, 8)
    assert torch.equal(images[:], IMAGES)
    assert torch.equal(images[1:3], IMAGES[1:3])
    assert list(images.blocks(2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_only_what_is_asked_for_is_read():
    images, read = counting(keep=False)
    images[3:5]
    images[3:4]
    assert read == [3, 4, 3]


def test_few_enough_images_are_kept(monkeypatch):
    images, read = counting(keep=True)
    assert torch.equal(images[:], images[:])
    assert read == [0, 1, 2, 3, 4]
    monkeypatch.setattr(image_set, "LARGEST_KEPT", 5 * 3 * 8 * 8 - 1)
    images, read = counting(keep=True)
    assert torch.equal(images[:], images[:])
    assert read == [0, 1, 2, 3, 4] * 2


def test_reduced_by_the_area_filter_as_in_a_batch():
    small = ImageSet.of(IMAGES).reduced(3)
    assert small.size == 3
    assert torch.equal(small[:], to_uint8(downsample(to_float(IMAGES), 3)))
    assert torch.equal(small[1:2], reduce(IMAGES[1:2], 3))
    assert ImageSet.of(IMAGES).reduced(8)[:].equal(IMAGES)
