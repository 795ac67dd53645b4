"""The networks against what torch computed, stored by ``python -m tools.record_golden``: no torch is needed here."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sd_jax.config import NANO
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from tests.random_weights import checkpoint, noise, our_params

GOLDEN = Path(__file__).parent / "golden"
MODULES = {"clip": CLIPText(NANO.clip), "unet": UNet(NANO.unet), "vae": VAE(NANO.vae)}
TOLERANCE = 1e-5  # of the largest value: float32 sums in another order; measured: at most 3e-6


@pytest.mark.parametrize("component", MODULES)
def test_networks_and_their_inner_layers_are_torch_s(component, highest):
    module, params = MODULES[component], our_params(component, NANO, checkpoint(component, NANO))
    golden = np.load(GOLDEN / f"{component}.npz")
    inputs = {name[3:]: golden[name] for name in golden.files if name.startswith("in/")}
    inner = [name[3:] for name in golden.files if name.startswith("at/")]

    @jax.jit
    def run(params, inputs):
        keep = lambda layer, _: "/".join(layer.path) in inner  # noqa: E731
        return module.apply({"params": params}, **inputs, capture_intermediates=keep, mutable=["intermediates"])

    out, state = run(params, inputs)
    errors = {}
    for path in inner:  # in the order of computation: the first that is off is the culprit
        layer = state["intermediates"]
        for part in path.split("/"):
            layer = layer[part]
        errors[path] = relative_error(layer["__call__"][0], golden[f"at/{path}"])
    errors["out"] = relative_error(out, golden["out"])
    print(component, {path: f"{error:.1e}" for path, error in errors.items()})
    assert len(errors) > 2
    assert not {path: error for path, error in errors.items() if not error <= TOLERANCE}


def relative_error(ours, theirs) -> float:
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_the_weights_are_the_same_on_every_machine():
    """If this fails, the files were recorded with other weights than these tests make."""
    np.testing.assert_array_equal(
        noise("a", (3,)), np.float32([-1.5233603715896606, 0.4887198209762573, 0.6447337865829468])
    )
    assert not np.array_equal(noise("a", (3,)), noise("b", (3,)))
    assert not np.array_equal(noise("a", (3,)), noise("a", (3,), seed=1))
    many = noise("many", (100_001,))
    assert many.dtype == np.float32 and abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
