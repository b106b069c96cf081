"""Every kind of picture to right RGB; captions; text states; and that damage is always `Unusable`."""

import functools
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from given_data import given
from PIL import Image, ImageFilter

from imagen_lightning.data import decode
from imagen_lightning.data.decode import (
    decode_captions,
    decode_fitted,
    decode_image,
    decode_text_states,
    fit,
    stack_text,
)
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.images import downsample


def encode(image, format_="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def colours():
    """A 24 x 16 picture: left half red, right half blue, top-left corner white."""
    image = Image.new("RGB", (24, 16), (250, 0, 0))
    image.paste((0, 0, 250), (12, 0, 24, 16))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    return image


def assert_colours(image, tolerance=0):
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(colours(), dtype=int))
    assert difference.max() <= tolerance


def png_chunks(width, height, depth, colour_type, rows):
    """A PNG by its specification, for the kinds that Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encode(colours()), 0),
        (encode(colours(), "WEBP", lossless=True), 0),
        (encode(colours().quantize(3)), 0),
        (encode(colours().convert("CMYK"), "JPEG", quality=100, subsampling=0), 12),
        (encode(colours(), "JPEG", quality=100, subsampling=0), 12),
        (encode(colours(), "JPEG", quality=100, subsampling=0, progressive=True), 12),
        (encode(colours(), "PNG", save_all=True, append_images=[Image.new("RGB", (24, 16))]), 0),
        (encode(colours(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (24, 16))]), 0),
    ],
    ids=["png", "webp", "palette", "cmyk", "jpeg", "progressive", "animated png", "animated webp"],
)
def test_kinds_of_pictures(data, tolerance):
    assert_colours(decode_image(data), tolerance)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, format_):
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # undone by PIL's transposition of that number
    stored = colours()
    for turn in turns.get(orientation, []):
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format_]
    assert_colours(decode_image(encode(stored, format_, exif=exif, **options)), 12 if format_ == "JPEG" else 0)


def test_sixteen_bits():
    values = np.array([[0, 257, 32896, 65535], [65535, 300, 128, 129]], dtype=np.uint16)
    grey = decode_image(png_chunks(4, 2, 16, 0, [row.astype(">u2").tobytes() for row in values]))
    assert np.asarray(grey).tolist() == [[[v] * 3 for v in row] for row in [[0, 1, 128, 255], [255, 1, 0, 1]]]
    rgb = np.array([[[0, 32896, 65535]]], dtype=np.uint16)
    assert decode_image(png_chunks(1, 1, 16, 2, [rgb.astype(">u2").tobytes()])).getpixel((0, 0)) == (0, 128, 255)
    rgba = np.array([[[65535, 0, 0, 0], [65535, 0, 0, 65535]]], dtype=np.uint16)
    image = decode_image(png_chunks(2, 1, 16, 6, [rgba.astype(">u2").tobytes()]))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]


def test_grey_and_one_bit():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decode_image(encode(grey))), np.repeat(np.asarray(grey)[..., None], 3, 2))
    bits = Image.fromarray(np.arange(256).reshape(16, 16) % 3 == 0)
    assert np.array_equal(np.asarray(decode_image(encode(bits)))[..., 0], 255 * np.asarray(bits))


def test_transparency_stands_on_white():
    rgba = Image.new("RGBA", (4, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 51)]):
        rgba.putpixel((x, 0), pixel)
    expected = [(255, 0, 0), (255, 255, 255), (255, 255, 255), (204, 204, 204)]
    for data in (encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)):
        assert [decode_image(data).getpixel((x, 0)) for x in range(4)] == expected
    grey = Image.new("LA", (2, 1), (0, 0))
    assert decode_image(encode(grey)).getpixel((0, 0)) == (255, 255, 255)
    palette = colours().quantize(3)
    clear = palette.getpixel((20, 8))  # the index of blue
    assert decode_image(encode(palette, transparency=clear)).getpixel((20, 8)) == (255, 255, 255)
    assert decode_image(encode(palette, transparency=clear)).getpixel((8, 8)) == (250, 0, 0)
    keyed = encode(colours(), transparency=(0, 0, 250))
    assert decode_image(keyed).getpixel((20, 8)) == (255, 255, 255)


def reason_of(function, *arguments):
    with pytest.raises(Unusable) as caught:
        function(*arguments)
    return caught.value.reason


def test_what_is_no_image():
    for data in (b"", b"<html>", b"\x89PNG\r\n\x1a\n", encode(colours(), "GIF"), encode(colours(), "PDF")):
        assert reason_of(decode_image, data) == Reason.UNDECODABLE
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert reason_of(decode_image, encode(noise, "JPEG")[:900]) == Reason.TRUNCATED_IMAGE
    assert reason_of(decode_image, encode(noise)[:5000]) == Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("size", [(8193, 8193), (20000, 20000), (60000, 60000)])
def test_bombs_are_refused_before_decoding(monkeypatch, size):
    from PIL import PngImagePlugin

    def load(self):
        raise AssertionError("decoded")

    bomb = png_chunks(*size, 8, 2, [])
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert reason_of(decode_image, bomb) == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_damage_never_crashes(format_):
    generator = np.random.default_rng(1)
    noise = Image.fromarray(generator.integers(0, 255, (20, 20, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise if format_ != "JPEG" else noise.convert("RGB")
    whole = encode(image, format_, exif=exif)
    unusable = 0
    for trial in range(300):
        data = bytearray(whole)
        if trial % 3:
            for _ in range(trial % 5 + 1):
                data[int(generator.integers(min(len(data), 400)))] = int(generator.integers(256))
        else:
            del data[int(generator.integers(len(data))) :]
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except Unusable:
            unusable += 1
    assert unusable > 90


def test_fit_matches_the_one_area_filter():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for place, left in ((0.0, 0), (0.5, 8), (1.0, 16)):
        fitted = fit(Image.fromarray(pixels), 16, place)
        expected = downsample(tensor[..., left : left + 48], 16)[0]
        assert fitted.shape == (3, 16, 16)
        assert fitted.dtype == torch.uint8
        assert (fitted.float() - expected).abs().max() <= 1  # Pillow rounds twice
    tall = fit(Image.fromarray(pixels.transpose(1, 0, 2)), 48, 1.0)
    assert torch.equal(tall, torch.from_numpy(pixels.transpose(1, 0, 2)[16:]).permute(2, 0, 1))


def test_fit_keeps_small_images_small():
    assert reason_of(fit, colours(), 17) == Reason.TOO_SMALL
    assert fit(colours(), 16).shape == (3, 16, 16)
    large = fit(colours(), 32, 1.0, True)
    assert large.shape == (3, 32, 32)
    assert large[:, 16, 28].tolist() == [0, 0, 250]


def test_fit_covers_other_than_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    wide = fit(Image.fromarray(pixels), (12, 24))  # 3.75 to 1: 90 x 45 pixels, 7.5 at the top cut off
    assert wide.shape == (3, 12, 24)
    exact = fit(Image.fromarray(pixels), (60, 30))
    assert torch.equal(exact, tensor[:, :, 30:60])
    assert torch.equal(fit(Image.fromarray(pixels), (60, 90)), tensor)
    whole = fit(Image.fromarray(pixels), (20, 30))
    assert (whole.float() - tensor.float().unfold(1, 3, 3).unfold(2, 3, 3).mean((3, 4))).abs().max() <= 1
    assert reason_of(fit, Image.fromarray(pixels), (61, 30)) == Reason.TOO_SMALL
    assert fit(Image.fromarray(pixels), (61, 122), 0.5, True).shape == (3, 61, 122)


@functools.cache
def waves(width, height, seed=0):
    """A smooth picture of all frequencies up to 1/16 of a pixel, different in every direction."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        waves = [
            np.sin((x * fx + y * fy) / 40 + phase)
            for fx, fy, phase in zip(*(generator.uniform(-8, 8, (2, 12)) / 3), generator.uniform(0, 6, 12))
        ]
        channels.append(sum(waves))
    picture = np.stack(channels, -1)
    return Image.fromarray(np.round(127.5 + 127.5 * picture / np.abs(picture).max()).astype(np.uint8))


def error(data, *arguments):
    """Mean absolute difference of the scaled decode from the exact one, and its mean, in levels of 255."""
    difference = decode_fitted(data, *arguments).int() - decode_fitted(data, *arguments, exact=True).int()
    return difference.abs().float().mean().item(), difference.float().mean().item()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(768, 768), (1037, 771), (519, 520), (300, 400)])
def test_scaled_decoding_is_close_to_exact(size, mode):
    data = encode(waves(*size).convert(mode), "JPEG", quality=90)
    for place in (0.0, 0.37, 1.0):
        for target in (64, (48, 88), (64, 32)):
            mean, bias = error(data, target, place)
            assert mean < 0.7
            assert abs(bias) < 0.2


def test_scaled_decoding_begins_at_four_pixels_to_one():
    """Half the size leaves twice the result's, no less."""
    data = encode(waves(512, 512).filter(ImageFilter.UnsharpMask(4, 300)), "JPEG", quality=95)
    assert error(data, 129)[0] == 0
    assert error(data, 128)[0] > 0
    exact = fit(decode_image(data), 129)
    assert torch.equal(decode_fitted(data, 129), exact)
    assert torch.equal(decode_fitted(data, 128, exact=True), fit(decode_image(data), 128))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_of_turned_pictures(orientation):
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    for size in ((640, 400), (631, 403)):  # the second leaves parts of blocks at two sides
        check_turned(waves(*size), orientation, turns)


def check_turned(upright, orientation, turns):
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", quality=95, exif=exif)
    for target, place in ((50, 0.2), (25, 0.6), ((32, 64), 0.9), (400, 0.7), ((100, 160), 0.5)):
        expected = fit(upright, target, place)
        assert (decode_fitted(data, target, place).float() - expected.float()).abs().mean() < 1


def test_scaled_decoding_judges_the_whole_image():
    data = encode(waves(200, 100), "JPEG")
    assert reason_of(decode_fitted, data, 101) == Reason.TOO_SMALL
    assert reason_of(decode_fitted, data, (60, 201)) == Reason.TOO_SMALL
    assert decode_fitted(data, 100).shape == (3, 100, 100)
    assert decode_fitted(data, (50, 100)).shape == (3, 50, 100)
    assert decode_fitted(data, 101, allow_upscale=True).shape == (3, 101, 101)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(waves(200, 100), "JPEG", exif=turned)
    assert decode_fitted(data, (200, 100)).shape == (3, 200, 100)
    assert reason_of(decode_fitted, data, (100, 200)) == Reason.TOO_SMALL
    assert reason_of(decode_fitted, encode(waves(64, 64), "PNG"), 65) == Reason.TOO_SMALL
    assert reason_of(decode_fitted, b"no image", 8) == Reason.UNDECODABLE


def test_what_is_no_jpeg_is_decoded_exactly():
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(waves(512, 300), format_, **options)
        assert torch.equal(decode_fitted(data, 64, 0.25), fit(waves(512, 300), 64, 0.25))


def test_truncated_and_progressive_jpegs_scaled():
    whole = encode(waves(512, 512), "JPEG", quality=90)
    assert reason_of(decode_fitted, whole[: len(whole) // 2], 64) == Reason.TRUNCATED_IMAGE
    assert error(encode(waves(512, 512), "JPEG", quality=90, progressive=True), 64)[0] < 0.7


@pytest.mark.parametrize("name", ["coco-mini-permissive", "flower-photos-128"])
def test_scaled_decoding_of_photographs(name):
    folder = given(name)
    square, whole = [], []
    with tarfile.open(folder / "heldout-00000.tar") as tar:
        for member in list(tar)[:30]:
            if member.name.endswith(".webp"):
                photo = decode_image(tar.extractfile(member).read())
                side = min(photo.size)
                large = photo.resize((512, 512), Image.Resampling.LANCZOS, box=(0, 0, side, side))
                square.append(error(encode(large, "JPEG", quality=90), 64)[0])
                large = photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.LANCZOS)
                whole.append(error(encode(large, "JPEG", quality=90), 60)[0])
    assert np.mean(square) < 0.5  # the sizes divide
    assert np.mean(whole) < 1.5  # where they do not, the area filter itself is uneven at 8 pixels to one


@pytest.mark.parametrize(
    ("text", "metadata", "field", "expected"),
    [
        (b"a cat\n", None, None, ["a cat"]),
        ("\ufeffein  Bär\r\n\r\n two ".encode(), None, None, ["ein Bär", "two"]),
        (b"a cat", b'{"caption": "a dog"}', None, ["a cat"]),
        (None, b'{"caption": "a dog"}', None, ["a dog"]),
        (b"a cat", b'{"all": ["one", "", null, "two"]}', "all", ["one", "two"]),
        (b"", b'{"caption": "a dog"}', None, Reason.NO_CAPTION),
        (b" \n ", None, None, Reason.NO_CAPTION),
        (None, b'{"caption": null}', None, Reason.NO_CAPTION),
        (None, b"[1]", None, Reason.NO_CAPTION),
        (b"a cat", b"{}", "all", Reason.NO_CAPTION),
        (b"caf\xe9", None, None, Reason.CAPTION_NOT_UTF8),
        (None, b'{"caption": "caf\xe9"}', None, Reason.CAPTION_NOT_UTF8),
        (None, b'{"caption": ', None, Reason.BAD_JSON),
        (None, b"[" * 100_000, None, Reason.BAD_JSON),
    ],
)
def test_captions(text, metadata, field, expected):
    if isinstance(expected, Reason):
        assert reason_of(decode_captions, text, metadata, field) == expected
    else:
        assert decode_captions(text, metadata, field) == expected


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_text_states():
    states = np.arange(12, dtype=np.float16).reshape(3, 4)
    text, name = decode_text_states(npz(states=states, encoder=np.array("t5")), "t5")
    assert name == "t5"
    assert text.states.dtype == torch.float32
    assert torch.equal(text.states[0], torch.from_numpy(states).float())
    assert text.pooled.tolist() == [[4, 5, 6, 7]]
    masked, _ = decode_text_states(npz(states=states, encoder="t5", mask=np.array([True, True, False])))
    assert masked.pooled.tolist() == [[2, 3, 4, 5]]
    pooled, _ = decode_text_states(npz(states=states[:1], encoder="t5", pooled=np.ones(4, np.float32)))
    both = stack_text([text, pooled])
    assert both.mask.tolist() == [[True] * 3, [True, False, False]]
    assert both.states[1, 1:].abs().sum() == 0
    assert both.pooled.tolist() == [[4, 5, 6, 7], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"states": np.ones((3, 4), np.float32)}, Reason.BAD_TEXT_STATES),
        ({"encoder": "t5"}, Reason.BAD_TEXT_STATES),
        ({"states": np.ones((3, 4), np.int32), "encoder": "t5"}, Reason.BAD_TEXT_STATES),
        ({"states": np.ones(4, np.float32), "encoder": "t5"}, Reason.BAD_TEXT_STATES),
        ({"states": np.ones((0, 4), np.float32), "encoder": "t5"}, Reason.BAD_TEXT_STATES),
        ({"states": np.ones((3, 4), np.float32), "encoder": "t5", "mask": np.ones(2, bool)}, Reason.BAD_TEXT_STATES),
        ({"states": np.ones((3, 4), np.float32), "encoder": "t5", "pooled": np.ones(3, "f4")}, Reason.BAD_TEXT_STATES),
        ({"states": np.array([[1, np.nan]], np.float16), "encoder": "t5"}, Reason.NAN_TEXT_STATES),
        ({"states": np.ones((3, 4), np.float32), "encoder": "umt5"}, Reason.OTHER_ENCODER),
    ],
)
def test_text_states_refused(arrays, reason):
    assert reason_of(decode_text_states, npz(**arrays), "t5") == reason


def test_damaged_and_oversized_text_states(monkeypatch):
    whole = npz(states=np.ones((3, 4), np.float32), encoder="t5")
    generator = np.random.default_rng(0)
    for cut in range(0, len(whole), 7):
        assert reason_of(decode_text_states, whole[:cut]) == Reason.BAD_TEXT_STATES
    for _ in range(200):
        data = bytearray(whole)
        data[int(generator.integers(len(data)))] = int(generator.integers(256))
        try:
            text, _ = decode_text_states(bytes(data))
            assert text.states.shape == (1, 3, 4)
        except Unusable:
            pass
    monkeypatch.setattr(decode, "MAX_TEXT_BYTES", 100)
    assert reason_of(decode_text_states, whole) == Reason.BAD_TEXT_STATES


def test_captions_are_what_json_holds():
    record = {"caption": "Ein Bär 🐻 auf Eis"}
    assert decode_captions(None, json.dumps(record).encode()) == ["Ein Bär 🐻 auf Eis"]
