"""Checkpoints of exactly v1-4's layout and size, of random numbers."""

import itertools

import numpy as np
import pytest

from sd_jax.config import SD_V1_4
from sd_jax.tokenizer import Tokenizer
from sd_jax.weights.tables import parameter_shapes, table

torch = pytest.importorskip("torch")


def full_vocabulary() -> Tokenizer:
    """As many tokens as CLIP's: bytes, and pairs of them."""
    symbols = [token for token in Tokenizer.from_merges(()).vocab if len(token) == 1]
    return Tokenizer.from_merges(tuple(itertools.islice(itertools.product(symbols, symbols), 48_894)))


def compvis_state(tensors: dict[str, dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The tensors of ``checkpoint`` by component, under the names and with the axes of CompVis' own files."""
    state = {}
    for component, own in tensors.items():
        shapes = parameter_shapes(SD_V1_4)[component]
        rows = {row.path: row for row in table("compvis", component, SD_V1_4)}
        for row in table("diffusers", component, SD_V1_4):
            theirs, array = rows[row.path], own[row.names[0].removeprefix("text_model.")]
            state[theirs.names[0]] = torch.from_numpy(array).reshape(theirs.transform.shape(shapes[row.path]))
    return state


def averaged_beside_plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's weights as the averaged ones, and zeros, all of one storage, in place of the plain ones."""
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    zeros = torch.zeros(max(state[name].numel() for name in unet))
    plain = {name: zeros[: state[name].numel()].view(state[name].shape) for name in unet}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] for name in unet}
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {**state, **plain, **averaged, **positions, "model_ema.decay": torch.tensor(0.9999)}
