"""Users' images, F46-F54: what cannot be used is refused with a reason, what can is shown as its author saw it."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd_jax.images import MAX_PIXELS, ImageError, open_image
from sd_jax.types import RequestError

# Pillow's own remarks on the damaged files of these tests
pytestmark = pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF", "ignore:Tag data", "ignore::PIL.Image.DecompressionBombWarning"
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.arange(32) * 8, np.arange(24) * 10), np.full((24, 32), 90)], -1).astype(np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def opened(tmp_path, data, name="image.jpg"):
    (tmp_path / name).write_bytes(data)
    return open_image(tmp_path / name)


def refused(tmp_path, data, reason, name="image.jpg"):
    with pytest.raises(ImageError) as caught:
        opened(tmp_path, data, name)
    message = str(caught.value)
    assert caught.value.reason == reason, message
    assert name in message and "\n" not in message
    return message


def png(*chunks, size=(24, 32), depth=8, colour=2, pixels=None):
    """A PNG made by hand: ``chunks`` are (kind, body) between header and pixels."""
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, 0)
    pixels = b"".join(b"\0" + row.tobytes() for row in PIXELS) if pixels is None else pixels
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    crc = [struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    parts = [struct.pack(">I", len(body)) + kind + body + sum for (kind, body), sum in zip(chunks, crc, strict=True)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_the_handmade_png_is_sound(tmp_path):
    np.testing.assert_array_equal(opened(tmp_path, png()), PIXELS)


# ---- F46: not images, and half images ------------------------------------------------------------


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "format"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "format"),
        (b"\xef\xbb\xbf  <svg/>", "format"),
        (b"\0" * 5000, "format"),
        (b"hello", "format"),
        (b"\xff\xd8\xff", "corrupt"),
    ],
)
def test_f46_what_is_no_image_is_refused(tmp_path, data, reason):
    message = refused(tmp_path, data, reason)
    assert ("HTML, SVG or XML" in message) == (b"<" in data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_f46_a_truncated_file_is_refused_wherever_it_ends(tmp_path, format):
    data = encoded(PIXELS, format)
    for part in [12, 20, 100, len(data) // 2, len(data) * 9 // 10, len(data) - 10]:
        refused(tmp_path, data[:part], "corrupt")


def test_f46_every_flipped_bit_of_a_png_is_found(tmp_path):
    data = encoded(PIXELS, "PNG")
    for position in RNG.choice(np.arange(8, len(data)), 100, replace=False):
        flipped = bytearray(data)
        flipped[position] ^= 1 << RNG.integers(8)
        with pytest.raises(ImageError):
            opened(tmp_path, bytes(flipped))


def test_f46_random_damage_never_ends_in_anything_but_an_image_or_an_image_error(tmp_path):
    seeds = [encoded(SMOOTH, format) for format in ("JPEG", "PNG", "WEBP")] + [
        encoded(oriented(6), "JPEG", exif=exif(6))
    ]
    for i in range(400):
        data = bytearray(seeds[i % len(seeds)])
        for position in RNG.integers(0, min(len(data), 300), 3):
            data[position] = RNG.integers(256)
        try:
            assert opened(tmp_path, bytes(data)).dtype == np.uint8
        except ImageError:
            pass


def test_f46_missing_folders_pipes_and_odd_names(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in [tmp_path / "none.png", tmp_path, tmp_path / "pipe", "nul\0.png", "n" * 5000]:
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert caught.value.reason == "missing"


def test_f46_the_error_is_a_request_error_and_crosses_processes():
    error = pickle.loads(pickle.dumps(ImageError("a.png is empty (0 bytes)", "empty")))
    assert isinstance(error, RequestError) and error.reason == "empty" and str(error) == "a.png is empty (0 bytes)"


# ---- F47, F48: bombs -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8192, 8193), (10000, 10000), (60000, 60000)])
def test_f47_pixels_are_counted_before_decoding(tmp_path, size):
    assert size[0] * size[1] > MAX_PIXELS
    message = refused(tmp_path, png(size=size, pixels=b""), "bomb")
    assert f"{MAX_PIXELS:,}" in message


def test_f47_a_webp_canvas_is_counted_before_decoding(tmp_path):
    frame = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    side = struct.pack("<I", 16382)[:3]
    small = struct.pack("<I", 15)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side + side
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(6) + small + small + bytes(4) + frame
    refused(tmp_path, b"RIFF" + struct.pack("<I", len(body)) + body, "bomb")


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many"])
def test_f48_compressed_text_is_not_unfolded(tmp_path, kind):
    bomb = zlib.compress(bytes(50_000_000), 9)
    assert len(bomb) < 100_000
    megabyte = zlib.compress(b"a" * 1_000_000, 9)
    chunks = {
        "zTXt": [(b"zTXt", b"k\0\0" + bomb)],
        "iTXt": [(b"iTXt", b"k\0\1\0\0\0" + bomb)],
        "iCCP": [(b"iCCP", b"k\0\0" + bomb)],
        "many": [(b"zTXt", b"%d\0\0" % i + megabyte) for i in range(80)],
    }[kind]
    refused(tmp_path, png(*chunks), "bomb")


# ---- F49-F51: colours ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_f49_transparency_shows_white_and_hides_colours(tmp_path, format):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:8, :, 3] = 255
    rgba[8:12, :, 3] = 128
    out = opened(tmp_path, encoded(rgba, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    np.testing.assert_array_equal(out[0, 0], [200, 0, 0])
    np.testing.assert_allclose(out[9, 0], [228, 127, 127], atol=1)  # rounding of the blend
    np.testing.assert_array_equal(out[15, 0], [255, 255, 255])


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB", "1"])
def test_f49_transparency_in_every_mode(tmp_path, mode):
    gray = np.zeros((16, 16), np.uint8)
    gray[8:] = 255 if mode == "1" else 90
    if mode == "LA":
        data = encoded(
            Image.merge("LA", [Image.fromarray(gray), Image.fromarray(np.where(gray == 90, 0, 255).astype("u1"))]),
            "PNG",
        )
    elif mode == "P":
        image = Image.fromarray((gray > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 90, 90, 90])
        data = encoded(image, "PNG", transparency=b"\xff\x00")
    else:
        image = Image.fromarray(gray).convert(mode)
        data = encoded(image, "PNG", transparency={"L": 90, "RGB": (90, 90, 90), "1": 255}[mode])
    out = opened(tmp_path, data)
    assert (out[0] == 0).all() and (out[15] == 255).all()


def test_f50_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(16, 0)
    out = opened(tmp_path, encoded(ramp, "PNG"))
    np.testing.assert_array_equal(out[0, :, 1], np.round(ramp[0] / 257))
    assert len(np.unique(out)) == 64


def test_f50_sixteen_bits_with_a_transparent_value(tmp_path):
    values = np.full((16, 16), 1000, ">u2")
    values[8:] = 40000
    pixels = b"".join(b"\0" + row.tobytes() for row in values)
    data = png((b"tRNS", struct.pack(">H", 1000)), size=(16, 16), depth=16, colour=0, pixels=pixels)
    out = opened(tmp_path, data)
    assert (out[0] == 255).all() and (out[15] == 156).all()


def test_f51_icc_profiles_are_applied(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    swapped = bytearray(srgb.tobytes())
    # An sRGB profile in which red's and blue's colorants have changed places: its (r, g, b) means sRGB's (b, g, r).
    for i in range(132, 132 + 12 * struct.unpack(">I", swapped[128:132])[0], 12):
        name = bytes(swapped[i : i + 4])
        swapped[i : i + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    out = opened(tmp_path, encoded(SMOOTH, "PNG", icc_profile=bytes(swapped)))
    np.testing.assert_allclose(out.astype(int), SMOOTH[..., ::-1], atol=2)  # 8-bit steps of the colour engine
    plain = opened(tmp_path, encoded(SMOOTH, "PNG", icc_profile=srgb.tobytes()))
    np.testing.assert_allclose(plain.astype(int), SMOOTH, atol=1)


@pytest.mark.parametrize(
    "profile", [b"not a profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()]
)
def test_f51_an_unusable_profile_is_as_none(tmp_path, profile):
    np.testing.assert_array_equal(opened(tmp_path, encoded(PIXELS, "PNG", icc_profile=profile)), PIXELS)


def test_f51_cmyk(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:8, :, 0] = 255  # cyan above, white below
    out = opened(tmp_path, encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(out[2, 2].astype(int), [0, 255, 255], atol=3)  # JPEG
    np.testing.assert_allclose(out[14, 14].astype(int), [255, 255, 255], atol=3)


def test_f51_one_bit(tmp_path):
    bits = RNG.integers(0, 2, (16, 16)).astype(bool)
    out = opened(tmp_path, encoded(bits, "PNG"))
    np.testing.assert_array_equal(out, np.where(bits, 255, 0)[..., None].repeat(3, -1))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_f51_the_first_frame_of_an_animation(tmp_path, format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    assert (opened(tmp_path, data) == [255, 0, 0]).all()


# ---- F52: orientation ----------------------------------------------------------------------------


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def oriented(orientation):
    """SMOOTH as a camera held in that orientation stores it (the inverse of the tag's meaning, TIFF 6.0)."""
    row, column = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
    stored = SMOOTH
    # The letters are the visual sides that the stored first row and first column lie on.
    if "B" in row + column:
        stored = stored[::-1]
    if "R" in row + column:
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored if row in "TB" else stored.transpose(1, 0, 2))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_f52_all_orientations_are_upright(tmp_path, orientation, format):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[format]
    out = opened(tmp_path, encoded(oriented(orientation), format, exif=exif(orientation), **options))
    assert out.shape == SMOOTH.shape
    np.testing.assert_allclose(out.astype(int), SMOOTH, atol=4)  # JPEG


@pytest.mark.parametrize(
    "tags", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_f52_damaged_camera_data_does_not_spoil_the_pixels(tmp_path, tags):
    assert opened(tmp_path, encoded(SMOOTH, "JPEG", exif=tags)).shape == SMOOTH.shape
    assert opened(tmp_path, encoded(SMOOTH, "JPEG", exif=exif(77))).shape == SMOOTH.shape


# ---- F53, F54: formats and sizes -----------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "EPS", "PPM", "TGA", "ICO", "PDF", "AVIF"])
def test_f53_only_three_formats_are_decoded(tmp_path, format):
    try:
        data = encoded(PIXELS, format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {format}")
    assert "expected JPEG or PNG or WEBP" in refused(tmp_path, data, "format")


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (7, 100), (10, 201)])
def test_f54_too_small_or_too_long(tmp_path, size):
    message = refused(tmp_path, encoded(np.zeros((*size, 3), np.uint8), "PNG"), "size")
    assert f"{size[1]} x {size[0]} pixels" in message


def test_f54_the_limits_are_the_callers(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(np.zeros((1, 2000, 3), np.uint8), "PNG"))
    assert open_image(path, min_side=1, max_aspect=2000).shape == (1, 2000, 3)
    path.write_bytes(encoded(np.zeros((255, 300, 3), np.uint8), "PNG"))
    with pytest.raises(ImageError, match="at least 256"):
        open_image(path, min_side=256)
