"""Every kind of picture to right RGB; captions; text states; and that damage is always `Unusable`."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_lightning.data import decode
from imagen_lightning.data.decode import decode_captions, decode_image, decode_text_states, fit, stack_text
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
