"""The referee: diffusers' and transformers' torch modules with the weights of ``random_weights.checkpoint``."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sd_jax.config import NANO, SDConfig, to_diffusers
from tests.random_weights import checkpoint, our_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def build(component: str, json: dict, tensors: dict[str, np.ndarray]) -> torch.nn.Module:
    """The torch module of a component's JSON. It shares the memory of ``tensors``, which must be all its parameters."""
    with torch.device("meta"):  # no default initialisation: at full size it takes minutes
        if component == "clip":
            module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**json))
        else:
            kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[component]
            module = kind.from_config(json)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in tensors.items()}, strict=True, assign=True)
    if component == "clip":
        module.embeddings.position_ids = torch.arange(json["max_position_embeddings"])[None]  # not a parameter
    return module.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model twice: torch's module, and our parameters of the same weights."""

    config: SDConfig
    torch: torch.nn.Module
    params: dict

    def inner(self, path: str) -> dict:
        """Our parameters below ``path``, "down_0_res_0" for one."""
        params = self.params
        for part in path.split("/"):
            params = params[part]
        return params


def pair(component: str, config: SDConfig = NANO) -> Pair:
    tensors = checkpoint(component, config)
    json = to_diffusers(config)[{"clip": "text_encoder"}.get(component, component)]
    return Pair(config, build(component, json, tensors), our_params(component, config, tensors))


def run(module, params: dict, *args, **kwargs):
    """Our module, compiled, in float32 with exact products."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, args: module.apply({"params": params}, *args, **kwargs))(params, args)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, -3)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), -3, -1)


def assert_close(name: str, ours, theirs: np.ndarray, tolerance: float) -> None:
    """Largest error against the largest value of the reference; printed, for ``pytest -rP``."""
    assert ours.shape == theirs.shape
    error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    print(f"{name}: {error:.2e}")
    assert error <= tolerance, f"{name}: {error:.2e} of the reference's largest value, {tolerance:.0e} allowed"


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    """uint8, and float in [0, 1] as diffusers gives them.

    Some guided steps of float32 in another order: a value that lies on the edge of two levels may fall either way.
    """
    theirs = np.round(theirs * 255).astype(np.uint8)
    assert ours.shape == theirs.shape and theirs.std() > 10
    difference = np.abs(ours.astype(int) - theirs)
    print(f"{(difference > 0).mean():.2%} of the values differ, by {difference.max()} at most")
    assert difference.max() <= 2 and (difference > 0).mean() <= 1e-3
