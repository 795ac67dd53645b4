"""Record what torch computes with the weights of ``tests/random_weights.py``, for tests that have no torch.

    python -m tools.record_golden [FOLDER]        (at the root of the repository; FOLDER is tests/golden)

One npz a component: ``in/<argument>``, ``out``, and ``at/<path>``, the output of an inner module by its path in our
parameters, channels last. The weights are not stored: a name and a seed make them. Needs the ``test`` extra.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sd_jax.config import NANO, to_diffusers
from tests.parity.reference import build, nchw, nhwc, torch
from tests.random_weights import checkpoint, noise

# Path in our parameters -> torch's module.
INNER = {
    "clip": {"layer_0": "encoder.layers.0", "layer_1": "encoder.layers.1"},
    "unet": {
        "time_embedding": "time_embedding",
        "down_0_res_0": "down_blocks.0.resnets.0",
        "down_0_attn_0": "down_blocks.0.attentions.0",
        "down_1_downsample": "down_blocks.1.downsamplers.0",
        "mid_attn_0": "mid_block.attentions.0",
        "up_3_upsample": "up_blocks.0.upsamplers.0",
        "up_2_attn_2": "up_blocks.1.attentions.2",
        "up_0_res_2": "up_blocks.3.resnets.2",
    },
    "vae": {
        "encoder/down_0_downsample": "encoder.down_blocks.0.downsamplers.0",
        "encoder/mid_attn": "encoder.mid_block.attentions.0",
        "quant_conv": "quant_conv",
        "decoder/mid_res_1": "decoder.mid_block.resnets.1",
        "decoder/up_3_upsample": "decoder.up_blocks.0.upsamplers.0",
    },
}


def main(folder: Path) -> None:
    for component, inner in INNER.items():
        json = to_diffusers(NANO)[{"clip": "text_encoder"}.get(component, component)]
        module = build(component, json, checkpoint(component, NANO))
        seen: dict[str, np.ndarray] = {}
        for path, name in inner.items():
            module.get_submodule(name).register_forward_hook(_keep(seen, f"at/{path}"))
        inputs = _inputs(component)
        out = _RUN[component](module, **inputs)
        path = folder / f"{component}.npz"
        np.savez_compressed(path, out=out, **{f"in/{k}": v for k, v in inputs.items()}, **seen)
        print(path)


def _keep(seen: dict[str, np.ndarray], name: str):
    def hook(module, args, out) -> None:
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        seen[name] = nhwc(out) if out.ndim == 4 else out.numpy()

    return hook


def _inputs(component: str) -> dict[str, np.ndarray]:
    """In our own layout, under the names of our modules' arguments."""
    if component == "clip":
        tokens = np.random.RandomState(0).randint(0, NANO.clip.vocab_size, (2, 77), np.int32)
        tokens[0, 7:] = NANO.clip.vocab_size - 1
        return {"tokens": tokens}
    if component == "unet":
        t = np.array([981.0, 250.75], np.float32)
        return {"x": noise("x", (2, 5, 7, 4)), "t": t, "context": noise("context", (2, 77, NANO.unet.context_width))}
    return {"image": noise("image", (1, 40, 56, 3))}


def _clip(clip: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return clip(torch.from_numpy(tokens).long()).last_hidden_state.numpy()


def _unet(unet: torch.nn.Module, x: np.ndarray, t: np.ndarray, context: np.ndarray) -> np.ndarray:
    return nhwc(unet(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample)


def _vae(vae: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    return nhwc(vae.decode(vae.encode(nchw(image)).latent_dist.mean).sample)


_RUN = {"clip": _clip, "unet": _unet, "vae": _vae}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden"))
