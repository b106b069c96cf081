"""Pictures of every kind to right sRGB, against colours computed from the specifications.

The ICC profiles are written by their own (ICC.1:2001-04), and what they mean is computed apart from any library.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from imagen_lightning.data import colour
from imagen_lightning.data.decode import decode_fitted, decode_image

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = np.array([0.95047, 1.0, 1.08883])
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
ADOBE_RGB = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
DISPLAY_P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
ADOBE_GAMMA = 563 / 256


def to_linear(values):
    """IEC 61966-2-1, values in [0, 1]."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(values):
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def matrix(primaries):
    """Linear RGB of a D65 space to XYZ adapted to D50."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    columns = columns * np.linalg.solve(columns, D65)
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ D65)) @ BRADFORD
    return adapt @ columns


def xyz_to_srgb(xyz):
    """XYZ (D50) to sRGB in [0, 255]."""
    return 255 * from_linear(np.asarray(xyz) @ np.linalg.inv(matrix(SRGB)).T)


def lab_to_xyz(lab):
    lightness, a, b = lab
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def make_profile(space, tags, pcs=b"XYZ ", kind=b"mntr"):
    """A version 2 profile of tags: signature to data."""
    fixed = [round(value * 65536) for value in D50]
    head = struct.pack(">4sI4s4s4s12s4s4s24x3i48x", b"\0" * 4, 0x02400000, kind, space, pcs, b"", b"acsp", b"", *fixed)
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for signature, data in tags.items():
        table += struct.pack(">4sII", signature, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    whole = head + table + body
    return struct.pack(">I", len(whole) + 4) + whole


def xyz_tag(values):
    return struct.pack(">4s4x3i", b"XYZ ", *[round(value * 65536) for value in values])


def gamma_tag(gamma):
    return struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))


def curve_tag(function, points=1024):
    values = np.round(65535 * function(np.linspace(0, 1, points))).astype(">u2")
    return struct.pack(">4s4xI", b"curv", points) + values.tobytes()


def rgb_profile(primaries, curve):
    columns = matrix(primaries).T
    tags = {b"wtpt": xyz_tag(D50)}
    for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags[name + b"XYZ"] = xyz_tag(column)
        tags[name + b"TRC"] = curve
    return make_profile(b"RGB ", tags)


def grey_profile(gamma):
    return make_profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": gamma_tag(gamma)})


def cmyk_profile(corners):
    """Of a press whose 16 combinations of full inks give these Lab colours, in 8 bits; C varies slowest, K fastest."""
    straight = bytes(range(256))
    identity = struct.pack(">9i", *[65536 if i % 4 == 0 else 0 for i in range(9)])
    lut = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + identity + straight * 4 + bytes(corners) + straight * 3
    return make_profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": lut}, pcs=b"Lab ", kind=b"prtr")


def encode(image, format_="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(pixels, depth, colour_type, **chunks):
    """A PNG by its specification: (H, W) or (H, W, C) samples of `depth` bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def row(samples):
        if depth == 16:
            return samples.astype(">u2").tobytes()
        bits = "".join(f"{sample:0{depth}b}" for sample in samples.ravel())
        return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")

    height, width = pixels.shape[:2]
    data = zlib.compress(b"".join(b"\0" + row(samples) for samples in pixels))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def colours_of(image):
    assert image.mode == "RGB"
    return np.asarray(image, dtype=np.int64)


def all_colours(step=15):
    levels = np.arange(0, 256, step, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 18 if step == 15 else 1, 3)


# ---- ICC profiles


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize(
    ("primaries", "curve", "linear"),
    [
        (ADOBE_RGB, gamma_tag(ADOBE_GAMMA), lambda x: x**ADOBE_GAMMA),
        (DISPLAY_P3, curve_tag(to_linear), to_linear),
        (SRGB, gamma_tag(1.0), lambda x: x),
    ],
    ids=["Adobe RGB", "Display P3", "linear"],
)
def test_colours_of_other_rgb_spaces(primaries, curve, linear, format_):
    pixels = all_colours()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format_, {})
    data = encode(Image.fromarray(pixels), format_, icc_profile=rgb_profile(primaries, curve), **options)
    if format_ == "JPEG":  # lossy: what is in the file is what is decoded without the profile
        pixels = np.asarray(Image.open(io.BytesIO(data)))
    expected = xyz_to_srgb(linear(pixels / 255.0) @ matrix(primaries).T)
    assert np.abs(colours_of(decode_image(data, (format_,))) - expected).max() <= 1


def test_published_colours():
    adobe, p3 = rgb_profile(ADOBE_RGB, gamma_tag(ADOBE_GAMMA)), rgb_profile(DISPLAY_P3, curve_tag(to_linear))
    for profile, stored, expected in [
        (adobe, (219, 0, 0), (255, 0, 0)),
        (adobe, (144, 255, 60), (0, 255, 0)),
        (adobe, (0, 0, 250), (0, 0, 255)),
        (p3, (234, 51, 35), (255, 0, 0)),
        (p3, (128, 128, 128), (128, 128, 128)),
    ]:
        image = decode_image(encode(Image.new("RGB", (2, 2), stored), icc_profile=profile))
        assert np.abs(colours_of(image)[0, 0] - expected).max() <= 1


def test_grey_with_a_profile():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    levels = np.arange(256).reshape(16, 16, 1) / 255
    for profile, expected in [
        (grey_profile(1.0), from_linear(levels)),
        (grey_profile(2.2), from_linear(levels ** (round(2.2 * 256) / 256))),
        (rgb_profile(DISPLAY_P3, gamma_tag(1.0)), from_linear(levels)),  # one channel of a space of three
    ]:
        for format_ in ("PNG", "TIFF"):
            image = decode_image(encode(grey, format_, icc_profile=profile), (format_,))
            assert np.abs(colours_of(image) - 255 * expected).max() <= 1
    sixteen = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = decode_image(encode(Image.fromarray(sixteen), icc_profile=grey_profile(2.2)))
    expected = 255 * from_linear((sixteen[..., None] / 65535) ** (round(2.2 * 256) / 256))
    assert np.abs(colours_of(image) - expected).max() <= 2  # one of them from the 8 bits that the profile is given


def test_cmyk_with_a_profile():
    corners = np.random.default_rng(0).integers(60, 200, (16, 3))
    corners[0], corners[15] = (255, 128, 128), (0, 128, 128)  # white paper, all inks
    profile = cmyk_profile(corners.ravel().tolist())
    for index, corner in enumerate(corners):
        inks = tuple(255 * (index >> shift & 1) for shift in (3, 2, 1, 0))
        expected = xyz_to_srgb(lab_to_xyz((corner[0] * 100 / 255, corner[1] - 128, corner[2] - 128)))
        for format_, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
            data = encode(Image.new("CMYK", (16, 16), inks), format_, icc_profile=profile, **options)
            assert np.abs(colours_of(decode_image(data, (format_,))) - expected).max() <= 2
        fitted = decode_fitted(encode(Image.new("CMYK", (64, 64), inks), "JPEG", icc_profile=profile), 8)
        assert np.abs(fitted.permute(1, 2, 0).numpy() - expected).max() <= 3


def test_palette_and_transparency_with_a_profile():
    profile = rgb_profile(ADOBE_RGB, gamma_tag(ADOBE_GAMMA))
    image = Image.new("RGBA", (3, 1), (219, 0, 0, 255))
    image.putpixel((1, 0), (219, 0, 0, 0))
    image.putpixel((2, 0), (219, 0, 0, 51))
    expected = [(255, 0, 0), (255, 255, 255), (255, 204, 204)]
    assert np.abs(colours_of(decode_image(encode(image, icc_profile=profile)))[0] - expected).max() <= 1
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 144, 255, 60])
    palette.putpixel((1, 0), 0)
    image = decode_image(encode(palette, transparency=0, icc_profile=profile))
    assert np.abs(colours_of(image)[0] - [(0, 255, 0), (255, 255, 255)]).max() <= 1
    both = Image.merge("LA", [Image.new("L", (1, 1), 55), Image.new("L", (1, 1), 255)])
    image = decode_image(encode(both, icc_profile=grey_profile(1.0)))
    assert np.abs(colours_of(image) - 255 * from_linear(55 / 255)).max() <= 1


def test_profiles_that_are_srgb_change_nothing(monkeypatch):
    pixels = all_colours()
    profiles = [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB, curve_tag(to_linear)),
        rgb_profile(SRGB, curve_tag(to_linear, points=256)),
    ]
    for profile in profiles:
        image = decode_image(encode(Image.fromarray(pixels), icc_profile=profile))
        assert np.array_equal(colours_of(image), pixels)
        assert "icc_profile" not in image.info
    before = colour._change.cache_info()
    for _ in range(5):
        decode_image(encode(Image.fromarray(pixels), icc_profile=profiles[0]))
    after = colour._change.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 5)
    assert after.maxsize is not None


def test_damaged_and_other_profiles_are_passed_over():
    whole = rgb_profile(ADOBE_RGB, gamma_tag(ADOBE_GAMMA))
    picture = Image.fromarray(all_colours())
    for wrong in (b"x", whole[:100], whole[:200], grey_profile(1.0), cmyk_profile([128] * 48)):
        assert np.array_equal(colours_of(decode_image(encode(picture, icc_profile=wrong))), all_colours())
    inks = Image.new("CMYK", (2, 2), (255, 0, 0, 51))
    assert decode_image(encode(inks, "TIFF", icc_profile=whole), ("TIFF",)).getpixel((0, 0)) == (0, 204, 204)
    generator = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for place in generator.integers(len(data), size=5):
            data[place] = generator.integers(256)
        assert decode_image(encode(picture, icc_profile=bytes(data))).size == picture.size


# ---- inks


def crafted_cmyk(components, transform):
    """A JPEG of four components as they are stored, under Adobe's marker; quality 100, one colour."""
    stored = Image.new("CMYK", (16, 16), tuple(255 - value for value in components))  # Pillow stores the complement
    data = encode(stored, "JPEG", quality=100)
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[: marker + 15] + bytes([transform]) + data[marker + 16 :]


@pytest.mark.parametrize("inks", [(0, 0, 0, 0), (255, 0, 0, 0), (30, 200, 90, 0), (10, 20, 30, 128), (0, 0, 0, 255)])
def test_adobe_cmyk_and_ycck(inks):
    *colours, black = inks
    expected = [(255 - ink) * (255 - black) / 255 for ink in colours]
    inverted = decode_image(crafted_cmyk([255 - ink for ink in inks], 0))
    assert np.abs(colours_of(inverted) - expected).max() <= 1
    # Adobe's technical note 5116: YCC of the inks taken for red, green and blue, black inverted
    ycc = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]) @ colours
    ycck = decode_image(
        crafted_cmyk([*np.clip(np.round(ycc + np.array([0, 128, 128])), 0, 255).astype(int), 255 - black], 2)
    )
    assert np.abs(colours_of(ycck) - expected).max() <= 3


# ---- depths and transparent colours


def test_sixteen_bits_of_every_value():
    values = np.arange(65536).reshape(256, 256)
    exact = values / 257
    grey = colours_of(decode_image(png(values, 16, 0)))
    assert np.abs(grey - exact[..., None]).max() <= 0.5
    # Pillow keeps the high byte of colours: within one level, no bias over the range, exact for what was 8 bits
    rgb = colours_of(decode_image(png(np.stack([values] * 3, -1), 16, 2)))
    assert np.abs(rgb - exact[..., None]).max() < 1
    assert abs((rgb - exact[..., None]).mean()) < 0.01
    assert np.array_equal(rgb[values % 257 == 0][:, 0], np.arange(256))
    grey_alpha = colours_of(decode_image(png(np.stack([values, np.full_like(values, 65535)], -1), 16, 4)))
    assert np.abs(grey_alpha - exact[..., None]).max() < 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_any_depth(depth):
    top = 2**depth - 1
    values = np.array([[0, 1, top // 2, top]])
    image = colours_of(decode_image(png(values, depth, 0, tRNS=struct.pack(">H", 1))))
    expected = np.where(values == 1, 255, np.round(255 * values / top))
    assert np.abs(image - expected[..., None]).max() <= (1 if depth in (2, 4) else 0)


def test_transparent_colour_of_sixteen_bits():
    pixels = np.array([[[300, 40000, 65535], [65535, 40000, 300]]])
    image = colours_of(decode_image(png(pixels, 16, 2, tRNS=struct.pack(">3H", 300, 40000, 65535))))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert np.abs(image[0, 1] - pixels[0, 1] / 257).max() < 1


def test_palettes_of_few_bits():
    palette = struct.pack("12B", 250, 0, 0, 0, 250, 0, 0, 0, 250, 9, 9, 9)
    for depth in (2, 4, 8):
        image = colours_of(decode_image(png(np.array([[0, 1, 2]]), depth, 3, PLTE=palette, tRNS=b"\xff\x33")))
        assert image[0].tolist() == [[250, 0, 0], [204, 254, 204], [0, 0, 250]]


def test_first_frames():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for format_, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encode(frames[0], format_, save_all=True, append_images=frames[1:], **options)
        with Image.open(io.BytesIO(data)) as image:
            assert image.n_frames == 3
        assert decode_image(data, (format_,)).getpixel((1, 1)) == (250, 0, 0)


def test_other_modes_of_tiff():
    levels = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    grey = Image.fromarray(levels)
    wide = Image.fromarray(levels.astype(np.int32) * 257)  # mode I
    for image in (grey.convert("F"), wide, grey.convert("RGB").convert("LAB")):
        decoded = colours_of(decode_image(encode(image, "TIFF"), ("TIFF",)))
        assert np.abs(decoded - levels[..., None]).max() <= 2
