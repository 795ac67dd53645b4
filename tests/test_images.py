"""images.py: ranges, sizes, masks, and PNG files that are whole, never overwritten, and say how they were made."""

import errno
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sd_jax import images
from sd_jax.types import RequestError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (16, 24, 3), np.uint8)
SETTINGS = {
    "prompt": "a red cube, 積み木 🧊",
    "negative": "blur",
    "steps": 30,
    "sampler": "ddim",
    "guidance": 7.5,
    "seed": 2**53 + 1,
    "model": "tiny, really",
}


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("xp", [np, jnp])
def test_every_level_survives_the_round_trip(xp):
    levels = xp.arange(256, dtype=xp.uint8)
    image = images.from_uint8(levels)
    assert image.dtype == xp.float32 and float(image[0]) == -1 and float(image[255]) == 1
    np.testing.assert_array_equal(images.to_uint8(image), levels)


def test_to_uint8_rounds_and_clips_and_traces():
    x = np.float32([-3, -1, 1.9 / 255 - 1, 2.1 / 255 - 1, 1, 3])
    np.testing.assert_array_equal(images.to_uint8(x), [0, 0, 1, 1, 255, 255])
    assert isinstance(images.to_uint8(x), np.ndarray) and images.to_uint8(x).flags.writeable
    x = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)
    traced = jax.jit(images.to_uint8)(jnp.asarray(x))
    assert isinstance(traced, jax.Array) and traced.dtype == jnp.uint8
    np.testing.assert_array_equal(traced, images.to_uint8(x))


def test_bfloat16_images_are_rounded_in_float32():
    x = jnp.linspace(-1, 1, 257, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(images.to_uint8(x), images.to_uint8(x.astype(jnp.float32)))


@pytest.mark.parametrize("size", [(64, 48), (65, 50)])
def test_latent_mask_is_torchs_nearest(size):
    torch = pytest.importorskip("torch")
    masks = RNG.integers(0, 3, (2, *size), np.uint8)
    cells = (size[0] // 8 * 8, size[1] // 8 * 8)
    binary = torch.from_numpy((masks != 0).astype(np.float32))[:, None, : cells[0], : cells[1]]
    expected = torch.nn.functional.interpolate(binary, size=(cells[0] // 8, cells[1] // 8))
    ours = images.to_mask(masks, 8)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[..., 0], expected[:, 0])
    np.testing.assert_array_equal(jax.jit(images.to_mask, static_argnums=1)(masks, 8), ours)
    np.testing.assert_array_equal(images.to_mask(masks > 0, 8), ours)
    assert images.to_mask(masks).shape == (2, *size, 1)


def test_fit_returns_an_image_of_the_right_size_itself():
    assert images.fit(PIXELS, 16, 24) is PIXELS


@pytest.mark.parametrize("size", [(8, 8), (40, 16), (16, 40), (32, 48), (7, 5)])
def test_fit_keeps_the_centre_and_does_not_stretch(size):
    y, x = np.mgrid[0:160, 0:240].astype(np.float32)
    ramp = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    out = images.fit(ramp, *size).astype(float)
    assert out.shape == (*size, 3)
    scale = max(size[0] / 160, size[1] / 240)
    # A pixel of a resampled ramp is the ramp at its centre, but for rounding to integers (the borders are left out).
    inner = out[size[0] // 4 : -(size[0] // 4), size[1] // 4 : -(size[1] // 4)]
    rows = (np.arange(size[0]) + 0.5 - size[0] / 2) / scale + 80 - 0.5
    columns = (np.arange(size[1]) + 0.5 - size[1] / 2) / scale + 120 - 0.5
    np.testing.assert_allclose(inner[0, :, 0], columns[size[1] // 4 : -(size[1] // 4)], atol=1.0)
    np.testing.assert_allclose(inner[:, 0, 1], rows[size[0] // 4 : -(size[0] // 4)], atol=1.0)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_fit_takes_any_shape(size):
    assert images.fit(np.full((*size, 3), 9, np.uint8), 64, 32).shape == (64, 32, 3)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_fit_keeps_a_mask_binary_and_nonzero_means_repaint(dtype):
    mask = np.zeros((30, 30), dtype)
    mask[:, 15:] = 1
    out = images.fit(mask, 16, 16)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out != 0, np.broadcast_to(np.arange(16) >= 8, (16, 16)))


def test_grid_is_row_major_and_leaves_white():
    batch = np.stack([np.full((2, 3, 3), value, np.uint8) for value in range(5)])
    sheet = images.grid(batch)
    assert sheet.shape == (4, 9, 3)
    np.testing.assert_array_equal(sheet[::2, ::3, 0], [[0, 1, 2], [3, 4, 255]])
    np.testing.assert_array_equal(images.grid(batch, columns=5)[0, ::3, 0], range(5))
    np.testing.assert_array_equal(images.grid(batch[:1]), batch[0])


# ---- writing and reading back --------------------------------------------------------------------


def test_png_gives_back_pixels_and_settings(tmp_path):
    path = images.write_png(tmp_path / "a.png", PIXELS, SETTINGS)
    np.testing.assert_array_equal(images.open_image(path), PIXELS)
    assert images.read_metadata(path) == SETTINGS
    assert os.listdir(tmp_path) == ["a.png"]


def test_parameters_are_what_other_programs_expect(tmp_path):
    path = images.write_png(tmp_path / "a.png", PIXELS, SETTINGS)
    with Image.open(path) as image:
        assert image.text["parameters"].split("\n") == [
            "a red cube, 積み木 🧊",
            "Negative prompt: blur",
            'Steps: 30, Sampler: ddim, CFG scale: 7.5, Seed: 9007199254740993, Size: 24x16, Model: "tiny, really"',
        ]


@pytest.mark.parametrize(
    "prompt", ["", "nul \0 here", "lone \udc80 surrogate", "two\nlines\r\n", "\u2028 \x07 é", "x" * 5000]
)
def test_any_prompt_comes_back_exactly(tmp_path, prompt):
    path = images.write_png(tmp_path / "a.png", PIXELS, {"prompt": prompt, "seed": 1})
    assert images.read_metadata(path)["prompt"] == prompt
    with Image.open(path) as image:
        assert "\0" not in image.text["parameters"]


def test_numpy_and_jax_values_in_settings(tmp_path):
    settings = {"guidance": np.float32(7.5), "seed": jnp.int32(3), "sizes": np.arange(2)}
    path = images.write_png(tmp_path / "a.png", PIXELS, settings)
    assert images.read_metadata(path) == {"guidance": 7.5, "seed": 3, "sizes": [0, 1]}
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        images.encode_png(PIXELS, {"x": object()})


def test_a_png_without_settings_says_so(tmp_path):
    path = images.write_png(tmp_path / "a.png", PIXELS)
    with pytest.raises(RequestError, match="carries no settings"):
        images.read_metadata(path)
    info = images.PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20")
    Image.fromarray(PIXELS).save(tmp_path / "b.png", pnginfo=info)
    with pytest.raises(RequestError, match="another program's"):
        images.read_metadata(tmp_path / "b.png")
    for text, message in [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a list, not an object"),
        ("9" * 5000, "not JSON"),
    ]:
        info.add_text("sd_jax", text)
        Image.fromarray(PIXELS).save(tmp_path / "c.png", pnginfo=info)
        with pytest.raises(RequestError, match=message):
            images.read_metadata(tmp_path / "c.png")
        info = images.PngImagePlugin.PngInfo()
    Image.fromarray(PIXELS).save(tmp_path / "d.jpg")
    with pytest.raises(RequestError, match="expected PNG"):
        images.read_metadata(tmp_path / "d.jpg")


@pytest.mark.parametrize("image", [PIXELS.astype(np.float32), PIXELS[..., 0], PIXELS[None]])
def test_only_uint8_rgb_is_written(tmp_path, image):
    with pytest.raises(RequestError, match=r"must be uint8 \[H, W, 3\]"):
        images.write_png(tmp_path / "a.png", image)


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(RequestError, match="already exists"):
        images.write_png(path, PIXELS)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["a.png"]


def test_numbers_go_on_from_the_highest(tmp_path):
    assert images.next_number(tmp_path) == 0
    for name in ["00003-7.png", "00010-7.txt", "100000-1.png", "grid.png", "9.png"]:
        (tmp_path / name).touch()
    assert images.next_number(tmp_path) == 100001
    assert images.write_numbered(tmp_path, PIXELS, 5).name == "100001-5.png"
    assert images.write_numbered(tmp_path / "new" / "folder", PIXELS, 5).name == "00000-5.png"


@pytest.mark.parametrize("links", [True, False])
def test_concurrent_runs_lose_no_image(tmp_path, monkeypatch, links):
    def no_links(source, path):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    written = []

    def write(run):
        for i in range(20):
            image = np.full((4, 4, 3), run * 20 + i, np.uint8)
            written.append((images.write_numbered(tmp_path, image, 1), run * 20 + i))

    threads = [threading.Thread(target=write, args=(run,)) for run in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(os.listdir(tmp_path)) == [f"{i:05d}-1.png" for i in range(80)]
    for path, value in written:
        assert (np.asarray(Image.open(path)) == value).all()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        assert list(tmp_path.glob(images.TEMPORARY)), "the glob for leftovers misses the temporary file"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        images.write_png(tmp_path / "a.png", PIXELS)
    assert os.listdir(tmp_path) == []


def test_a_failed_rename_leaves_nothing_where_there_are_no_links(tmp_path, monkeypatch):
    def fail(code):
        def call(source, path):
            raise OSError(code, "no")

        return call

    monkeypatch.setattr(os, "link", fail(errno.ENOTSUP))
    monkeypatch.setattr(os, "replace", fail(errno.EIO))
    with pytest.raises(OSError, match="no"):
        images.write_png(tmp_path / "a.png", PIXELS)
    assert os.listdir(tmp_path) == []


# ---- masks from files ----------------------------------------------------------------------------


def test_open_mask_is_black_and_white(tmp_path):
    gray = np.repeat(np.array([[0, 20, 127, 128, 240, 255, 0, 0]], np.uint8), 8, axis=0)
    Image.fromarray(gray).save(tmp_path / "a.png")
    mask = images.open_mask(tmp_path / "a.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask[0], [0, 0, 0, 255, 255, 255, 0, 0])


def test_open_mask_keeps_what_is_transparent(tmp_path):
    rgba = np.full((8, 8, 4), 255, np.uint8)
    rgba[:4, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (images.open_mask(tmp_path / "a.png") == np.repeat([0, 255], 4)[:, None]).all()
