"""Which tensor of a checkpoint is which parameter: tables of (names, path, transform) rows for each layout.

Two layouts name the same tensors: "compvis" (one file, CompVis/stable-diffusion) and "diffusers" (a folder). A table is
made of rows for whole modules ("down_blocks.0.resnets.1" is "down_0_res_1", a ``_RES``), which rows for the modules
inside refine until single tensors are left. Every transform can be undone, so a table reads and writes. Where history
left several names for one tensor, they stand in one row, separated by "|": all are read, the first is written.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.config import CLIPConfig, SDConfig, UNetConfig, VAEConfig
from sd_jax.models.clip import ACTIVATIONS, CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.types import WeightsError

COMPONENTS = ("clip", "unet", "vae")
NAMES = {"clip": "text encoder", "unet": "UNet", "vae": "autoencoder"}
LAYOUTS = ("compvis", "diffusers")
PREFIXES = {
    "clip": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}  # CompVis
# In files of whole models, but no weights: integer positions, the schedule's tables, the VAE's training loss.
POSITIONS = r".*\bposition_ids"
COMPVIS_IGNORED = (
    POSITIONS,
    r"model_ema\.(decay|num_updates)",
    r"first_stage_model\.loss\..*",
    r"(alphas_cumprod.*|betas|logvar|scale_factor|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights)",
)
# And in files of one network: the same, and the rest of CLIP.
PART_IGNORED = (
    *COMPVIS_IGNORED,
    r"loss\..*",
    r"(vision_model|vision_embed_tokens)\..*",
    r"(text|visual)_projection\.weight",
    r"logit_scale",
)
LARGEST = 1 << 20  # of the numbers in a config; v1's is its vocabulary, 49408
MOST_BLOCKS = 48  # of a network on its way down; v1's UNet has 8, SDXL's larger text tower 32 layers

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Torch's axes of a tensor <-> ours. ``shape`` is torch's, from ours; ``accepts`` are other forms it may have."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]
    accepts: Callable[[Shape], tuple[Shape, ...]] = lambda shape: ()

    def reads(self, theirs: Shape, ours: Shape) -> bool:
        return theirs == self.shape(ours) or theirs in self.accepts(ours)


def _dense(s: Shape) -> Shape:
    return s[::-1]


def _point(s: Shape) -> Shape:
    return (*s[::-1], 1, 1)


def _flat(a: np.ndarray) -> np.ndarray:
    """[out, in] or [out, in, 1, 1] -> [in, out]"""
    return a.reshape(a.shape[:2]).T


SAME = Transform(lambda a: a, lambda a: a, lambda s: s)
CONV = Transform(  # OIHW <-> HWIO
    lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1), lambda s: (s[3], s[2], s[0], s[1])
)
# A 1x1 convolution is a dense layer: old and new files differ on which of them to store.
DENSE = Transform(_flat, lambda a: a.T, _dense, lambda s: (_point(s),))
POINT = Transform(_flat, lambda a: a.T[:, :, None, None], _point, lambda s: (_dense(s),))


@dataclasses.dataclass(frozen=True)
class Row:
    names: tuple[str, ...]  # in the layout; the first is written, all are read
    path: str  # in our parameters, within the component: "down_0_res_0/conv1/kernel"
    transform: Transform


@functools.lru_cache(maxsize=32)
def table(layout: str, component: str, config: SDConfig) -> tuple[Row, ...]:
    """The rows of one component ("clip", "unet" or "vae") in one layout, one for each parameter that ``config`` has."""
    shapes = parameter_shapes(config)[component]
    modules = _TABLES[layout, component](getattr(config, component))
    return tuple(row for module in modules for row in _refine(*module) if row.path in shapes)


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: SDConfig) -> dict[str, dict[str, Shape]]:
    """component -> path -> shape of our parameters, from the modules themselves. No computation is done."""
    for component in COMPONENTS:
        _check_size(component, getattr(config, component))
    size = config.vae.factor
    image = jax.ShapeDtypeStruct((1, size, size, config.vae.image_channels), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 8, 8, config.unet.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 1, config.unet.context_width), jnp.float32)
    inputs = {
        "clip": (CLIPText(config.clip), jnp.zeros((1, 1), jnp.int32)),
        "unet": (UNet(config.unet), latents, jnp.zeros(()), context),
        "vae": (VAE(config.vae), image),
    }
    shapes = {}
    for component, (module, *args) in inputs.items():
        params = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        shapes[component] = {path: leaf.shape for path, leaf in flat.items()}
    return shapes


def _check_size(component: str, config: CLIPConfig | UNetConfig | VAEConfig) -> None:
    """A config may come from a hostile file, and tracing its networks takes time with their size."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    levels, wrong = len(values.get("widths", (0,))), []
    for name, value in values.items():
        counts = [n for n in (value if isinstance(value, tuple) else (value,)) if type(n) is int]
        wrong += [name] if not all(1 <= n <= LARGEST for n in counts) else []
    wrong += ["layers"] if "layers" not in wrong and config.layers * levels > MOST_BLOCKS else []
    wrong += ["attention"] if len(values.get("attention", (True,) * levels)) != levels else []
    wrong += ["activation"] if values.get("activation", "gelu") not in ACTIVATIONS else []
    if wrong:
        raise WeightsError(f"{component}: no network is made with such {', '.join(wrong)}; use the weights' own config")


def _refine(names: str, path: str, kind: tuple | Transform) -> Iterator[Row]:
    """A row of a module -> the rows of its tensors. Alternatives in ``names`` multiply."""
    if isinstance(kind, Transform):
        yield Row(_alternatives(names), path, kind)
        return
    for inner_names, inner_path, inner_kind in kind:
        yield from _refine(f"{names} {inner_names}", f"{path}/{inner_path}", inner_kind)


def _alternatives(names: str) -> tuple[str, ...]:
    """`a b|c` -> ("a.b", "a.c"); an empty alternative leaves its part out."""
    parts = itertools.product(*(part.split("|") for part in names.split(" ")))
    return tuple(".".join(filter(None, part)) for part in parts)


# ---- modules: (names inside, path inside, kind), kinds being such tuples or a Transform ----------------------------

_NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
_CONV = (("weight", "kernel", CONV), ("bias", "bias", SAME))
_POINT = (("weight", "kernel", POINT), ("bias", "bias", SAME))
_DENSE = (("weight", "kernel", DENSE), ("bias", "bias", SAME))
_EMBED = (("weight", "embedding", SAME),)

_CLIP_LAYER = (
    ("layer_norm1", "norm1", _NORM),
    ("self_attn.q_proj", "attention/q", _DENSE),
    ("self_attn.k_proj", "attention/k", _DENSE),
    ("self_attn.v_proj", "attention/v", _DENSE),
    ("self_attn.out_proj", "attention/out", _DENSE),
    ("layer_norm2", "norm2", _NORM),
    ("mlp.fc1", "fc1", _DENSE),
    ("mlp.fc2", "fc2", _DENSE),
)
_RES = (  # in diffusers' UNet and VAE
    ("norm1", "norm1", _NORM),
    ("conv1", "conv1", _CONV),
    ("time_emb_proj", "time", _DENSE),
    ("norm2", "norm2", _NORM),
    ("conv2", "conv2", _CONV),
    ("conv_shortcut", "skip", _POINT),
)
_RES_UNET_COMPVIS = (
    ("in_layers.0", "norm1", _NORM),
    ("in_layers.2", "conv1", _CONV),
    ("emb_layers.1", "time", _DENSE),
    ("out_layers.0", "norm2", _NORM),
    ("out_layers.3", "conv2", _CONV),
    ("skip_connection", "skip", _POINT),
)
_RES_VAE_COMPVIS = (
    ("norm1", "norm1", _NORM),
    ("conv1", "conv1", _CONV),
    ("norm2", "norm2", _NORM),
    ("conv2", "conv2", _CONV),
    ("nin_shortcut", "skip", _POINT),
)
_ATTENTION = (("to_q", "q", _DENSE), ("to_k", "k", _DENSE), ("to_v", "v", _DENSE), ("to_out.0", "out", _DENSE))
_TRANSFORMER = (  # the same in both layouts
    ("norm", "norm", _NORM),
    ("proj_in", "proj_in", _POINT),
    ("transformer_blocks.0.norm1", "norm1", _NORM),
    ("transformer_blocks.0.attn1", "self_attn", _ATTENTION),
    ("transformer_blocks.0.norm2", "norm2", _NORM),
    ("transformer_blocks.0.attn2", "cross_attn", _ATTENTION),
    ("transformer_blocks.0.norm3", "norm3", _NORM),
    ("transformer_blocks.0.ff.net.0.proj", "ff/proj_in", _DENSE),
    ("transformer_blocks.0.ff.net.2", "ff/proj_out", _DENSE),
    ("proj_out", "proj_out", _POINT),
)
_VAE_ATTENTION = (
    ("group_norm|norm", "norm", _NORM),
    ("to_q|query|q", "attention/q", _DENSE),
    ("to_k|key|k", "attention/k", _DENSE),
    ("to_v|value|v", "attention/v", _DENSE),
    ("to_out.0|proj_attn|proj_out", "attention/out", _DENSE),
)
_VAE_ATTENTION_COMPVIS = (
    ("norm|group_norm", "norm", _NORM),
    ("q|query|to_q", "attention/q", _POINT),
    ("k|key|to_k", "attention/k", _POINT),
    ("v|value|to_v", "attention/v", _POINT),
    ("proj_out|proj_attn|to_out.0", "attention/out", _POINT),
)


# ---- the modules of each component; those that a config does not have are dropped by ``table`` ---------------------


def _clip(prefix: str) -> Callable[[CLIPConfig], Iterator[tuple]]:
    """Files of v1 say "text_model." before every name; transformers no longer does."""

    def modules(c: CLIPConfig) -> Iterator[tuple]:
        yield f"{prefix} embeddings.token_embedding", "token_embedding", _EMBED
        yield f"{prefix} embeddings.position_embedding", "position_embedding", _EMBED
        for i in range(c.layers):
            yield f"{prefix} encoder.layers.{i}", f"layer_{i}", _CLIP_LAYER
        yield f"{prefix} final_layer_norm", "final_norm", _NORM

    return modules


def _unet_diffusers(c: UNetConfig) -> Iterator[tuple]:
    yield "conv_in", "conv_in", _CONV
    yield "time_embedding.linear_1", "time_embedding/fc1", _DENSE
    yield "time_embedding.linear_2", "time_embedding/fc2", _DENSE
    last = len(c.widths) - 1
    for i, j in itertools.product(range(last + 1), range(c.layers + 1)):
        yield f"down_blocks.{i}.resnets.{j}", f"down_{i}_res_{j}", _RES
        yield f"down_blocks.{i}.attentions.{j}", f"down_{i}_attn_{j}", _TRANSFORMER
        yield f"up_blocks.{last - i}.resnets.{j}", f"up_{i}_res_{j}", _RES
        yield f"up_blocks.{last - i}.attentions.{j}", f"up_{i}_attn_{j}", _TRANSFORMER
    for i in range(last + 1):
        yield f"down_blocks.{i}.downsamplers.0.conv", f"down_{i}_downsample/conv", _CONV
        yield f"up_blocks.{last - i}.upsamplers.0.conv", f"up_{i}_upsample/conv", _CONV
    yield "mid_block.resnets.0", "mid_res_0", _RES
    yield "mid_block.attentions.0", "mid_attn_0", _TRANSFORMER
    yield "mid_block.resnets.1", "mid_res_1", _RES
    yield "conv_norm_out", "norm_out", _NORM
    yield "conv_out", "conv_out", _CONV


def _unet_compvis(c: UNetConfig) -> Iterator[tuple]:
    """CompVis numbers the blocks through: conv_in is input 0, and a level ends in its downsampling."""
    unet = PREFIXES["unet"].rstrip(".")
    yield f"{unet}.input_blocks.0.0", "conv_in", _CONV
    yield f"{unet}.time_embed.0", "time_embedding/fc1", _DENSE
    yield f"{unet}.time_embed.2", "time_embedding/fc2", _DENSE
    last, per_level = len(c.widths) - 1, c.layers + 1
    for i in range(last + 1):
        for j in range(c.layers):
            n = 1 + i * per_level + j
            yield f"{unet}.input_blocks.{n}.0", f"down_{i}_res_{j}", _RES_UNET_COMPVIS
            yield f"{unet}.input_blocks.{n}.1", f"down_{i}_attn_{j}", _TRANSFORMER
        yield f"{unet}.input_blocks.{(i + 1) * per_level}.0.op", f"down_{i}_downsample/conv", _CONV
        for j in range(per_level):
            n = (last - i) * per_level + j
            yield f"{unet}.output_blocks.{n}.0", f"up_{i}_res_{j}", _RES_UNET_COMPVIS
            yield f"{unet}.output_blocks.{n}.1", f"up_{i}_attn_{j}", _TRANSFORMER
        behind = 2 if c.attention[i] else 1
        yield f"{unet}.output_blocks.{n}.{behind}.conv", f"up_{i}_upsample/conv", _CONV
    yield f"{unet}.middle_block.0", "mid_res_0", _RES_UNET_COMPVIS
    yield f"{unet}.middle_block.1", "mid_attn_0", _TRANSFORMER
    yield f"{unet}.middle_block.2", "mid_res_1", _RES_UNET_COMPVIS
    yield f"{unet}.out.0", "norm_out", _NORM
    yield f"{unet}.out.2", "conv_out", _CONV


def _vae_diffusers(c: VAEConfig) -> Iterator[tuple]:
    yield "quant_conv", "quant_conv", _POINT
    yield "post_quant_conv", "post_quant_conv", _POINT
    last = len(c.widths) - 1
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}/conv_in", _CONV
        yield f"{half}.mid_block.resnets.0", f"{half}/mid_res_0", _RES
        yield f"{half}.mid_block.attentions.0", f"{half}/mid_attn", _VAE_ATTENTION
        yield f"{half}.mid_block.resnets.1", f"{half}/mid_res_1", _RES
        yield f"{half}.conv_norm_out", f"{half}/norm_out", _NORM
        yield f"{half}.conv_out", f"{half}/conv_out", _CONV
    for i in range(last + 1):
        for j in range(c.layers + 1):
            yield f"encoder.down_blocks.{i}.resnets.{j}", f"encoder/down_{i}_res_{j}", _RES
            yield f"decoder.up_blocks.{last - i}.resnets.{j}", f"decoder/up_{i}_res_{j}", _RES
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder/down_{i}_downsample/conv", _CONV
        yield f"decoder.up_blocks.{last - i}.upsamplers.0.conv", f"decoder/up_{i}_upsample/conv", _CONV


def _vae_compvis(c: VAEConfig) -> Iterator[tuple]:
    """Unlike the UNet's, CompVis' VAE counts its decoder's levels as we do: 0 is the finest."""
    vae = PREFIXES["vae"].rstrip(".")
    yield f"{vae}.quant_conv", "quant_conv", _POINT
    yield f"{vae}.post_quant_conv", "post_quant_conv", _POINT
    for half in ("encoder", "decoder"):
        yield f"{vae}.{half}.conv_in", f"{half}/conv_in", _CONV
        yield f"{vae}.{half}.mid.block_1", f"{half}/mid_res_0", _RES_VAE_COMPVIS
        yield f"{vae}.{half}.mid.attn_1", f"{half}/mid_attn", _VAE_ATTENTION_COMPVIS
        yield f"{vae}.{half}.mid.block_2", f"{half}/mid_res_1", _RES_VAE_COMPVIS
        yield f"{vae}.{half}.norm_out", f"{half}/norm_out", _NORM
        yield f"{vae}.{half}.conv_out", f"{half}/conv_out", _CONV
    for i in range(len(c.widths)):
        for j in range(c.layers + 1):
            yield f"{vae}.encoder.down.{i}.block.{j}", f"encoder/down_{i}_res_{j}", _RES_VAE_COMPVIS
            yield f"{vae}.decoder.up.{i}.block.{j}", f"decoder/up_{i}_res_{j}", _RES_VAE_COMPVIS
        yield f"{vae}.encoder.down.{i}.downsample.conv", f"encoder/down_{i}_downsample/conv", _CONV
        yield f"{vae}.decoder.up.{i}.upsample.conv", f"decoder/up_{i}_upsample/conv", _CONV


_TABLES = {
    ("compvis", "clip"): _clip(f"{PREFIXES['clip'].rstrip('.')} text_model|"),
    ("compvis", "unet"): _unet_compvis,
    ("compvis", "vae"): _vae_compvis,
    ("diffusers", "clip"): _clip("text_model|"),
    ("diffusers", "unet"): _unet_diffusers,
    ("diffusers", "vae"): _vae_diffusers,
}
