"""Configs from and to the JSON files of a diffusers folder."""

import dataclasses

import pytest

from sd_jax.config import NANO, SD_V1_4, NoiseConfig, UNetConfig, from_diffusers, to_diffusers
from sd_jax.types import RequestError

# The files of CompVis/stable-diffusion-v1-4 at the hub.
V1_4 = {
    "text_encoder": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.21.0.dev0",
        "vocab_size": 49408,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
}


def test_the_files_of_v1_4_are_sd_v1_4():
    assert from_diffusers(**V1_4) == SD_V1_4 == from_diffusers()
    assert SD_V1_4.default_size == 512 and SD_V1_4.vae.factor == 8


@pytest.mark.parametrize("part", V1_4)
def test_our_files_of_v1_4_agree_with_the_released_ones(part):
    ours = to_diffusers(SD_V1_4)[part]
    apart = {k: (v, ours[k]) for k, v in V1_4[part].items() if k in ours and ours[k] != v}
    # The released text encoder's file has transformers' old, wrong numbers of the special tokens.
    assert apart.keys() <= {"_diffusers_version", "bos_token_id", "eos_token_id", "pad_token_id"}


def noise(**changes):
    return dataclasses.replace(SD_V1_4, noise=NoiseConfig(**changes))


@pytest.mark.parametrize(
    "config",
    [
        SD_V1_4,
        NANO,
        dataclasses.replace(NANO, unet=UNetConfig(widths=(32, 64), attention=(True, True), heads=(1, 2), groups=8)),
        dataclasses.replace(SD_V1_4, unet=UNetConfig(in_channels=9)),
        dataclasses.replace(SD_V1_4, clip=dataclasses.replace(SD_V1_4.clip, activation="gelu")),
        dataclasses.replace(SD_V1_4, vae=dataclasses.replace(SD_V1_4.vae, scale=0.91)),
        noise(sampler="ddim", spacing="trailing", guidance=3.0, final_alpha_one=True, prediction="v_prediction"),
        noise(sampler="dpmpp_2m_sde", spacing="karras", beta_schedule="linear"),
        noise(sampler="euler", spacing="exponential", steps_offset=0),
    ],
    ids=["v1-4", "nano", "heads", "inpainting", "gelu", "scale", "ddim", "dpmpp_2m_sde", "euler"],
)
def test_round_trip(config):
    assert from_diffusers(**to_diffusers(config)) == config
    assert hash(config) is not None  # configs are static arguments under jit


@pytest.mark.parametrize(
    "part, setting",
    [
        ("unet", {"use_linear_projection": True}),  # Stable Diffusion 2
        ("unet", {"addition_embed_type": "text_time"}),  # SDXL
        ("unet", {"transformer_layers_per_block": [1, 2, 10]}),
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}),
        ("unet", {"freq_shift": 1}),
        ("unet", {"flip_sin_to_cos": False}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"shift_factor": 0.1}),
        ("scheduler", {"rescale_betas_zero_snr": True}),
        ("scheduler", {"use_beta_sigmas": True}),
        ("scheduler", {"prediction_type": "sample"}),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("scheduler", {"skip_prk_steps": False}),
        ("scheduler", {"algorithm_type": "dpmsolver", "_class_name": "DPMSolverMultistepScheduler"}),
        ("scheduler", {"solver_order": 3, "_class_name": "UniPCMultistepScheduler"}),
        ("scheduler", {"variance_type": "learned", "_class_name": "DDPMScheduler"}),
        ("text_encoder", {"hidden_act": "relu"}),
    ],
)
def test_what_v1_does_not_have_is_refused_by_name(part, setting):
    (name, value), *_ = setting.items()
    with pytest.raises(RequestError) as refusal:
        from_diffusers(**{part: V1_4[part] | setting})
    assert part in str(refusal.value) and str(value) in str(refusal.value)
    assert name in str(refusal.value) or name == "_class_name"


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(RequestError, match="freq_shift.*use_linear_projection"):
        from_diffusers(unet=V1_4["unet"] | {"use_linear_projection": True, "freq_shift": 1})


@pytest.mark.parametrize(
    "part, setting, named",
    [
        ("unet", {"block_out_channels": 320}, "not laid out"),
        ("unet", {"down_block_types": None}, "not laid out"),
        ("unet", {"sample_size": [64, 64]}, r"sample_size \[64, 64\]"),
        ("unet", {"norm_eps": "1e-5", "layers_per_block": -2}, "layers -2, eps '1e-5'"),
        ("unet", {"attention_head_dim": [8, 8]}, "2 numbers of heads for 4 widths"),
        ("unet", {"attention_head_dim": 7}, "width 320 in 7 heads"),
        ("unet", {"norm_num_groups": 0}, "width 320 in 0 groups"),
        ("vae", {"norm_num_groups": 48}, "width 128 in 48 groups"),
        ("vae", {"scaling_factor": float("nan")}, "scale nan"),
        ("text_encoder", {"num_attention_heads": 7}, "width 768 in 7 heads"),
        ("text_encoder", {"text_config": []}, "not laid out"),
        ("scheduler", {"num_train_timesteps": 1000.5}, "train_steps 1000.5"),
        ("scheduler", {"timestep_spacing": 3}, "spacing 3"),
        ("scheduler", {"_class_name": []}, "not laid out"),
    ],
)
def test_values_that_make_no_network_are_named(part, setting, named):
    with pytest.raises(RequestError, match=f"{part}: .*{named}"):
        from_diffusers(**{part: V1_4[part] | setting})


@pytest.mark.parametrize(
    "changes",
    [
        {"down_block_types": ["AttnDownBlock2D"] * 4},
        {"up_block_types": ["CrossAttnUpBlock2D"] * 4},  # not the mirror of the way down
        {"block_out_channels": [320, 640]},
    ],
)
def test_other_blocks_are_refused(changes):
    with pytest.raises(RequestError, match="down_block_types"):
        from_diffusers(unet=V1_4["unet"] | changes)


def test_heads_may_go_by_their_right_name_or_be_given_by_level():
    assert from_diffusers(unet=V1_4["unet"] | {"num_attention_heads": 4}).unet.heads == (4,) * 4
    assert from_diffusers(unet=V1_4["unet"] | {"attention_head_dim": [1, 2, 4, 8]}).unet.heads == (1, 2, 4, 8)


def test_a_text_config_inside_a_whole_clip_s_is_found():
    assert from_diffusers(text_encoder={"text_config": V1_4["text_encoder"], "vision_config": {}}).clip == SD_V1_4.clip


def test_ours_is_read_by_diffusers_itself():
    """What diffusers builds from our files has v1-4's shape, with no setting it would ignore."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            _, unused = kind.from_config(to_diffusers(NANO)[part], return_unused_kwargs=True)
            assert not {k for k in unused if not k.startswith("_")}
