"""Checkpoints of other models, recognised by their names and shapes, so that an error can say what a file is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sd_jax.config import SD_V1_4, SDConfig
from sd_jax.weights.parameters import Tensor
from sd_jax.weights.tables import Shape

_CROSS = (  # a cross-attention key projection: its second axis is the width of the context
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)
_PART = "not a whole model; give that one, and this with --part {} (parts=)"
_CONV_IN = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Names and shapes of a file's tensors -> what other model they are, in words and with the way out, or None."""

    def any_with(*parts: str) -> bool:
        return any(part in name for name in shapes for part in parts)

    base = any_with("diffusion_model.input_blocks", "down_blocks.0.resnets", "/conv_in/kernel", "diffusion_modelinput")
    if any_with("joint_blocks.", "double_blocks.", "single_transformer_blocks."):
        return "a diffusion transformer (Stable Diffusion 3 or Flux), which sd_jax does not run"
    if any_with("conditioner.embedders.", "add_embedding.linear_1", "diffusion_model.label_emb."):
        return "Stable Diffusion XL, which sd_jax does not run; use a v1 model"
    if not base and any_with("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "hada_w1", "lokr_w1"):
        return "a LoRA alone, not a model; load the model it was made for, and apply it to that"
    if any_with("control_model.", "controlnet_cond_embedding", "controlnet_down_blocks"):
        return "a ControlNet, which sd_jax does not run"
    width = next((shapes[name][1] for name in _CROSS if len(shapes.get(name, ())) > 1), None)
    if width == 1024 or any_with("cond_stage_model.model."):
        return "Stable Diffusion 2, whose text encoder is another; use a v1 model"
    if width == 2048:
        return "Stable Diffusion XL, which sd_jax does not run; use a v1 model"
    channels = next((shapes[name][1] for name in _CONV_IN if len(shapes.get(name, ())) == 4), None)
    if channels == 8 and base:
        return "InstructPix2Pix (8 input channels), which sd_jax does not run"
    words = all("." not in name for name in shapes) and {shape[-1:] for shape in shapes.values()} == {(768,)}
    if words or any_with("string_to_param", "emb_params"):
        return "a textual inversion embedding alone, not a model"
    if any_with("first_stage_model.") and not base:
        return f"an autoencoder alone, {_PART.format('vae')}"
    if any(name.startswith(("encoder.conv_in.", "decoder.conv_in.")) for name in shapes):
        return f"an autoencoder alone, {_PART.format('vae')}"
    if any(name.startswith(("text_model.", "embeddings.token")) for name in shapes):
        return f"a text encoder alone, {_PART.format('clip')}"
    if any(name.startswith("down_blocks.") for name in shapes):
        return f"a diffusers UNet alone, {_PART.format('unet')}"
    return None


def recognise_config(model_index: Mapping[str, Any], unet: Mapping[str, Any]) -> str | None:
    """The same for a diffusers folder, from its JSON files."""
    if "XL" in str(model_index.get("_class_name")) or unet.get("cross_attention_dim") == 2048:
        return "Stable Diffusion XL, which sd_jax does not run; use a v1 model"
    if unet.get("cross_attention_dim") == 1024:
        return "Stable Diffusion 2, whose text encoder is another; use a v1 model"
    if unet.get("in_channels") == 8:
        return "InstructPix2Pix (8 input channels), which sd_jax does not run"
    return None


def v1_config(tensors: Mapping[str, Tensor]) -> SDConfig:
    """v1-4's; or the inpainting model's, to whose UNet a mask and the latents of the masked image come along."""
    inputs = {tuple(tensors[name].shape)[1:2] for name in _CONV_IN if name in tensors}
    if inputs != {(9,)}:
        return SD_V1_4
    return dataclasses.replace(SD_V1_4, unet=dataclasses.replace(SD_V1_4.unet, in_channels=9))
