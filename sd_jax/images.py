"""Images in and out: pixel ranges, sizes, masks, grids, PNG files with metadata, and the opening of users' files.

An ``image`` is float32 in [-1, 1] inside the model and uint8 outside it, channels last. Files that users bring are
opened by ``open_image`` and ``open_mask`` alone, which take nothing on trust and raise ``ImageError`` with a reason.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sd_jax.types import Array, RequestError

# The only decoders a user's file can reach, of the sixty that Pillow has, and how their files begin
FORMATS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}
MAX_PIXELS = 2**26  # 64 megapixels, 8192 x 8192
TEMPORARY = ".sd_jax-*.tmp"  # glob of the files a killed `publish` leaves behind

# ---- arrays --------------------------------------------------------------------------------------


def to_uint8(image: Array | np.ndarray) -> Array | np.ndarray:
    """[-1, 1] float, any shape -> uint8 of the same kind (numpy stays numpy, jax stays jax and may be traced).

    clip(x / 2 + 1/2), then rounded, as diffusers does; CompVis truncates, which darkens by half a level.
    """
    xp = image.__array_namespace__()
    unit = xp.clip(xp.astype(image, xp.float32) / 2 + 0.5, 0, 1)
    return xp.astype(xp.round(unit * 255), xp.uint8)


def from_uint8(image: Array | np.ndarray) -> Array | np.ndarray:
    """uint8, any shape -> float32 in [-1, 1] of the same kind; ``to_uint8`` gives it back exactly."""
    xp = image.__array_namespace__()
    return xp.astype(image, xp.float32) / 127.5 - 1


def to_mask(masks: Array | np.ndarray, factor: int = 1) -> Array | np.ndarray:
    """Masks [B, H, W] uint8 or bool, nonzero is repainted -> float32 [B, H // factor, W // factor, 1], 1 is repainted.

    With the VAE's ``factor`` it is the mask of the latents. Each latent takes the top left pixel of its cell: the
    nearest neighbour of torch's interpolate, hence of diffusers, which can lose a stroke thinner than ``factor``.
    """
    xp = masks.__array_namespace__()
    height, width = (side // factor * factor for side in masks.shape[1:3])
    return xp.astype(masks[:, :height:factor, :width:factor, None] != 0, xp.float32)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of ``image`` [H, W, 3] uint8, or of a mask [H, W] uint8 or bool, as [height, width, ...].

    The largest centred rectangle of the wanted shape is resampled (Lanczos), so nothing is stretched and a 20000 x 1
    image needs no huge intermediate. A mask takes the same crop and stays binary (0 and 255, or bool). An image that
    already has the size is returned as it is.
    """
    if image.shape[:2] == (height, width):
        return image
    is_mask = image.ndim == 2
    pixels = np.where(image, 255, 0).astype(np.uint8) if is_mask else image
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    top, left = max(0.0, (h - height / scale) / 2), max(0.0, (w - width / scale) / 2)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, (left, top, w - left, h - top))
    if not is_mask:
        return np.array(resized)
    inside = np.asarray(resized) >= 128
    return inside if image.dtype == bool else np.where(inside, 255, 0).astype(image.dtype)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images [B, H, W, 3] uint8 -> one image [rows * H, columns * W, 3], row by row; what is left over is white.

    Without ``columns`` the grid is as square as it can be.
    """
    count = len(images)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    blank = np.full((rows * columns - count, *images.shape[1:]), 255, images.dtype)
    return einops.rearrange(np.concatenate([images, blank]), "(r c) h w k -> (r h) (c w) k", c=columns)


# ---- writing -------------------------------------------------------------------------------------


def write_numbered(folder: str | Path, image: np.ndarray, seed: int, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write ``image`` [H, W, 3] uint8 as ``00000-<seed>.png``, under the next free number of ``folder`` -> its path.

    Runs that share a folder lose nothing: a name taken meanwhile sends the image on to the next number.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = encode_png(image, metadata)
    number = next_number(folder)
    while not publish(path := folder / f"{number:05d}-{seed}.png", data):
        number += 1
    return path


def next_number(folder: str | Path) -> int:
    """One more than the highest of the ``<number>-<seed>.png`` and their grids in ``folder``; 0 if there are none."""
    taken = (re.fullmatch(r"(?:grid-)?(\d+)-\d+\.png", name) for name in os.listdir(folder))
    return max((int(match[1]) + 1 for match in taken if match), default=0)


def write_png(path: str | Path, image: np.ndarray, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write ``image`` [H, W, 3] uint8 to ``path``, whole or not at all. Raises RequestError if ``path`` exists."""
    path = Path(path)
    if not publish(path, encode_png(image, metadata)):
        raise RequestError(f"{path} already exists and is not overwritten; choose another name or remove it first")
    return path


def publish(path: Path, data: bytes) -> bool:
    """Make ``path`` a file that holds ``data``, atomically; False, with nothing changed, if ``path`` already exists.

    A kill at any moment leaves either no ``path`` or all of it, and at most a stray file that ``TEMPORARY`` matches;
    only where there are no hard links, it may leave ``path`` empty. The bytes are on the disk on return. An OSError (no
    room, read-only) leaves nothing behind.
    """
    temporary = path.with_name(TEMPORARY.replace("*", uuid.uuid4().hex))
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not _rename_exclusively(temporary, path):
            return False
        with contextlib.suppress(OSError):  # a folder cannot be synced on every system; only a power cut would show it
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _rename_exclusively(source: Path, path: Path) -> bool:
    """Give ``source`` the name ``path`` unless that exists: link() refuses a taken name, rename() would replace it."""
    try:
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            # FAT, cloud drives and bucket mounts lack hard links: take the name with an empty file, then replace that.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            try:
                os.replace(source, path)
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


def encode_png(image: np.ndarray, metadata: Mapping[str, Any] | None = None) -> bytes:
    """``image`` [H, W, 3] uint8 -> the bytes of a PNG with two texts, ``parameters`` and ``sd_jax``.

    ``metadata`` is whatever it takes to make the image again, JSON-like, under the names of the Python API (prompt,
    negative, steps, sampler, guidance, seed, model, ...). ``sd_jax`` holds all of it exactly, as ASCII JSON.
    ``parameters`` (only if there is a prompt) is for people, in the form that A1111's web UI made customary; what PNG
    text cannot carry (NUL, lone surrogates) is replaced there.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise RequestError(f"an image to write must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    texts = PngImagePlugin.PngInfo()
    if metadata is not None:
        if "prompt" in metadata:
            text = parameters_text(metadata, *image.shape[:2]).replace("\0", "\N{REPLACEMENT CHARACTER}")
            texts.add_text("parameters", text.encode("utf-8", "replace").decode())
        texts.add_text("sd_jax", json.dumps(dict(metadata), default=_jsonable))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


# A1111's label -> ours, in its order
_LABELS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "spacing",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Size": "size",
    "Model": "model",
    "Denoising strength": "strength",
}


def parameters_text(metadata: Mapping[str, Any], height: int, width: int) -> str:
    """The prompt, ``Negative prompt: ...`` if there is one, and ``Steps: 50, Sampler: plms, CFG scale: 7.5``..."""
    settings = {**metadata, "size": f"{width}x{height}"}
    lines = [str(metadata["prompt"])]
    if metadata.get("negative"):
        lines.append(f"Negative prompt: {metadata['negative']}")
    shown = ((label, settings.get(name)) for label, name in _LABELS.items())
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in shown if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """A setting as text, in JSON quotes where it holds a separator."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _jsonable(value: Any) -> Any:
    """Numpy and jax values as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# ---- reading -------------------------------------------------------------------------------------


class ImageError(RequestError):
    """A user's image that cannot be used; ``reason`` is a short code by which those who skip such images count them.

    missing, empty, format (not JPEG, PNG or WebP), corrupt (truncated, damaged), bomb (unfolds beyond the limits of
    pixels or text), size (too small or too long).
    """

    def __init__(self, message: str, reason: str = "corrupt"):
        super().__init__(message)
        self.reason = reason


def open_image(path: str | Path, *, min_side: int = 8, max_aspect: float = 20.0) -> np.ndarray:
    """The JPEG, PNG or WebP file at ``path`` as uint8 [H, W, 3]: sRGB, upright, transparency over white, first frame.

    Raises ImageError for everything else, for sides below ``min_side`` or ratios of sides above ``max_aspect``, and,
    before any pixel is decoded, for more than ``MAX_PIXELS``.
    """
    return np.array(_read_rgb(path, min_side, max_aspect, background="white"))


def open_mask(path: str | Path, *, min_side: int = 8, max_aspect: float = 20.0) -> np.ndarray:
    """The file at ``path`` as a mask, uint8 [H, W]: 255 (repaint) where it is half-way white or lighter, else 0 (keep).

    The threshold forgives the noise of a JPEG. Transparency counts as black. Errors are those of ``open_image``.
    """
    gray = np.asarray(_read_rgb(path, min_side, max_aspect, background="black").convert("L"))
    return np.where(gray >= 128, 255, 0).astype(np.uint8)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The ``metadata`` that a PNG was written with. Raises RequestError if it carries none."""
    with _opened(path, ["PNG"]) as image:
        texts = dict(image.text)
    if "sd_jax" not in texts:
        found = "only another program's parameters text" if "parameters" in texts else "no settings"
        raise RequestError(f"{path} carries {found}; expected a PNG as sd_jax wrote it, not edited or saved anew")
    try:
        metadata = json.loads(texts["sd_jax"])
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or too deep
        raise RequestError(f"the sd_jax text of {path} is not JSON ({error}); it was changed after writing") from error
    if not isinstance(metadata, dict):
        raise RequestError(f"the sd_jax text of {path} is a {type(metadata).__name__}, not an object of settings")
    return metadata


def _read_rgb(path: str | Path, min_side: int, max_aspect: float, background: str) -> Image.Image:
    with _opened(path, list(FORMATS)) as image:
        short, long = sorted(image.size)
        if short < min_side or long > max_aspect * short:
            wanted = f"both sides at least {min_side} and their ratio at most {max_aspect:g}"
            raise ImageError(f"{path} is {image.width} x {image.height} pixels; {wanted} can be used", "size")
        upright = _ORIENTATIONS.get(_exif_orientation(image))
        image = _flatten(image, background)
    return image if upright is None else image.transpose(upright)


@contextlib.contextmanager
def _opened(path: str | Path, formats: list[str]) -> Iterator[Image.Image]:
    """The image at ``path``, header read and pixels counted. Whatever decoding it then meets becomes an ImageError."""
    try:
        with _open_file(path) as file:
            image = Image.open(file, formats=formats)
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"{path} is {size} pixels; the limit is {MAX_PIXELS:,} in all", "bomb")
            if image.format == "PNG":  # decoding alone would check neither the CRC of the pixels nor the file's end
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=formats)
            yield image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path} has more than {MAX_PIXELS:,} pixels, which is the limit", "bomb") from error
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            head = file.read(64)
        for name in formats:
            if head.startswith(FORMATS[name]):
                raise ImageError(f"{path} begins like {name} but is truncated or damaged", "corrupt") from error
        found = (
            "looks like HTML, SVG or XML" if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<") else "is not an image"
        )
        raise ImageError(f"{path} {found}; expected {' or '.join(formats)}", "format") from error
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error) as error:
        if str(error).startswith(("Decompressed data too large", "Too much memory")):  # Pillow's limits on texts
            raise ImageError(f"{path} holds compressed text that unfolds to more than is safe", "bomb") from error
        raise ImageError(f"{path} is truncated or damaged ({error})", "corrupt") from error


def _open_file(path: str | Path) -> io.BufferedReader:
    try:
        status = os.stat(path)
        file = open(path, "rb") if stat.S_ISREG(status.st_mode) else None  # opening a pipe would wait for ever
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', error)}", "missing") from error
    if file is None:
        raise ImageError(f"{path} is a folder or a device, not an image file", "missing")
    if status.st_size == 0:
        file.close()
        raise ImageError(f"{path} is empty (0 bytes)", "empty")
    return file


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Any mode that the three formats can have -> RGB in sRGB, transparency composited on ``background``.

    ``convert("RGB")`` alone would show colours hidden under transparency, and saturate 16-bit gray.
    """
    alpha = None
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        colours = Image.fromarray(np.round(values / 257).astype(np.uint8))
        colours.info = {key: value for key, value in image.info.items() if key != "transparency"}
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colours = rgba.getchannel("R") if image.mode in ("L", "LA") else rgba.convert("RGB")
    elif image.mode in ("1", "P"):
        colours = image.convert("L" if image.mode == "1" else "RGB")
    else:
        image.load()
        colours = image
    colours = _to_srgb(colours)
    if alpha is None:
        return colours
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(colours, mask=alpha)
    return canvas


_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> ICC's name


def _to_srgb(image: Image.Image) -> Image.Image:
    """L, RGB or CMYK -> RGB by the embedded ICC profile; as in browsers, a broken or unfitting one is ignored."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in _COLOUR_SPACES:
        from PIL import ImageCms  # an optional part of Pillow, wanted only here

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == _COLOUR_SPACES[image.mode]:
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            return image.convert("RGB")
    return image.convert("RGB")


# EXIF's orientation tag -> what makes the image upright
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _exif_orientation(image: Image.Image) -> Any:
    """The orientation tag, or None: camera metadata too damaged to read does not spoil good pixels."""
    try:
        return image.getexif().get(0x0112)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return None
