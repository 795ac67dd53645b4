"""The flags of the command line, and nothing that takes long to import."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from sd_jax import __version__

# Flags, under the names that the Python API and the metadata of images have for them
ORIGIN = ("config", "tokenizer", "ema", "revision", "variant", "parts")
SOURCE = (*ORIGIN, "dtype", "verify")
OPTIONS = ("negative", "steps", "guidance", "rescale", "sampler", "spacing", "eta", "long_prompt")
REMEMBERED = ("model", *ORIGIN, "dtype", *OPTIONS, "seed", "height", "width", "strength", "image", "mask", "batch_size")


def parse(argv: Sequence[str], metadata: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """A command line. ``metadata`` of an image stands in for the flags and the prompt that are not given.

    The namespace has both arguments too, as ``argv`` and ``remembered``. Raises SystemExit, with status 2 after a line
    on stderr, for what is not understood.
    """
    args = _with_remembered(argv, metadata or {}, REMEMBERED)
    if metadata and args.model != metadata.get("model", args.model):  # how to read that one says nothing of another
        kept = [name for name in REMEMBERED if name not in ORIGIN]
        args = _with_remembered(argv, metadata, kept)
    if metadata and not args.prompts:
        args.prompts = [str(metadata.get("prompt", ""))]
    args.argv, args.remembered = argv, metadata or {}
    return args


def _with_remembered(argv: Sequence[str], metadata: Mapping[str, Any], names: Sequence[str]) -> argparse.Namespace:
    flags = []
    for name in names:
        if (value := metadata.get(name)) is not None and name == "parts":
            flags += [text for part in dict(value).items() for text in ("--part", *map(str, part))]
        elif value is not None:
            value = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            flags.append(f"--{name.replace('_', '-')}={value}")
    return _parser().parse_args([*argv[:1], *flags, *argv[1:]])  # the last of two flags wins


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that have a value."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


class _Parts(argparse.Action):
    """--part vae FILE --part unet FILE -> {"vae": FILE, "unet": FILE}"""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), values[0]: values[1]})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sd-jax", description="Stable Diffusion v1 in JAX", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sd_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(into: Any, name: str, text: str, *parents: argparse.ArgumentParser) -> Any:
        return into.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)

    reading, using, place, sampling = _reading_flags(), _using_flags(), _device_flag(), _sampling_flags()
    model = (reading, using, _model_flag())
    made = (*model, place, sampling, _picture_flags())
    command(commands, "txt2img", "pictures of prompts", *made)
    edit = command(commands, "img2img", "pictures of prompts, made from a picture", *made)
    edit.add_argument("--image", metavar="FILE")
    edit.add_argument("--strength", type=float, default=0.8, metavar="F", help="how much is made anew, to 1 (0.8)")
    paint = command(commands, "inpaint", "a picture repainted where a mask is white", *made)
    paint.add_argument("--image", metavar="FILE")
    paint.add_argument("--mask", metavar="FILE")
    paint.add_argument("--strength", type=float, default=1.0, metavar="F", help="how much is made anew, to 1 (1)")

    convert = command(commands, "convert", "a model in another layout", reading, using, place)
    convert.add_argument("source", metavar="SOURCE", help="tiny, a hub id, a folder or a file")
    convert.add_argument("dest", metavar="DEST", help="a folder for diffusers, else a .safetensors file")
    convert.add_argument("--to", default="native", metavar="LAYOUT", help="diffusers, compvis or native (native)")

    info = command(commands, "info", "what is in a checkpoint, and whether it is sound", reading, place)
    info.add_argument(
        "source", metavar="SOURCE", help="tiny, a hub id, a folder or a file, of a model or a part of one"
    )
    info.add_argument("--json", action="store_true", help="as JSON, with every tensor")
    info.add_argument("--tensors", action="store_true", help="list every tensor")
    info.add_argument("--probe", action="store_true", help="run the networks; do they give what was recorded?")

    train = command(commands, "train", "train, or go on with training", place)
    train.add_argument("configuration", metavar="CONFIG", help="a Python file with get_config()")
    train.add_argument("overrides", nargs="*", metavar="key.path=value")
    train.add_argument("--workdir", required=True, metavar="DIR")

    evaluate = commands.add_parser("evaluate", help="measure a model", allow_abbrev=False)
    measures = evaluate.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    text = "do pictures of coloured solids show what their captions say?"
    solids = command(measures, "compositional", text, *model, place, sampling)
    solids.add_argument("--n", type=_count, default=100, metavar="N", help="captions in each of four groups (100)")
    text = "how well do pictures of coloured solids survive the autoencoder? The ratio of signal to noise, in dB"
    pictures = command(measures, "reconstruction", text, *model, place)
    pictures.add_argument("--n", type=_count, default=256, metavar="N", help="scenes (256)")
    pictures.add_argument(
        "--seed", type=int, default=10_000, metavar="N", help="of the scenes; the model has seen 0 (10000)"
    )
    for measure in (solids, pictures):
        measure.add_argument("--batch-size", type=_count, default=32, metavar="N", help="pictures made at once (32)")
    return parser


def _flags() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False)


def _model_flag() -> argparse.ArgumentParser:
    flags = _flags()
    flags.add_argument("--model", default="tiny", metavar="M", help="tiny (default), a hub id, a folder or a file")
    return flags


def _reading_flags() -> argparse.ArgumentParser:
    flags = _flags()
    flags.add_argument("--config", metavar="C", help="of a single file: a diffusers folder or a hub id (v1-4's)")
    flags.add_argument("--tokenizer", metavar="T", help="a folder, or OpenAI's bpe_simple_vocab_16e6.txt.gz")
    flags.add_argument("--ema", type=_yes_no, metavar="yes|no", help="the averaged weights, or the others")
    flags.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    flags.add_argument("--variant", metavar="V", help="of the files of a diffusers folder: fp16, say")
    text = "do not check the SHA-256 and CRC that files have"
    flags.add_argument("--no-verify", dest="verify", action="store_false", default=None, help=text)
    return flags


def _using_flags() -> argparse.ArgumentParser:
    flags = _flags()
    text = "take a network from elsewhere: a file, a folder or a hub id"
    where = ("clip|unet|vae", "FILE")
    flags.add_argument("--part", dest="parts", action=_Parts, nargs=2, metavar=where, help=text)
    flags.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16")
    return flags


def _device_flag() -> argparse.ArgumentParser:
    flags = _flags()
    flags.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="fail rather than run elsewhere")
    return flags


def _sampling_flags() -> argparse.ArgumentParser:
    flags = _flags()
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture; the next has N + 1 (0)")
    flags.add_argument("--steps", type=int, metavar="N", help="denoising steps (50)")
    flags.add_argument("--guidance", type=float, metavar="F", help="how closely prompts are followed (7.5 for v1-4)")
    flags.add_argument("--rescale", type=float, metavar="F", help="against over-exposure by guidance, 0 to 1 (0)")
    flags.add_argument("--negative", metavar="TEXT", help="what to lead away from")
    flags.add_argument("--sampler", metavar="S", help="ddim, plms, euler_a, dpmpp_2m, ... (the model's own)")
    flags.add_argument("--spacing", metavar="S", help="leading, linspace, trailing, karras or exponential")
    flags.add_argument("--eta", type=float, metavar="F", help="noise of ddim, 0 to 1 (0)")
    flags.add_argument("--long-prompt", metavar="HOW", help="beyond 75 tokens: truncate (default), error or chunk")
    return flags


def _picture_flags() -> argparse.ArgumentParser:
    flags = _flags()
    flags.add_argument("prompts", nargs="*", metavar="PROMPT")
    flags.add_argument("--num", type=_count, default=1, metavar="N", help="pictures of each prompt (1)")
    flags.add_argument("--height", type=int, metavar="H", help="pixels (the model's own, or the picture's)")
    flags.add_argument("--width", type=int, metavar="W")
    flags.add_argument("--out", default="outputs", metavar="DIR", help="where pictures are written (outputs)")
    flags.add_argument("--grid", action="store_true", help="write one picture of all of them, too")
    flags.add_argument("--batch-size", type=_count, default=1, metavar="N", help="pictures made at once (1)")
    flags.add_argument("--from-png", metavar="FILE", help="as this picture was made; flags that are given win")
    flags.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="tell of each step (where one takes seconds); JAX then compiles anew in every run",
    )
    return flags


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
