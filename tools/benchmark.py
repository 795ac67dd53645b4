"""How long text-to-image and its parts take here, and how much memory: a Markdown table, and JSON with --json.

    python tools/benchmark.py
    python tools/benchmark.py --model v1-4-random --what txt2img unet decode text --batch 8 --dtype bfloat16
    python tools/benchmark.py --what first

What can be measured: "txt2img" (seeds and tokens to pixels), "unet" (one guided evaluation), "encode", "decode",
"text" (the text tower), and "first", the first picture of a fresh process. Each program is compiled twice: cold, and
traced anew with the compiled program read from JAX's cache on disk. Seconds are the median of --repeat runs after one
that is not counted. Peak memory is that of this process up to then, so for one part's own measure it alone.
Loading and converting weights is measured by tools/benchmark_weights.py.

"v1-4-random" is a model of exactly v1-4's size with random parameters, for which nothing needs to be downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from sd_jax import checks, pipeline
from sd_jax import images as im
from sd_jax.config import SD_V1_4, SDConfig
from sd_jax.diffusion import draws
from sd_jax.types import Params, RequestError
from sd_jax.weights.tables import parameter_shapes

MIB = 2**20
PROMPT = "a red cube on top of a blue sphere"
GUIDANCE = 7.5
PARTS = ("txt2img", "unet", "text", "encode", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to measure: ``function(*args)``, jitted, makes ``batch`` results."""

    name: str
    batch: int
    function: Callable[..., Any]
    args: tuple[Any, ...]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what ``argv`` asks for; prints the table and returns what --json writes."""
    args = _parse(argv)
    results = []
    if "first" in args.what:  # before this process takes the device, which two cannot always share
        results += first_picture(args)
    if others := [name for name in args.what if name != "first"]:
        sd, params = open_model(args.model, args.dtype)
        args.size = args.size or [sd.config.default_size] * 2
        for name, side in zip(("height", "width"), args.size, strict=True):
            checks.side(name, side, sd.config.vae.factor)
        args.dtype = sd.dtype
        for name in others:
            results.append(measure(make_case(name, sd, params, args), args.repeat))
            print(f"{name}: {results[-1]['seconds']['median']:.4g} s", file=sys.stderr)
    command = ["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    report = make_report(command, vars(args), results)
    print(markdown(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, v1-4-random, or anything that sd_jax.load takes")
    parser.add_argument("--what", nargs="+", default=["txt2img"], choices=[*PARTS, "first"])
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels; the model's by default")
    parser.add_argument("--dtype", choices=pipeline.DTYPES, help="of the computation; that of sd_jax.load by default")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


# ---- models --------------------------------------------------------------------------------------------------------


def open_model(model: str, dtype: str | None) -> tuple[pipeline.SD, Params]:
    if model != "v1-4-random":
        pipe = pipeline.load(model, dtype=dtype)
        return pipe.sd, pipe.params
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return pipeline.SD(SD_V1_4, dtype), random_params(SD_V1_4)


def random_params(config: SDConfig) -> Params:
    """float32 parameters that keep activations of order one, drawn on the host: an initialiser would be compiled."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        kind = path.rpartition("/")[2]
        if kind in ("bias", "scale"):
            return jax.device_put(np.full(shape, kind == "scale", np.float32))
        fan_in = np.prod(shape[:-1]) if kind == "kernel" else shape[-1]
        return jax.device_put(rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5))

    shapes = {f"{c}/{path}": shape for c, paths in parameter_shapes(config).items() for path, shape in paths.items()}
    return flax.traverse_util.unflatten_dict({path: draw(path, shape) for path, shape in shapes.items()}, sep="/")


# ---- what is measured ----------------------------------------------------------------------------------------------


def make_case(name: str, sd: pipeline.SD, params: Params, args: argparse.Namespace) -> Case:
    """One of PARTS for ``args.batch`` images. What the inputs hold costs nothing, so most of them are noise."""
    b, size, c = args.batch, tuple(args.size), sd.config
    grid = tuple(side // c.vae.factor for side in size)
    tokens = np.ones((b, 2, 1, c.clip.positions), np.int32)
    match name:
        case "txt2img":
            plan = pipeline.make_plan(c.noise, args.steps)
            rows = (plan, tokens, draws.seed_words(range(b)), np.full(b, GUIDANCE, np.float32))
            return Case(name, b, lambda *a: im.to_uint8(pipeline.text_to_image(sd, *a, size=size)), (params, *rows))
        case "unet":
            x, context = _noise(b, 2, *grid, c.unet.in_channels), _noise(b, 2, c.clip.positions, c.unet.context_width)
            return Case(name, b, lambda p, *a: sd.unet.apply({"params": p}, *a), (params["unet"], x, 500.0, context))
        case "text":
            return Case(name, b, lambda p, a: pipeline.encode_tokens(sd, {"clip": p}, a), (params["clip"], tokens))
        case "encode":
            image = np.tanh(_noise(b, *size, c.vae.image_channels))
            return Case(name, b, lambda p, a: pipeline.encode_image(sd, {"vae": p}, a), (params["vae"], image))
        case "decode":
            latents = _noise(b, *grid, c.vae.latent_channels)
            return Case(name, b, lambda p, a: pipeline.decode(sd, {"vae": p}, a), (params["vae"], latents))
    raise ValueError(f"{name!r} is none of {PARTS}")


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, repeat: int) -> dict[str, Any]:
    """Compile twice, run ``1 + repeat`` times. Seconds, results a second, and bytes of memory."""
    args = jax.block_until_ready(jax.device_put(case.args))
    with tempfile.TemporaryDirectory() as folder, cache_at(folder):
        _, cold = _compile(case, args)
        compiled, warm = _compile(case, args)
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    compile = {"cold": cold, "warm": warm, "warm_is": "traced anew, program from the cache on disk"}
    memory = {"program": _program_memory(compiled), **peaks()}
    return {**_result(case.name, case.batch, seconds), "compile": compile, "memory": memory}


def _result(what: str, batch: int, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    spread = {"median": median, "min": min(seconds), "max": max(seconds), "all": seconds}
    return {"what": what, "batch": batch, "seconds": spread, "per_second": batch / median}


def _compile(case: Case, args: tuple[Any, ...]) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The compiled program, and seconds. A new function each time, whose trace JAX cannot know yet."""
    start = time.perf_counter()
    lowered = jax.jit(lambda *args: case.function(*args)).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {"trace": traced - start, "compile": time.perf_counter() - traced}


@contextlib.contextmanager
def cache_at(folder: str) -> Iterator[None]:
    """JAX's compilation cache, of every program, in ``folder`` and nowhere else; put back as it was afterwards."""
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def apply(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # the folder is looked at once otherwise

    apply(settings)
    try:
        yield
    finally:
        apply(before)


def first_picture(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall seconds of ``python -m sd_jax txt2img`` from start to end: with an empty compilation cache, then again.

    The peak memory of the second is that of the larger of the two.
    """
    if args.model == "v1-4-random":
        raise RequestError("--what first runs the command line, which has no model v1-4-random; give one on disk")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sd_jax", "txt2img", PROMPT, "--model", args.model, "--steps", str(args.steps)]
        command += ["--num", str(args.batch), "--batch-size", str(args.batch), "--out", f"{folder}/images"]
        command += ["--dtype", args.dtype] if args.dtype else []
        command += ["--height", str(args.size[0]), "--width", str(args.size[1])] if args.size else []
        # The command line keeps programs below XDG_CACHE_HOME; the hub's files are to be found where they are.
        caches = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
        environment = {"HF_HOME": f"{caches}/huggingface", **os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        for what in ("first, empty cache", "first, warm cache"):
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            memory = {"process_peak": peak_rss(resource.getrusage(resource.RUSAGE_CHILDREN))}
            results.append({**_result(what, args.batch, [seconds]), "memory": memory})
    return results


def peaks() -> dict[str, int]:
    """Bytes: the most that this process held of the host's memory and, where the device counts it, of the device's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    device = {"device_peak": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    return {"process_peak": peak_rss(resource.getrusage(resource.RUSAGE_SELF)), **device}


def peak_rss(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _program_memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """The compiler's own account, in bytes, where the backend gives one."""
    analysis = compiled.memory_analysis()
    parts = ("argument", "output", "temp", "generated_code")
    return analysis and {part: getattr(analysis, f"{part}_size_in_bytes") for part in parts}


# ---- reporting -----------------------------------------------------------------------------------------------------


def make_report(command: list[str], settings: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": shlex.join(command),
        "settings": settings,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("sd_jax", "jax", "jaxlib", "flax")},
        "results": results,
    }


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def markdown(report: dict[str, Any]) -> str:
    columns = ["what", "batch", "compile cold / warm (s)", "median (s)", "min - max (s)", "a second", "peak (MiB)"]
    rows = []
    for result in report["results"]:
        compile = [sum(result["compile"][k].values()) for k in ("cold", "warm")] if "compile" in result else []
        seconds, memory = result["seconds"], result["memory"]
        cells = [
            result["what"],
            str(result["batch"]),
            " / ".join(f"{value:.1f}" for value in compile),
            f"{seconds['median']:.4g}",
            f"{seconds['min']:.4g} - {seconds['max']:.4g}",
            f"{result['per_second']:.3g}",
            f"{memory.get('device_peak', memory['process_peak']) / MIB:.0f}",
        ]
        rows.append(cells)
    return "\n".join([*table(columns, rows), "", where(report)])


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def where(report: dict[str, Any]) -> str:
    at, versions = report["machine"], report["versions"]
    return f"`{report['command']}` on {at['devices']} x {at['device']} ({at['backend']}), jax {versions['jax']}"


if __name__ == "__main__":
    try:
        main()
    except RequestError as error:
        sys.exit(f"benchmark: {error}")
