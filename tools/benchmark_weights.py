"""How long each layout of weights takes to load and to convert, and how much memory: Markdown tables, JSON with --json.

    python -m tools.benchmark_weights                   (at the root of the repository; three quarters of an hour, 9 GB)
    python -m tools.benchmark_weights --layouts ckpt flax --to native --folder /mnt/disk --json weights.json

A random model of exactly v1-4's size is written in one layout after the other: "ckpt" (CompVis' with averaged weights
and objects of Lightning and NumPy; the plain weights are zeros of one storage), "safetensors" (CompVis'), and diffusers
folders of safetensors ("diffusers"), torch's files ("bin"), the float16 variant ("fp16") and Flax' files ("flax"), and
"native". Each is loaded, with and without its checksums being verified, beside two peers: reading the same bytes
plainly, and the library that wrote the files. Then ``sd-jax convert`` makes of it each layout that we write, as in a
user's first run: a new process, an empty cache of compiled programs. Its peer is a plain write of as many bytes.

Everything is measured in a process of its own, with the files in the system's page cache if they fit there. Seconds of
loading are the least of --repeat runs and leave out Python's imports; those of converting are of the whole command.
CPU seconds, of all threads together, say more where other programs run as well.
"identical" says that all tensors were read again, and are bit for bit what they should be. If any is not, the program
ends with status 1. Needs the ``test`` extra.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np

from sd_jax.config import NANO, SD_V1_4, SDConfig, to_diffusers
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError
from sd_jax.weights.convert import TO, write_native
from sd_jax.weights.files import FOLDERS
from sd_jax.weights.parameters import ordered
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import COMPONENTS, Row, parameter_shapes, table
from tests.random_weights import torch_tensor
from tools import benchmark

ROOT = Path(__file__).parents[1]
MODELS = {"v1-4": SD_V1_4, "nano": NANO}
LAYOUTS = ("ckpt", "safetensors", "diffusers", "bin", "fp16", "flax", "native")
BY_TORCH = ("ckpt", "bin")
SUFFIXES = {"ckpt": ".ckpt", "safetensors": ".safetensors", "native": ".safetensors", "compvis": ".safetensors"}
IDENTICAL = "identical"
CALL = """
import json, sys
from tools import benchmark_weights
print(json.dumps(getattr(benchmark_weights, sys.argv[1])(*json.loads(sys.argv[2]))))
"""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what ``argv`` asks for; prints the tables and returns what --json writes. SystemExit if values differ."""
    args = _parse(argv)
    if needed := [name for name in BY_TORCH if name in args.layouts and importlib.util.find_spec("torch") is None]:
        raise RequestError(f"{' and '.join(needed)}: torch is needed and not installed; pip install '.[test]'")
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base = Path(folder).resolve() / "base"
        write_base(MODELS[args.model], base)
        for layout in args.layouts:
            with tempfile.TemporaryDirectory(dir=base.parent) as own:
                source, options = Path(own, f"source{SUFFIXES.get(layout, '')}"), _options(layout, base)
                in_process(make, args.model, layout, str(base), str(source))
                results.append(measure_load(args, layout, source, options))
                _say(results[-1])
                for to in args.to:
                    results.append(measure_convert(layout, source, options, to, base))
                    _say(results[-1])
    command = ["python", "-m", "tools.benchmark_weights", *(sys.argv[1:] if argv is None else argv)]
    report = benchmark.make_report(command, vars(args), results)
    print(markdown(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if wrong := [_name(result) for result in results if result["tensors"] != IDENTICAL]:
        sys.exit(f"benchmark_weights: values are not what they should be: {', '.join(wrong)}")
    return report


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="v1-4", choices=MODELS, help="whose size; nano is a toy")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--to", nargs="*", default=list(TO), choices=TO, help="layouts to convert each to")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure; the system's temporary one by default")
    parser.add_argument("--repeat", type=int, default=4, help="of loading")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure_load(args: argparse.Namespace, layout: str, source: Path, options: dict[str, str]) -> dict[str, Any]:
    """Rounds of a plain read, the peer's, ours with and without verifying; then the comparison with what was drawn."""
    files = list(map(str, weight_files(source)))
    steps = {
        "plain": (read_plainly, files),
        "peer": (read_as_peer, layout, files),
        "load": (load, str(source), options, True),
        "unverified": (load, str(source), options, False),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for i in range(args.repeat):
        for name in list(steps)[:: -1 if i % 2 else 1]:  # both ways, as each finds memory as the one before left it
            runs[name].append(in_process(*steps[name]))
    seconds = {name: [run["seconds"] for run in own] for name, own in runs.items()}
    seconds["open"] = [run["open"] for run in runs["load"]]
    seconds |= {f"{name}_cpu": [run["cpu"] for run in runs[name]] for name in ("load", "unverified")}
    return {
        "what": "load",
        "layout": layout,
        "bytes": sum(map(os.path.getsize, files)),
        "params_bytes": runs["load"][0]["bytes"],
        "seconds": {name: min(own) for name, own in seconds.items()},
        "all_seconds": seconds,
        "peak": {name: max(run["peak"] for run in own) for name, own in runs.items()},
        "tensors": _verdict(in_process(unlike_drawn, args.model, layout, str(source), options)["unlike"]),
    }


def measure_convert(layout: str, source: Path, options: dict[str, str], to: str, base: Path) -> dict[str, Any]:
    """The command line in a first run, the comparison of its result with ``source``, and a plain write."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        dest = Path(folder, f"result{SUFFIXES.get(to, '')}")
        command = [sys.executable, "-m", "sd_jax", "convert", str(source), str(dest), "--to", to, *flags]
        done = run(command, XDG_CACHE_HOME=f"{folder}/cache")
        written = sum(map(os.path.getsize, weight_files(dest)))
        unlike = in_process(unlike_source, str(source), options, str(dest), _options(to, base))["unlike"]
    return {
        "what": "convert",
        "layout": layout,
        "to": to,
        "bytes": written,
        "seconds": {
            "convert": done["seconds"],
            "convert_cpu": done["cpu"],
            "disk": write_plainly(base.parent / "plain", written),
        },
        "peak": done["peak"],
        "tensors": _verdict(unlike),
    }


def run(command: list[str], **environment: str) -> dict[str, Any]:
    """-> {"output", "seconds", "cpu", "peak"} of a process. Its peak is never less than this one's, kept small."""
    with tempfile.TemporaryFile("w+") as said:
        env = os.environ | environment
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=said, text=True)
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
        seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RequestError(f"{' '.join(command)} ended with status {process.returncode}: {said.read()[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"output": output, "seconds": seconds, "cpu": cpu, "peak": benchmark.peak_rss(usage)}


def in_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a ``function`` of this module gives in a process of its own, and "peak". All in JSON."""
    done = run([sys.executable, "-c", CALL, function.__name__, json.dumps(args)])
    return {**json.loads(done["output"].splitlines()[-1]), "peak": done["peak"]}


def load(source: str, options: dict[str, str], verify: bool) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    opened = open_source(source, verify=verify, **options)
    between = time.perf_counter()
    params = flax.traverse_util.flatten_dict(opened.params(None))
    result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "open": between - start}
    return {**result, "bytes": sum(array.nbytes for array in params.values())}


def read_plainly(files: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    buffer, at = memoryview(np.empty(sum(map(os.path.getsize, files)), np.uint8)), 0
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while n := f.readinto(buffer[at:]):
                at += n
    return {"seconds": time.perf_counter() - start}


def read_as_peer(layout: str, files: list[str]) -> dict[str, Any]:
    read = _peer(layout)
    start = time.perf_counter()
    kept = [read(file) for file in files]
    return {"seconds": time.perf_counter() - start, "files": len(kept)}


def _peer(layout: str) -> Callable[[str], Any]:
    """Of one file, all tensors: torch, flax or safetensors."""
    if layout in BY_TORCH:
        import torch

        how = {"weights_only": True} if layout == "bin" else {"weights_only": False, "pickle_module": _AnyClass}
        return functools.partial(torch.load, map_location="cpu", mmap=False, **how)
    if layout == "flax":
        return lambda file: flax.serialization.msgpack_restore(Path(file).read_bytes())
    from safetensors.numpy import load_file

    return load_file


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except ImportError:  # Lightning's, which need not be installed
            return type(name, (), {})


_AnyClass = types.SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")


def write_plainly(path: Path, size: int) -> float:
    """Seconds to write ``size`` bytes and have them on the disk."""
    block = memoryview(np.random.default_rng(0).bytes(16 << 20))
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as f:
        while size > 0:
            size -= f.write(block[:size])
        os.fsync(f.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


# ---- comparing -----------------------------------------------------------------------------------------------------


def unlike_drawn(model: str, layout: str, source: str, options: dict[str, str]) -> dict[str, list[str]]:
    """The paths of parameters that are not what was drawn for them, in bits, dtype or shape."""
    parameters, unlike = open_source(source, **options).parameters, []
    for component in COMPONENTS:
        for row, array in drawn(MODELS[model], component, _dtype(layout)):
            path = f"{component}/{row.path}"
            if not _same(parameters[path].read(), row.transform.to_ours(array)):
                unlike.append(path)
    return {"unlike": unlike}


def unlike_source(source: str, options: dict[str, str], dest: str, again: dict[str, str]) -> dict[str, list[str]]:
    """The paths of parameters that differ between a model and what it was converted to."""
    one, other = open_source(source, **options).parameters, open_source(dest, **again).parameters
    return {"unlike": [path for path in one if not _same(one[path].read(), other[path].read())]}


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    bits = f"u{one.dtype.itemsize}"  # -0.0 is not 0.0
    return (one.dtype, one.shape) == (other.dtype, other.shape) and np.array_equal(one.view(bits), other.view(bits))


def _verdict(unlike: list[str]) -> str:
    return f"{len(unlike)} differ ({', '.join(unlike[:3])})" if unlike else IDENTICAL


# ---- the model in each layout --------------------------------------------------------------------------------------


def drawn(config: SDConfig, component: str, dtype: Any = np.float32) -> Iterator[tuple[Row, np.ndarray]]:
    """Random tensors, with torch's axes, and their rows in diffusers' table. They are the same in every process."""
    shapes = parameter_shapes(config)[component]
    for row in table("diffusers", component, config):
        shape = row.transform.shape(shapes[row.path])
        yield row, torch_tensor(f"{component}.{row.names[0]}", shape).astype(dtype, copy=False)


def make(model: str, layout: str, base: str, dest: str) -> dict[str, Any]:
    """Write the model, and wait for the disk. ``base`` is what a folder has beside its weights."""
    config, path = MODELS[model], Path(dest)
    if layout == "native":
        ours = {f"{c}/{row.path}": row.transform.to_ours(array) for c in COMPONENTS for row, array in drawn(config, c)}
        write_native(path, config, ours, vocabulary(config))
    elif layout in SUFFIXES:
        (_save_ckpt if layout == "ckpt" else _save_safetensors)(_compvis(config), path)
    else:
        shutil.copytree(base, path)
        for component, name in FOLDERS.items():
            _save_component(config, layout, component, path / name)
    for file in weight_files(path):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    return {}


def _save_component(config: SDConfig, layout: str, component: str, folder: Path) -> None:
    text = component == "clip"
    if layout == "flax":
        file = "flax_model.msgpack" if text else "diffusion_flax_model.msgpack"
        return _save_flax(_flax_tree(config, component), folder / file)
    tensors = {row.names[0]: array for row, array in drawn(config, component, _dtype(layout))}
    if layout == "bin":
        import torch

        file = "pytorch_model.bin" if text else "diffusion_pytorch_model.bin"
        return torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / file)
    stem = "model" if text else "diffusion_pytorch_model"
    _save_safetensors(tensors, folder / f"{stem}{'.fp16' if layout == 'fp16' else ''}.safetensors")


def write_base(config: SDConfig, folder: Path) -> None:
    """The configs and the tokenizer of a diffusers folder."""
    for name, values in to_diffusers(config).items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(values), encoding="utf-8")
    vocabulary(config).save(folder / "tokenizer")


def vocabulary(config: SDConfig) -> Tokenizer:
    """As many tokens as the model has: bytes, and pairs of them."""
    least = Tokenizer.from_merges(())
    symbols = [token for token in least.vocab if len(token) == 1]
    pairs = itertools.product(symbols, symbols)
    return Tokenizer.from_merges(tuple(itertools.islice(pairs, config.clip.vocab_size - least.vocab_size)))


def _compvis(config: SDConfig) -> dict[str, np.ndarray]:
    """All tensors of a CompVis file. Its axes are diffusers', but that a dense layer may be a 1x1 convolution there."""
    tensors = {}
    for component in COMPONENTS:
        shapes, rows = parameter_shapes(config)[component], {r.path: r for r in table("compvis", component, config)}
        for row, array in drawn(config, component):
            theirs = rows[row.path]
            tensors[theirs.names[0]] = array.reshape(theirs.transform.shape(shapes[row.path]))
    return tensors


def _save_ckpt(tensors: dict[str, np.ndarray], path: Path) -> None:
    """With the UNet's weights as the averaged ones, under the names that CompVis' LitEma gives them."""
    import torch

    from tests.lightning import save_checkpoint

    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    zeros = torch.zeros(max(state[name].numel() for name in unet))
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] for name in unet}
    plain = {name: zeros[: state[name].numel()].view(state[name].shape) for name in unet}
    others = {"model_ema.decay": torch.tensor(0.9999), "betas": torch.zeros(1000)}
    save_checkpoint(path, {**state, **plain, **averaged, **others})


def _save_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, {"format": "pt"})


def _flax_tree(config: SDConfig, component: str) -> dict[str, Any]:
    """A component as diffusers-Flax (transformers, for the text encoder) had it in memory."""
    flat = {}
    for row, array in drawn(config, component):
        ours = ordered(row.transform.to_ours(array))
        module, leaf = row.names[0].rpartition(".")[0], row.path.rpartition("/")[2]
        if component != "clip":
            module = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", module)
        flat[f"{module}.{leaf}"] = ours[None, None] if array.shape[2:] == (1, 1) else ours  # a 1x1 convolution, HWIO
    return flax.traverse_util.unflatten_dict(flat, sep=".")


def _save_flax(tree: dict[str, Any], path: Path) -> None:
    """``to_bytes(tree)``, branch by branch: whole it would need three times the memory."""
    with open(path, "wb") as f:
        f.write(msgpack.Packer().pack_map_header(len(tree)))
        for name, branch in tree.items():
            f.write(msgpack.packb(name))
            f.write(flax.serialization.to_bytes(branch))


def weight_files(path: Path) -> list[Path]:
    suffixes = (".safetensors", ".bin", ".msgpack")
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in suffixes)


def _options(layout: str, base: Path) -> dict[str, str]:
    """How a layout is opened: a CompVis file has no tokenizer, and need not have a config."""
    if layout in ("ckpt", "safetensors", "compvis"):
        return {"config": str(base)}
    return {"variant": "fp16"} if layout == "fp16" else {}


def _dtype(layout: str) -> type:
    return np.float16 if layout == "fp16" else np.float32


# ---- reporting -----------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """MB are millions of bytes."""
    loads, conversions = [], []
    for r in report["results"]:
        s, megabytes = r["seconds"], f"{r['bytes'] / 1e6:.0f}"
        if r["what"] == "load":
            numbers = [s["load"], s["open"], s["load"] - s["unverified"], s["load_cpu"] - s["unverified_cpu"]]
            numbers += [s["plain"], s["peer"], s["load"] / s["plain"], s["load"] / s["peer"]]
            peaks = [f"{(r['peak'][name] - r['params_bytes']) / 1e6:.0f}" for name in ("load", "peer")]
            loads.append([r["layout"], megabytes, *(f"{number:.2f}" for number in numbers), *peaks, r["tensors"]])
        else:
            numbers = [s["convert"], s["convert_cpu"], s["disk"], s["convert"] - s["disk"]]
            peak = f"{(r['peak'] - r['bytes']) / 1e6:.0f}"
            conversions.append([_name(r), megabytes, *(f"{number:.1f}" for number in numbers), peak, r["tensors"]])
    of_loads = ["load", "MB", "seconds", "of them opening", "verifying", "its CPU seconds", "plain read"]
    of_loads += ["peer", "/ plain", "/ peer", "peak - params (MB)", "peer's", "tensors"]
    of_conversions = ["convert", "MB", "seconds", "CPU seconds", "the disk's own", "beyond it", "peak - result (MB)"]
    of_conversions += ["tensors"]
    lines = [*benchmark.table(of_loads, loads), "", *benchmark.table(of_conversions, conversions)]
    return "\n".join([*lines, "", benchmark.where(report)])


def _name(result: dict[str, Any]) -> str:
    return f"{result['layout']} -> {result['to']}" if "to" in result else result["layout"]


def _say(result: dict[str, Any]) -> None:
    print(f"{_name(result)}: {result['seconds'][result['what']]:.3g} s, {result['tensors']}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except RequestError as error:
        sys.exit(f"benchmark_weights: {error}")
