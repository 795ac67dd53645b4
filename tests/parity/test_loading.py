"""Weights cross the border to torch and back: diffusers and transformers as the referee, on random weights of NANO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sd_jax.config import NANO, to_diffusers
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.tokenizer import Tokenizer
from sd_jax.weights.convert import write_compvis, write_diffusers
from sd_jax.weights.source import open_source

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOKENIZER = Tokenizer.from_merges(())
TOLERANCE = 3e-5  # float32 sums of a few hundred terms, in another order, through a dozen layers


@pytest.fixture(scope="module")
def modules():
    """Torch modules as a trainer would have made them."""
    torch.manual_seed(0)
    jsons = to_diffusers(NANO)
    clip = {k: v for k, v in jsons["text_encoder"].items() if k not in ("architectures", "model_type")}
    modules = {
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip)),
        "unet": diffusers.UNet2DConditionModel.from_config(jsons["unet"]),
        "vae": diffusers.AutoencoderKL.from_config(jsons["vae"]),
    }
    for module in modules.values():
        module.eval()
        for parameter in module.parameters():  # norms too: ones and zeros would hide a swap
            torch.nn.init.normal_(parameter, 0.2 if parameter.ndim == 1 else 0.0, 0.1)
    return modules


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 514, (2, 77)),
        "x": rng.standard_normal((2, 8, 8, 4), np.float32),
        "context": rng.standard_normal((2, 77, 32), np.float32),
        "image": rng.standard_normal((1, 16, 16, 3), np.float32),
        "z": rng.standard_normal((1, 4, 4, 4), np.float32),
    }


def save(modules, folder, **options):
    for name, module in modules.items():
        module.save_pretrained(folder / name, **options)
    diffusers.PNDMScheduler.from_config(to_diffusers(NANO)["scheduler"]).save_pretrained(folder / "scheduler")
    TOKENIZER.save(folder / "tokenizer")


@pytest.fixture(scope="module")
def source(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(modules, folder)
    return open_source(folder)


def torch_outputs(modules, inputs) -> dict[str, np.ndarray]:
    def nchw(a):
        return torch.from_numpy(a.transpose(0, 3, 1, 2).copy())

    with torch.no_grad():
        outputs = {
            "clip": modules["text_encoder"](torch.from_numpy(inputs["tokens"])).last_hidden_state,
            "unet": modules["unet"](nchw(inputs["x"]), 981, torch.from_numpy(inputs["context"])).sample.permute(
                0, 2, 3, 1
            ),
            "mean": modules["vae"].encode(nchw(inputs["image"])).latent_dist.mean.permute(0, 2, 3, 1),
            "decoded": modules["vae"].decode(nchw(inputs["z"])).sample.permute(0, 2, 3, 1),
        }
    return {name: output.numpy() for name, output in outputs.items()}


def our_outputs(params, inputs) -> dict[str, np.ndarray]:
    vae = VAE(NANO.vae)
    encode, decode = (functools.partial(vae.apply, method=method) for method in ("encode", "decode"))
    with jax.default_matmul_precision("highest"):
        scaled = jnp.asarray(inputs["z"]) * NANO.vae.scale
        return {
            "clip": jax.jit(CLIPText(NANO.clip).apply)({"params": params["clip"]}, inputs["tokens"]),
            "unet": jax.jit(UNet(NANO.unet).apply)({"params": params["unet"]}, inputs["x"], 981.0, inputs["context"]),
            "mean": jax.jit(encode)({"params": params["vae"]}, inputs["image"]).mean / NANO.vae.scale,
            "decoded": jax.jit(decode)({"params": params["vae"]}, scaled),
        }


def assert_same_params(opened, source):
    for path, parameter in source.parameters.items():
        np.testing.assert_array_equal(opened.parameters[path].read(), parameter.read(), err_msg=path)


def test_what_diffusers_saved_computes_the_same_here(modules, source, inputs):
    """Every other test compares parameters with this source's, bit by bit."""
    assert (source.config.clip, source.config.unet, source.config.vae) == (NANO.clip, NANO.unet, NANO.vae)
    theirs, ours = torch_outputs(modules, inputs), our_outputs(source.params(), inputs)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)


def test_torch_bin_files(tmp_path, modules, source):
    save(modules, tmp_path, safe_serialization=False)
    # transformers 5 writes safetensors alone; its older versions wrote this.
    (tmp_path / "text_encoder" / "model.safetensors").unlink(missing_ok=True)
    torch.save(modules["text_encoder"].state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    assert not list(tmp_path.glob("*/*.safetensors"))
    assert_same_params(open_source(tmp_path), source)


def test_what_we_write_diffusers_opens(tmp_path, modules, source):
    """Through torch's layout, our parameters, and back out again: the very same numbers in the very same modules."""
    write_diffusers(tmp_path / "out", source.config, source.params(), source.tokenizer)

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    opened = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae": pipe.vae}
    for name, module in modules.items():
        state = opened[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(state[key], value), key
    assert isinstance(pipe.scheduler, diffusers.PNDMScheduler)
    prompt = "a red cube on top of a blue sphere"
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(ids, TOKENIZER.encode(prompt).tokens[0, 0])


def test_float16_folder_opens_as_float16(tmp_path, modules, source):
    write_diffusers(tmp_path / "out", source.config, source.parameters, source.tokenizer, dtype="float16")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", torch_dtype=torch.float16)
    expected = modules["unet"].conv_in.weight.half()
    assert unet.dtype == torch.float16 and torch.equal(unet.conv_in.weight, expected)


def test_our_compvis_names_are_those_that_diffusers_converts(tmp_path, modules, source):
    """diffusers has its own, older converter of CompVis files: an independent opinion on every name."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    write_compvis(tmp_path / "a.safetensors", source.config, source.params())
    arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    compvis = {name: torch.from_numpy(array) for name, array in arrays.items()}
    converted = {
        "unet": single_file.convert_ldm_unet_checkpoint(dict(compvis), config=modules["unet"].config),
        "vae": single_file.convert_ldm_vae_checkpoint(dict(compvis), config=modules["vae"].config),
    }
    for name, state in converted.items():
        expected = modules[name].state_dict()
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key].reshape(value.shape), value), key
    text = {key.removeprefix("cond_stage_model.transformer.text_model."): v for key, v in compvis.items()}
    for key, value in modules["text_encoder"].state_dict().items():
        if not key.endswith("position_ids"):
            assert torch.equal(text[key.removeprefix("text_model.")], value), key


def test_a_compvis_ckpt_written_by_torch(tmp_path, modules, source):
    """The released form: one pickle with optimizer states and averaged weights."""
    write_compvis(tmp_path / "a.safetensors", source.config, source.parameters)
    arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] for name in unet}
    plain = {name: torch.zeros_like(state[name]) for name in unet}  # to be left alone
    position_ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77).expand(1, -1)}
    torch.save(
        {
            "state_dict": {**state, **plain, **averaged, **position_ids, "model_ema.decay": torch.tensor(0.9999)},
            "optimizer_states": [torch.optim.AdamW(modules["vae"].parameters()).state_dict()],
            "global_step": np.int64(470000),
        },
        tmp_path / "sd.ckpt",
    )
    opened = open_source(tmp_path / "sd.ckpt", config=NANO, tokenizer=TOKENIZER)
    ignored = {"optimizer_states", "global_step", "model_ema.decay", *position_ids}
    assert opened.report.ema is True and set(opened.report.ignored) == ignored
    assert_same_params(opened, source)
