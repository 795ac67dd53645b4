"""Train the embedded model (configs/tiny.py) and write it where ``sd_jax.load("tiny")`` finds it.

    python tools/train_tiny.py --workdir runs/tiny

Interrupted or killed, the same command goes on where it was. ``--scale 0.01`` goes through all of it in a minute of
computing, for a model that has learnt nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from sd_jax.config import SDConfig
from sd_jax.tokenizer import Tokenizer
from sd_jax.train.config import Recipe, TrainConfig, load_config
from sd_jax.train.data import Interrupted, scene_tokenizer
from sd_jax.train.loop import INTERRUPTED, signals
from sd_jax.train.recipe import run_recipe
from sd_jax.types import Params, RequestError
from sd_jax.weights.convert import write_diffusers

ROOT = Path(__file__).parents[1]
LIMIT = 24_000_000  # bytes of the whole folder

README = """\
# The embedded model of sd_jax

A small Stable Diffusion ({parameters:.1f} million parameters, float16) in the diffusers folder layout. It has the
architecture of v1-4 (CLIP text tower, UNet with cross-attention, KL autoencoder at 1/{factor}) at toy width, for
pictures of {size}x{size} pixels. It knows coloured solids in spatial relations, "a red cube on top of a blue sphere",
and nothing else.

It was trained from nothing by the project's own trainer (`sd_jax/train/`, `configs/tiny.py`) on pictures and captions
that the project renders itself (`sd_jax/train/scenes.py`): no picture, text or weight of anybody else went into it.

Licence: that of the project (see `LICENSE` at its root), for the weights as for the code.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", default=str(ROOT / "sd_jax" / "tiny"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps and scenes")
    parser.add_argument("override", nargs="*", help="key.path=value")
    args = parser.parse_args()
    try:
        recipe = load_config(ROOT / "configs" / "tiny.py", args.override)
        with signals() as stop:
            config, params = run_recipe(shortened(recipe, args.scale), args.workdir, stop=stop, log=report)
        write_model(args.out, config, params, scene_tokenizer())
    except Interrupted:
        return INTERRUPTED
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    print(args.out)
    return 0


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shortened(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with ``scale`` times the steps, and with fewer scenes if there are fewer steps."""

    def shorter(run: TrainConfig) -> TrainConfig:
        optimizer = dataclasses.replace(run.optimizer, warmup=int(run.optimizer.warmup * scale))
        return dataclasses.replace(run, steps=max(1, round(run.steps * scale)), optimizer=optimizer)

    if scale == 1:
        return recipe
    data = dataclasses.replace(recipe.data, scenes=max(64, round(recipe.data.scenes * min(scale, 1.0))))
    runs = {name: shorter(getattr(recipe, name)) for name in ("vae", "text", "diffusion")}
    return dataclasses.replace(recipe, data=data, **runs)


def write_model(folder: str | Path, config: SDConfig, params: Params, tokenizer: Tokenizer) -> None:
    """The model (``params``: clip, unet, vae) as a diffusers folder in float16, in place of what is there.

    Raises RequestError if its parameters alone are larger than what may be embedded in the package.
    """
    leaves = jax.tree.leaves({name: params[name] for name in ("clip", "unet", "vae")})
    count = sum(leaf.size for leaf in leaves)
    if 2 * count > LIMIT:
        raise RequestError(f"{count} parameters take {2 * count} bytes in float16, and {LIMIT} are allowed")
    folder = Path(folder)
    write_diffusers(folder, config, params, tokenizer, dtype="float16", overwrite=True)
    size = config.default_size
    text = README.format(parameters=count / 1e6, factor=config.vae.factor, size=size)
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
