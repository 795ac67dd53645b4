"""One network of a model from elsewhere: every form that people have of one, on random weights of MICRO."""

import dataclasses
import json

import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy

from sd_jax.cli import main
from sd_jax.images import read_metadata
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights.convert import convert, write_compvis, write_diffusers, write_native
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import PREFIXES, parameter_shapes, table
from tests.micro import MICRO, TOKENIZER, micro_file

VAE = PREFIXES["vae"]


def random_params(config=MICRO, seed=1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{component}/{path}": rng.standard_normal(shape, np.float32)
        for component, shapes in parameter_shapes(config).items()
        for path, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def other():
    """Another model of the same shape, whose parts are taken."""
    return random_params()


@pytest.fixture(scope="module")
def compvis(tmp_path_factory, other):
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    write_compvis(path, MICRO, other)
    return path


def assert_replaced(source, component: str, other, also=MICRO):
    """``component`` is ``other``'s, and everything else that of the file it was put into."""
    base = flax.traverse_util.flatten_dict(open_source(micro_file()).params(), sep="/")
    found = flax.traverse_util.flatten_dict(source.params(), sep="/")
    assert found.keys() == {p for p in base if not p.startswith(component)} | {
        p for p in other if p.startswith(component)
    }
    assert found.keys() == base.keys()
    for path, array in found.items():
        expected = other if path.startswith(f"{component}/") else base
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert source.config == also and source.report.parts[0][0] == component


@pytest.mark.parametrize("component", ["clip", "unet", "vae"])
@pytest.mark.parametrize("form", ["native", "compvis", "folder", "component folder", "component file", "alone"])
def test_a_part_in_every_form(tmp_path, other, compvis, component, form):
    folder = tmp_path / "folder"
    inside = folder / {"clip": "text_encoder"}.get(component, component)
    if form == "native":
        write_native(tmp_path / "n.safetensors", MICRO, other, TOKENIZER)
        part = tmp_path / "n.safetensors"
    elif form == "compvis":
        part = compvis
    elif form == "alone":  # CompVis' names of one network, as autoencoders were published
        arrays = safetensors.numpy.load_file(compvis)
        prefix = PREFIXES[component]
        arrays = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
        arrays |= {"loss.logvar": np.zeros(1, np.float32)} if component == "vae" else {}
        part = tmp_path / "alone.safetensors"
        safetensors.numpy.save_file(arrays, part)
    else:
        write_diffusers(folder, MICRO, other, TOKENIZER)
        part = {"folder": folder, "component folder": inside}.get(form) or next(inside.glob("*.safetensors"))
    assert_replaced(open_source(micro_file(), parts={component: part}), component, other)


def test_a_part_brings_its_own_config(tmp_path):
    """A text tower with another activation; and a UNet with nine input channels, which only its shape tells."""
    gelu = dataclasses.replace(MICRO, clip=dataclasses.replace(MICRO.clip, activation="gelu"))
    params = random_params(gelu)
    write_diffusers(tmp_path / "gelu", gelu, params, TOKENIZER)
    assert_replaced(open_source(micro_file(), parts={"clip": tmp_path / "gelu" / "text_encoder"}), "clip", params, gelu)
    nine = dataclasses.replace(MICRO, unet=dataclasses.replace(MICRO.unet, in_channels=9))
    params = random_params(nine)
    rows = table("diffusers", "unet", nine)
    arrays = {r.names[0]: np.ascontiguousarray(r.transform.to_theirs(params[f"unet/{r.path}"])) for r in rows}
    safetensors.numpy.save_file(arrays, tmp_path / "nine.safetensors")
    assert_replaced(open_source(micro_file(), parts={"unet": tmp_path / "nine.safetensors"}), "unet", params, nine)


def test_the_text_tower_of_a_whole_clip(tmp_path, other, compvis):
    """openai/clip-vit-large-patch14 has the image tower, projections and a temperature beside it."""
    prefix = PREFIXES["clip"]
    arrays = {
        n.removeprefix(prefix): a for n, a in safetensors.numpy.load_file(compvis).items() if n.startswith(prefix)
    }
    extra = {"text_model.embeddings.position_ids": np.arange(77)[None], "logit_scale": np.ones((), np.float32)}
    extra |= {name: np.zeros((2, 2), np.float32) for name in ("visual_projection.weight", "text_projection.weight")}
    extra["vision_model.pre_layrnorm.weight"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(arrays | extra, tmp_path / "clip.safetensors")
    source = open_source(micro_file(), parts={"clip": tmp_path / "clip.safetensors"})
    assert_replaced(source, "clip", other)
    assert set(source.report.ignored) == set(extra)


def test_a_model_that_lacks_what_a_part_brings(tmp_path, other, compvis):
    """Fine-tunes without an autoencoder are common."""
    arrays = {n: a for n, a in safetensors.numpy.load_file(compvis).items() if not n.startswith(VAE)}
    safetensors.numpy.save_file(arrays, tmp_path / "no-vae.safetensors")
    options = {"config": MICRO, "tokenizer": TOKENIZER}
    with pytest.raises(WeightsError, match="has no autoencoder; take one from elsewhere, with --part vae FILE"):
        open_source(tmp_path / "no-vae.safetensors", **options)
    found = open_source(tmp_path / "no-vae.safetensors", parts={"vae": micro_file()}, **options).params()
    base = open_source(micro_file()).params()
    np.testing.assert_array_equal(found["vae"]["quant_conv"]["kernel"], base["vae"]["quant_conv"]["kernel"])
    np.testing.assert_array_equal(found["unet"]["conv_in"]["kernel"], other["unet/conv_in/kernel"])
    write_diffusers(tmp_path / "folder", MICRO, other, TOKENIZER)
    for file in (tmp_path / "folder" / "vae").iterdir():
        file.unlink()
    assert open_source(tmp_path / "folder", parts={"vae": micro_file()}).config == MICRO


def test_parts_that_are_none(tmp_path, compvis):
    def refused(parts, expected, error=WeightsError):
        with pytest.raises(error, match=expected):
            open_source(micro_file(), parts=parts)

    refused({"vea": compvis}, "part 'vea' is none of a model's; use clip, unet, vae", RequestError)
    refused({"vae": tmp_path / "x.safetensors"}, "there is no autoencoder '.*x.safetensors'; give a file", RequestError)
    refused({"vae": tmp_path}, "has none of diffusion_pytorch_model.safetensors")
    lora = {"lora_unet_down_blocks_0_proj_in.lora_down.weight": np.zeros((4, 8), np.float32)}
    safetensors.numpy.save_file(lora, tmp_path / "lora.safetensors")
    refused({"unet": tmp_path / "lora.safetensors"}, "holds no UNet of v1; it is a LoRA alone")
    wide = dataclasses.replace(MICRO, vae=dataclasses.replace(MICRO.vae, widths=(16, 16)))
    arrays = {}
    for row in table("diffusers", "vae", wide):
        arrays[row.names[0]] = np.zeros(row.transform.shape(parameter_shapes(wide)["vae"][row.path]), np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / "wide.safetensors")
    refused({"vae": tmp_path / "wide.safetensors"}, r"does not fit the model \(\d+ shape\)")
    clip = dataclasses.replace(MICRO, clip=dataclasses.replace(MICRO.clip, width=24))
    write_diffusers(tmp_path / "clip", clip, random_params(clip), TOKENIZER)
    refused({"clip": tmp_path / "clip"}, "gives 24 numbers a token and the UNet takes 16; give parts of one kind")


def test_from_the_command_line_and_again_from_the_picture(tmp_path, compvis, capsys):
    made = ["txt2img", "a cube", "--model", str(micro_file()), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*made, "--part", "vae", str(compvis)]) == 0
    with_part, said = capsys.readouterr()
    assert f"its vae is from {compvis}" in said
    assert read_metadata(with_part.strip())["parts"] == {"vae": str(compvis)}
    assert main(["txt2img", "--from-png", with_part.strip(), "--out", str(tmp_path / "again")]) == 0
    assert main(made) == 0
    again, without = capsys.readouterr().out.split()
    pictures = [open(path, "rb").read() for path in (with_part.strip(), again, without)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_converting_with_a_part_makes_one_model(tmp_path, other, compvis):
    convert(micro_file(), tmp_path / "both.safetensors", parts={"vae": compvis})
    converted = open_source(tmp_path / "both.safetensors")
    assert converted.record["parts"] == {"vae": "other.safetensors"}
    found = flax.traverse_util.flatten_dict(converted.params(), sep="/")
    np.testing.assert_array_equal(found["vae/quant_conv/bias"], other["vae/quant_conv/bias"])
    json.dumps(converted.record)
