"""A whole model in three runs: autoencoder, text tower, and all of diffusion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax import pipeline
from sd_jax.config import SDConfig, VAEConfig
from sd_jax.train import data
from sd_jax.train.config import Recipe
from sd_jax.train.loop import Log, read_start, train
from sd_jax.types import Params, RequestError

MEASURED = 1024  # pictures that the scale of the latents is measured on


def run_recipe(
    recipe: Recipe, workdir: str | Path, *, stop: Callable[[], bool] = data.never, log: Log | None = None
) -> tuple[SDConfig, Params]:
    """-> the model's configuration, with the scale that its latents turned out to need, and its parameters.

    Each run has a folder of its own in ``workdir``, and is resumed or skipped as far as it is done. Raises what
    ``loop.train`` raises.
    """
    workdir = Path(workdir)
    shared = {"data_dir": workdir / "data", "stop": stop, "log": log}

    def stage(name: str, model: SDConfig, start: Params) -> Params:
        own = {"model": model, "data": recipe.data, "init_from": recipe.init_from}
        config = dataclasses.replace(getattr(recipe, name), **own)
        if log is not None:
            log(f"{name}: {config.steps} steps")
        return train(config, workdir / name, start=start, **shared)

    unscaled = dataclasses.replace(recipe.model, vae=dataclasses.replace(recipe.model.vae, scale=1.0))
    given, tokenizer = read_start(recipe.init_from)
    if tokenizer is not None and tokenizer.vocab != data.scene_tokenizer().vocab:
        raise RequestError(
            f"{recipe.init_from} has another vocabulary than scenes; give a model of scenes as init_from"
        )
    if recipe.init_from is not None and (missing := {"clip", "unet", "vae"} - given.keys()):
        raise RequestError(f"{recipe.init_from} has no {', '.join(sorted(missing))}; give a whole model as init_from")
    start = dict(given)
    start |= stage("vae", unscaled, start)
    scale = _recorded(workdir / "scale.json", lambda: _measure(recipe, unscaled.vae, start["vae"], shared))
    model = dataclasses.replace(recipe.model, vae=dataclasses.replace(recipe.model.vae, scale=scale))
    if recipe.init_from is None:
        start |= stage("text", model, start)
    start |= stage("diffusion", model, start)
    return model, {component: start[component] for component in ("clip", "unet", "vae")}


def latent_scale(vae: VAEConfig, params: Params, images: np.ndarray, batch_size: int = 64) -> float:
    """What latents have to be multiplied with to have a standard deviation of 1 over all of uint8 ``images``.

    Rombach et al. 2022, appendix G; the posteriors' own spread counts too. ``vae.scale`` is ignored.
    """
    sd = pipeline.SD(SDConfig(vae=dataclasses.replace(vae, scale=1.0)))
    encode = jax.jit(lambda params, image: data.encode_images(sd, params, image))
    parts = [encode(params, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    mean, std = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return round(float((jnp.var(mean) + jnp.mean(std**2)) ** -0.5), 5)


def _measure(recipe: Recipe, vae: VAEConfig, params: Params, shared: dict) -> float:
    images, _ = data.load_scenes(shared["data_dir"], recipe.data, recipe.model.default_size, stop=shared["stop"])
    return latent_scale(vae, params, np.array(images[:MEASURED]))


def _recorded(path: Path, measure: Callable[[], float]) -> float:
    """Measured once, for a resumed run must not differ in the last digit."""
    if not path.exists():
        data.replace_text(path, json.dumps(measure()))
    return json.loads(path.read_text())
