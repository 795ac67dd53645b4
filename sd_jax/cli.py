"""The command line, ``sd-jax``: it parses, and calls the package.

Written paths go to stdout, one a line; whatever else people are to read goes to stderr. Exit status: 0 done; 2 the
request is wrong, which one sentence says, and nothing was done; 1 it failed; 75 training was interrupted, and the same
command goes on with it; 130 anything else was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_jax import __version__
from sd_jax.flags import OPTIONS, ORIGIN, SOURCE, given, parse

if TYPE_CHECKING:  # what is slow to import is imported when it is used; --help and a mistyped flag do not wait for it
    import numpy as np

    from sd_jax.pipeline import Options, Pipeline
    from sd_jax.weights.source import Report

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's -> exit status."""
    try:
        return _obey(parse(sys.argv[1:] if argv is None else argv))
    except SystemExit as exit:  # --help, --version, and flags that are not understood
        return exit.code


def _obey(args: argparse.Namespace) -> int:
    from sd_jax.types import RequestError

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            return COMMANDS[args.command](args)
        except RequestError as error:
            _say(f"error: {error}")
            return WRONG
        except KeyboardInterrupt:
            _say("interrupted; the pictures written so far are whole")
            return INTERRUPTED
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith("sd_jax."):
                raise  # a defect, here or in a library, of which a report needs the traceback
            _say(f"failed: {error}")
            return FAILED


# ---- the commands --------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    """txt2img, img2img and inpaint."""
    from sd_jax import checks
    from sd_jax.diffusion.draws import seed_words
    from sd_jax.pipeline import Options
    from sd_jax.types import RequestError

    if args.from_png is not None:
        args = _remember(args)
    if not args.prompts:
        raise RequestError("there is no prompt; give at least one text, '' for an unconditional picture")
    jobs = [(prompt, args.seed + i) for i, prompt in enumerate(p for p in args.prompts for _ in range(args.num))]
    seed_words([seed for _, seed in jobs])  # what is wrong with any of them is to be said before the first is made
    out = checks.as_folder(args.out)
    pictures, sources = _open_pictures(args)
    pipe = _load(args)
    settings = given(args, ("strength",)) | _fit(pictures, args, pipe.sd.config.vae.factor)
    options = Options(**given(args, OPTIONS)).resolved(pipe.sd.config.noise)
    for name, texts in {"prompt": args.prompts, "negative prompt": _negative(options)}.items():
        for sentence in pipe.tokenizer.encode(texts, long_prompt=options.long_prompt, name=name).warnings():
            _say(f"warning: {sentence}")

    for_grid, bad = [], 0
    for start in range(0, len(jobs), args.batch_size):
        some = jobs[start : start + args.batch_size]
        images, spoilt = _make(args, pipe, options, settings, some)
        for i, (prompt, seed) in enumerate(some):
            if i in spoilt:
                _say(f"failed: {prompt!r} with seed {seed} has NaN or infinite values, and is not written")
                bad += 1
            else:
                metadata = _metadata(args, pipe, options, prompt, seed, images[i]) | sources
                path = _write(out, images[i], seed, metadata)
                for_grid += [(path, images[i])] if args.grid else []
    if for_grid:
        _write_grid(out / f"grid-{for_grid[0][0].name}", [image for _, image in for_grid])
    if bad:
        _say(f"failed: {bad} of {len(jobs)} pictures; try --dtype float32, a lower --guidance, or check the weights")
    return FAILED if bad else DONE


def _convert(args: argparse.Namespace) -> int:
    from sd_jax import checks
    from sd_jax.progress import Bar
    from sd_jax.weights.convert import convert

    checks.as_folder(Path(args.dest).parent)
    _start_jax(args.device)
    report = convert(args.source, args.dest, to=args.to, progress=Bar("tensor", after=2.0), **given(args, SOURCE))
    for note in report.notes:
        _say(f"note: {note}")
    _say_ignored(report)
    if report.revision:
        _say(f"{args.source} at {report.revision}")
    print(args.dest)
    return DONE


def _info(args: argparse.Namespace) -> int:
    import json

    from sd_jax.weights.info import as_text, inspect

    if args.probe:
        _start_jax(args.device)
    options = given(args, ("config", "tokenizer", "ema", "revision", "variant", "verify"))
    info = inspect(args.source, run_probe=args.probe, **options)
    print(json.dumps(info, indent=2) if args.json else as_text(info, tensors=args.tensors))
    if damaged := info.get("damaged"):
        _say(f"error: {damaged[0]}" + (f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""))
        return WRONG
    if info.get("probe", {}).get("same") is False:
        _say(f"error: {args.source} does not compute what was recorded with it; fetch or convert it again")
        return WRONG
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    return {"compositional": _compositional, "reconstruction": _reconstruction}[args.measure](args)


def _reconstruction(args: argparse.Namespace) -> int:
    import numpy as np

    from sd_jax.diffusion.draws import seed_words
    from sd_jax.evaluate.reconstruction import psnr
    from sd_jax.images import to_uint8
    from sd_jax.train.scenes import dataset

    seed_words([args.seed])
    pipe = _load(args)
    images, _ = dataset(args.n, args.seed, "any", pipe.sd.config.default_size)

    def reconstruct(images: np.ndarray) -> np.ndarray:
        return np.asarray(to_uint8(pipe.decode(pipe.encode_image(images))))

    found = psnr(reconstruct, images, min(args.n, args.batch_size))
    print(f"{found.mean():.2f} dB, from {found.min():.2f} to {found.max():.2f}, over {len(found)} scenes")
    return DONE


def _compositional(args: argparse.Namespace) -> int:
    from sd_jax.evaluate.compositional import evaluate, table
    from sd_jax.train.scenes import benchmark_captions

    pipe = _load(args)
    batch, done, began = min(args.n, args.batch_size), 0, time.monotonic()

    def generate(captions: list[str], seeds: list[int]) -> np.ndarray:
        nonlocal done
        images = pipe.text_to_image(_fill(captions, batch), seeds=_fill(seeds, batch), **given(args, OPTIONS))
        done += len(captions)
        _say(f"{done} pictures, {time.monotonic() - began:.1f} s")
        return images[: len(captions)]

    print(table(evaluate(generate, benchmark_captions(args.n), args.seed, batch)))
    return DONE


def _train(args: argparse.Namespace) -> int:
    from sd_jax import checks
    from sd_jax.train.config import load_config
    from sd_jax.train.loop import run

    config = load_config(args.configuration, args.overrides)
    checks.as_folder(args.workdir)
    _say(_start_jax(args.device))
    return run(config, args.workdir, log=_say)


COMMANDS = {
    "txt2img": _generate,
    "img2img": _generate,
    "inpaint": _generate,
    "convert": _convert,
    "info": _info,
    "evaluate": _evaluate,
    "train": _train,
}

# ---- making pictures -----------------------------------------------------------------------------------------------


def _make(
    args: argparse.Namespace, pipe: Pipeline, options: Options, settings: dict[str, Any], jobs: list[tuple[str, int]]
) -> tuple[np.ndarray, list[int]]:
    """Pictures of (prompt, seed) -> (uint8 [at least one for each job, H, W, 3], the indices of those spoilt by NaN).

    It always makes ``--batch-size`` of them: one compiled program, in which a picture is the same to the last bit
    whatever it is made beside.
    """
    from sd_jax.pipeline import NotFinite
    from sd_jax.tokenizer import TruncationWarning

    method = {"txt2img": pipe.text_to_image, "img2img": pipe.image_to_image, "inpaint": pipe.inpaint}[args.command]
    began = time.monotonic()
    prompts, seeds = (_fill(column, args.batch_size) for column in zip(*jobs, strict=True))
    settings = settings | vars(options) | {"seeds": seeds, "progress": args.progress}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # said already, once and by the number on the command line
        try:
            images, spoilt = method(prompts, **settings), []
        except NotFinite as error:
            images, spoilt = error.images, error.bad
    _say(f"seed {', '.join(str(seed) for _, seed in jobs)}: {time.monotonic() - began:.1f} s")
    return images, spoilt


def _fill(values: Sequence[Any], count: int) -> list[Any]:
    """``values``, the last one repeated until there are ``count``."""
    return [*values, *[values[-1]] * (count - len(values))]


def _remember(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with those that --from-png has in its metadata and the command line has not."""
    from sd_jax.images import read_metadata
    from sd_jax.types import RequestError

    metadata = read_metadata(args.from_png)
    if "command" not in metadata:
        raise RequestError(f"{args.from_png} was not made by this command line; give its settings as flags")
    if metadata["command"] != args.command:
        raise RequestError(f"{args.from_png} was made by {metadata['command']}; use that instead of {args.command}")
    return parse(args.argv, metadata)


def _open_pictures(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """-> (pixels of --image and --mask, what the metadata says of them)."""
    from sd_jax import images as im
    from sd_jax.types import RequestError

    pictures, sources = {}, {}
    for name, read in (("image", im.open_image), ("mask", im.open_mask)):
        if not hasattr(args, name):
            continue
        if (path := getattr(args, name)) is None:
            raise RequestError(f"--{name} is missing; give a JPEG, PNG or WebP file")
        pictures[f"{name}s"] = read(path)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if args.remembered.get(name) == path and args.remembered.get(f"{name}_sha256") != digest:
            raise RequestError(f"{path} has changed since {args.from_png} was made of it; give the old one as --{name}")
        sources |= {name: path, f"{name}_sha256": digest}
    if "masks" in pictures and pictures["masks"].shape != pictures["images"].shape[:2]:
        mask, image = ("{1} x {0}".format(*pictures[name].shape) for name in ("masks", "images"))
        raise RequestError(f"{args.mask} is {mask} pixels and {args.image} {image}; give both the same size")
    return pictures, sources


def _fit(pictures: dict[str, np.ndarray], args: argparse.Namespace, factor: int) -> dict[str, Any]:
    """The pictures, fitted to --height and --width or the next smaller size that the model takes; or just the flags."""
    from sd_jax import checks
    from sd_jax import images as im

    if not pictures:
        return given(args, ("height", "width"))
    own = pictures["images"].shape[:2]
    height, width = (
        max(side // factor, 1) * factor if asked is None else asked
        for asked, side in zip((args.height, args.width), own, strict=True)
    )
    checks.side("height", height, factor)
    checks.side("width", width, factor)
    if (height, width) != own:
        _say(f"note: {args.image} is {own[1]} x {own[0]} pixels, and is fitted to {width} x {height}")
    return {name: im.fit(picture, height, width) for name, picture in pictures.items()}


def _metadata(
    args: argparse.Namespace, pipe: Pipeline, options: Options, prompt: str, seed: int, image: np.ndarray
) -> dict[str, Any]:
    """All it takes to make the picture again (``--from-png``), and what of the prompts was not read."""
    metadata = {"command": args.command, "prompt": prompt, "seed": seed, "version": __version__}
    metadata |= given(args, ("model", *ORIGIN, "strength", "batch_size"))
    metadata |= {"revision": pipe.report.revision, "ema": pipe.report.ema, "dtype": pipe.sd.dtype}
    metadata |= {name: getattr(options, name) for name in OPTIONS}
    metadata |= {"height": image.shape[0], "width": image.shape[1]}
    for name, text in {"dropped": prompt, "negative_dropped": _negative(options)}.items():
        metadata[name] = pipe.tokenizer.encode(text, long_prompt=options.long_prompt).dropped[0] or None
    return {name: value for name, value in metadata.items() if value is not None}


def _negative(options: Options) -> str:
    """The negative prompt that is read: none without guidance."""
    return "" if options.guidance == 1 else options.negative


def _write(out: Path, image: np.ndarray, seed: int, metadata: dict[str, Any]) -> Path:
    from sd_jax import images as im

    path = im.write_numbered(out, image, seed, metadata)
    print(path, flush=True)
    return path


def _write_grid(path: Path, images: list[np.ndarray]) -> None:
    import numpy as np

    from sd_jax import images as im

    print(im.write_png(path, im.grid(np.stack(images))), flush=True)


# ---- starting ------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> Pipeline:
    """The model. A banner says what runs where; the licence's notice is given once."""
    devices = _start_jax(args.device)
    from sd_jax.pipeline import LicenceNotice, load

    with warnings.catch_warnings(record=True) as caught:
        pipe = load(args.model, **given(args, SOURCE))
    for warning in caught:
        if not issubclass(warning.category, LicenceNotice) or _first_time("licence-notice"):
            _say(f"warning: {warning.message}")
    _say_ignored(pipe.report)
    for component, part in pipe.report.parts:
        _say(f"note: its {component} is from {part}")
    commit = f" at {pipe.report.revision}" if pipe.report.revision else ""
    _say(f"{args.model}{commit} in {pipe.sd.dtype} on {devices}, from seed {args.seed}")
    return pipe


def _start_jax(device: str | None) -> str:
    """Start the backend, with compiled programs kept between runs -> its devices, in words.

    Raises RequestError if ``device`` was asked for and is not there: nothing runs on a CPU unknown to the user.
    """
    import jax

    from sd_jax.types import RequestError

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        found, count = jax.default_backend(), jax.device_count()
    except (RuntimeError, AssertionError) as error:  # the second is jax's answer to JAX_PLATFORMS=cuda without a GPU
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        asked = os.environ.get("JAX_PLATFORMS")
        advice = "set JAX_PLATFORMS=cpu" if not asked else f"JAX_PLATFORMS is {asked!r}, unset it"
        raise RequestError(f"JAX cannot start its device ({reason}); {advice} for a CPU") from error
    if device not in (None, found):
        raise RequestError(
            f"--device {device}: JAX finds no {device} here, only a {found}; install the JAX that is made for it (and "
            "unset JAX_PLATFORMS), or leave --device out"
        )
    if (folder := _cache_folder()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return f"{count} {found} device{'s' if count > 1 else ''}"


def _cache_folder() -> Path | None:
    """Where compiled programs are kept; None where there is no home, or it cannot be written to."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base, "sd_jax")
    if not folder.is_absolute():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _first_time(what: str) -> bool:
    """False once it was called with ``what``, by this or an earlier run, as far as that could be written down."""
    folder = _cache_folder()
    if folder is None:
        return True
    try:
        (folder / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


# ---- talking -------------------------------------------------------------------------------------------------------


def _say_ignored(report: Report) -> None:
    """What a file holds besides weights, none of which was used."""
    for what, names in {
        "left out, as it is not needed": report.ignored,
        "named in its pickle, and not run": report.foreign,
    }.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            _say(f"note: {what}: {', '.join(names[:8])}{more}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
