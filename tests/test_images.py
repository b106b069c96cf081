import pytest
import torch
from PIL import Image

from imagen_lightning.images import (
    are_finite,
    downsample,
    from_pil,
    grid,
    placeholder,
    save_png,
    to_float,
    to_pil,
    to_uint8,
    upsample,
)
from imagen_lightning.types import InputError


def test_every_byte_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_float(values)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), values)
    assert torch.equal(to_uint8(images + 0.49 / 127.5), values)  # to the nearest
    assert torch.equal(to_uint8(images.bfloat16()), values)


def test_values_beyond_the_range_are_clamped():
    assert to_uint8(torch.tensor([-3.0, 1.7, 0.0])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_image(value):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2, 3, 3] = value
    assert are_finite(images).tolist() == [True, False]
    with pytest.raises(InputError, match="NaN or infinite values"):
        to_uint8(images)


def test_a_placeholder_is_a_checkerboard():
    assert placeholder(8, 12).shape == (3, 8, 12)
    assert placeholder(8, 8)[:, ::2, ::2].flatten(1).unique(dim=1).tolist() == [[0, 255], [0, 0], [0, 255]]


@pytest.mark.parametrize("factor", [2, 4])
def test_downsampling_is_the_mean_of_each_square(factor):
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = images.view(2, 3, 8 // factor, factor, 8 // factor, factor).mean((3, 5))
    assert torch.allclose(downsample(images, 8 // factor), expected)


def test_downsampling_keeps_means_and_constants():
    assert torch.allclose(downsample(torch.full((1, 3, 9, 9), 0.3), 5), torch.tensor(0.3))
    images = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    assert torch.allclose(downsample(images, 4).mean(), images.mean())
    assert torch.equal(downsample(images, 12), images)
    with pytest.raises(ValueError, match="use upsample"):
        downsample(images, 13)


def test_upsampling_is_bilinear_with_half_pixel_centres():
    ramp = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
    # output centres lie at (i + 1/2) / 2 - 1/2 of the input, held at its edges
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    assert torch.allclose(upsample(ramp, 8)[0, 0], expected.expand(8, 8))
    assert torch.allclose(upsample(ramp.mT, 8)[0, 0], expected[:, None].expand(8, 8))
    assert torch.equal(upsample(ramp, 4), ramp)


def picture(height=5, width=7):
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_pil_and_back():
    image = picture()
    pil = to_pil(image)
    assert pil.size == (7, 5)
    assert pil.getpixel((6, 2)) == tuple(image[:, 2, 6].tolist())
    assert torch.equal(from_pil(pil), image)
    assert torch.equal(from_pil(pil.convert("L"))[0], from_pil(pil.convert("L"))[2])


def test_rows_without_captions_take_no_room_for_them():
    white = torch.full((3, 96, 96), 255, dtype=torch.uint8)
    plain, one = grid([[white]] * 3), grid([[white]] * 3, ["", "", "a red star"])
    line = grid([[white]], ["a red star"]).height - grid([[white]]).height
    assert one.height == plain.height + line
    assert from_pil(one)[:, plain.height :].min() < 128


def test_a_grid_shows_each_image_in_its_cell():
    images = [picture(8, 8).roll(i, dims=-1) for i in range(5)]
    canvas = from_pil(grid([images[:3], images[3:]], gap=2))
    assert canvas.shape == (3, 2 * 10 + 2, 3 * 10 + 2)
    for number, image in enumerate(images):
        y, x = 2 + 10 * (number // 3), 2 + 10 * (number % 3)
        assert torch.equal(canvas[:, y : y + 8, x : x + 8], image)
    assert (canvas[:, :, :2] == 255).all()
    assert (canvas[:, 12:, 22:] == 255).all()  # the last row is shorter


def test_smaller_images_are_enlarged_by_nearest():
    image = picture(4, 4)
    canvas = from_pil(grid([[picture(8, 8), image]], gap=0))
    assert torch.equal(canvas[:, :, 8:], image.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_captions_stand_under_their_images():
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    plain = grid([[white, white]])
    one = grid([[white, white]], ["a red star", ""])
    assert one.width == plain.width
    assert one.height > plain.height
    ink = from_pil(one).float().mean(0) < 128
    assert ink[68:, :68].any()
    assert not ink[:68].any()
    assert not ink[:, 72:].any()
    # a long caption wraps to the cell, and ends after four lines
    long = grid([[white]], ["word " * 100])
    assert long.width == grid([[white]]).width
    assert long.height == grid([[white]], ["word " * 1000]).height


def test_a_png_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(to_pil(picture()), path)
    assert torch.equal(from_pil(Image.open(path)), picture())
    assert [item.name for item in path.parent.iterdir()] == ["a.png"]
