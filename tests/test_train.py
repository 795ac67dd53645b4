"""train/: configurations, data on disk, what is trainable, runs. What can go wrong in one: faults/test_training.py."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from sd_jax import pipeline
from sd_jax.config import CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig
from sd_jax.models.unet import UNet
from sd_jax.train import data, loop, scenes, tasks
from sd_jax.train import recipe as recipe_module
from sd_jax.train.config import FREE, DataConfig, Recipe, TrainConfig, differences, load_config, override
from sd_jax.train.data import Examples, Interrupted
from sd_jax.train.recipe import run_recipe
from sd_jax.train.state import OptimizerConfig
from sd_jax.train.trainable import merge, split
from sd_jax.types import RequestError
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import parameter_shapes
from tests import toy_training
from tests.micro import TOKENIZER
from tests.random_weights import params_like

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def toy_model():
    return SDConfig(
        clip=CLIPConfig(data.scene_tokenizer().vocab_size, width=8, mlp_width=8, layers=1, heads=1),
        unet=UNetConfig(widths=(8,), layers=1, attention=(True,), heads=(1,), context_width=8, groups=4, sample_size=4),
        vae=VAEConfig(widths=(4, 4), layers=1, groups=2),
        noise=NoiseConfig(sampler="ddim", spacing="trailing"),
    )


# ---- configurations ------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_value():
    config = override(
        TrainConfig(),
        [
            "steps=20",
            "optimizer.learning_rate=1e-3",
            "optimizer.weight_decay=0",
            "optimizer.clip=none",
            "noise_loss.min_snr=5",
            "init_from=runs/a=b",
            "dtype=bfloat16",
            "trainable=unet/,clip/",
            "model.unet.widths=(64, 128)",
            "model.unet.attention=[True, False]",
            "model.noise.final_alpha_one=true",
        ],
    )
    assert config.steps == 20 and config.init_from == "runs/a=b" and config.dtype == "bfloat16"
    assert config.optimizer == OptimizerConfig(1e-3, weight_decay=0.0, clip=None)
    assert type(config.optimizer.weight_decay) is float and config.noise_loss.min_snr == 5.0
    assert config.trainable == ("unet/", "clip/")
    assert config.model.unet.widths == (64, 128) and config.model.unet.attention == (True, False)
    assert config.model.noise.final_alpha_one is True
    hash(config)


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps", "'steps' is not of the form key.path=value"),
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate is not in the .*did you mean 'learning_rate'"),
        ("zzz=1", "TrainConfig has no 'zzz'; there are task, model, "),
        ("steps=ten", "steps takes a whole number, and 'ten' is none"),
        ("steps=1.5", "steps takes a whole number, and '1.5' is none"),
        ("steps=True", "steps takes a whole number"),
        ("steps.more=1", "steps is 10000 and has no parts"),
        ("optimizer=1", "optimizer cannot be set as a whole; set one of its parts: learning_rate, warmup"),
        ("optimizer.clip=yes", "optimizer.clip takes a number or none, and 'yes' is none"),
        ("model.unet.widths=64,x", "model.unet.widths takes a tuple, each of it a whole number"),
        ("task=paint", "task is 'paint'; give one of vae, text, diffusion"),
        ("optimizer.decay=step", "optimizer.decay is 'step'; give one of constant, cosine, linear"),
        ("batch_size=0", "batch_size is 0; give 1 or more"),
        ("caption_dropout=10", "caption_dropout is 10.0; give a share from 0 to 1"),
    ],
)
def test_overrides_that_do_not_fit(text, message):
    with pytest.raises(RequestError, match=message):
        override(TrainConfig(), [text])


def test_a_configuration_file(tmp_path):
    recipe = load_config(TINY, ["data.scenes=100", "diffusion.optimizer.learning_rate=1e-4"])
    assert recipe.data.scenes == 100 and recipe.diffusion.optimizer.learning_rate == 1e-4
    with pytest.raises(RequestError, match="vae takes its model from the recipe; set model.vae.scale without vae"):
        override(recipe, ["vae.model.vae.scale=2"])
    with pytest.raises(RequestError, match="there is no configuration .*missing.py"):
        load_config(tmp_path / "missing.py")
    (tmp_path / "other.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(RequestError, match="has no get_config\\(\\) that returns"):
        load_config(tmp_path / "other.py")


def test_the_tiny_model_is_one_that_may_be_embedded():
    model = load_config(TINY).model
    count = sum(int(np.prod(s)) for shapes in parameter_shapes(model).values() for s in shapes.values())
    assert model.default_size == 64 and 2 * count < 23_000_000  # bytes in float16; the tokenizer takes the rest
    embedded = open_source("tiny").config
    assert embedded == dataclasses.replace(model, vae=dataclasses.replace(model.vae, scale=embedded.vae.scale))


def test_what_may_change_between_resumptions():
    config = TrainConfig()
    recorded = json.loads(json.dumps(dataclasses.asdict(config)))
    assert differences(recorded, config) == []
    assert differences(recorded, override(config, [f"{name}=77" for name in FREE])) == []
    assert differences(recorded, override(config, ["model.unet.widths=8,"])) == [
        "model.unet.widths was [320, 640, 1280, 1280] and is [8]"
    ]
    del recorded["repeats"]  # written by a version that did not have it
    assert differences(recorded, config) == ["repeats was None and is 1"]


# ---- data and parameters -------------------------------------------------------------------------------------------


def test_a_batch_may_be_larger_than_the_data():
    ids = Examples({"x": np.arange(3)}, 8, seed=0).ids(0)
    assert sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


def test_the_share_of_empty_captions():
    examples = Examples({"tokens": np.ones((10, 2), np.int32)}, 1000, 0, 0.1, np.zeros(2, np.int32))
    share = [float((examples.batch(step)["tokens"] == 0).all(1).mean()) for step in range(4)]
    assert len(set(share)) > 1 and abs(np.mean(share) - 0.1) < 0.02  # standard deviation .005


def test_rendering_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 3)
    spec, told = DataConfig(scenes=8, seed=5), []
    with pytest.raises(Interrupted):
        data.load_scenes(tmp_path, spec, 8, stop=lambda: True)
    captions = next(tmp_path.glob("*/captions.txt"))
    assert len(captions.read_text().splitlines()) == 3
    with captions.open("a") as file:
        file.write("killed in the middle of wri")
    images, texts = data.load_scenes(tmp_path, spec, 8, log=told.append)
    expected = scenes.dataset(8, 5, size=8)
    np.testing.assert_array_equal(images, expected[0])
    assert texts == expected[1] and told == ["rendered 6 of 8 scenes", "rendered 8 of 8 scenes"]
    monkeypatch.setattr(scenes, "dataset", None)  # all there
    np.testing.assert_array_equal(data.load_scenes(tmp_path, spec, 8)[0], images)


def test_processes_that_render_make_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 3)
    images, texts = data.load_scenes(tmp_path, DataConfig(scenes=5, seed=6, workers=2), 8)
    expected = scenes.dataset(5, 6, size=8)
    np.testing.assert_array_equal(images, expected[0])
    assert texts == expected[1]


def test_encoding_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    sd = pipeline.SD(dataclasses.replace(SDConfig(), vae=VAEConfig(latent_channels=1, widths=(4, 4))))
    images = np.random.default_rng(0).integers(0, 255, (6, 4, 4, 3), np.uint8)

    def encode(sd, params, image):
        mean = params * image[:, ::2, ::2, :1]
        return mean, mean + 1

    monkeypatch.setattr(data, "encode_images", encode)
    scale = np.float32(2)
    with pytest.raises(Interrupted):
        data.load_posteriors(tmp_path, sd, scale, images, batch_size=2, stop=lambda: True)
    told = []
    mean, std = data.load_posteriors(tmp_path, sd, scale, images, batch_size=4, log=told.append)
    np.testing.assert_array_equal(mean, 2.0 * images[:, ::2, ::2, :1])
    np.testing.assert_array_equal(std, mean + 1)
    assert told == ["encoded 6 of 6 pictures"]
    data.load_posteriors(tmp_path, sd, np.float32(3), images, batch_size=4)
    assert len(list(tmp_path.iterdir())) == 2  # another autoencoder's latents are kept apart


def test_split_and_merge():
    params = {"unet": {"a": {"kernel": 1, "bias": 2}, "cross": {"kernel": 3}}, "clip": {"b": 4}}
    trainable, frozen = split(params, ["unet/cross/", "clip/"])
    assert trainable == {"unet": {"cross": {"kernel": 3}}, "clip": {"b": 4}}
    assert frozen == {"unet": {"a": {"kernel": 1, "bias": 2}}}
    assert merge(trainable, frozen) == params == merge(*split(params, [""]))
    with pytest.raises(RequestError, match="trainable 'vae/' matches no parameter; there are unet/a/kernel, "):
        split(params, ["unet/", "vae/"])


def test_a_new_unet_puts_out_nothing():
    config = toy_model().unet
    params = params_like(UNet(config), np.zeros((1, 4, 4, 4)), np.zeros(1), np.zeros((1, 77, 8)))
    zeroed = tasks.zero_outputs(params)
    np.testing.assert_array_equal(zeroed["conv_out"]["kernel"], 0)
    np.testing.assert_array_equal(zeroed["mid_attn_0"]["proj_out"]["kernel"], 0)
    np.testing.assert_array_equal(zeroed["down_0_res_0"]["conv2"]["kernel"], 0)
    for part in (("down_0_res_0", "conv1"), ("mid_attn_0", "proj_in"), ("mid_attn_0", "ff", "proj_out")):
        ours, theirs = zeroed, params
        for name in part:
            ours, theirs = ours[name], theirs[name]
        np.testing.assert_array_equal(ours["kernel"], theirs["kernel"])


def test_weights_of_another_model_are_refused():
    model = toy_model()
    sd = pipeline.SD(model)
    wrong = {"vae": {"encoder": {"conv_in": {"kernel": np.zeros((3, 3, 3, 5))}}}}
    with pytest.raises(RequestError, match=r"parameters of vae to start from do not fit.* encoder/conv_in/kernel: \(3"):
        tasks.vae_task(TrainConfig(task="vae", model=model), sd, wrong, np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(RequestError, match="task text needs an autoencoder"):
        tasks.make_task(TrainConfig(task="text", model=model), "nowhere", {})


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", toy_training.make_task)
    told = []
    config = toy_training.config(steps=40, log_every=10, save_every=15, keep=2, preview_every=20)
    assert loop.run(config, tmp_path, log=told.append) == 0
    assert len(told) == 4 and "40/40" in told[-1] and "images/s" in told[-1] and " 0:00:00 left" in told[-1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"grad_norm", "learning_rate", "images_per_second"} <= lines[0].keys()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000030", "00000040"]
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["00000020.png", "00000040.png"]
    weights = loop.load_weights(tmp_path / loop.WEIGHTS)
    assert weights["net"]["w"].shape == (3,)

    monkeypatch.setattr(loop, "make_task", None)  # nothing is left to do
    assert loop.run(config, tmp_path) == 0


def test_frozen_parameters_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", toy_training.make_task)
    start = {"net": {"w": np.array([3.0, 2.0, 1.0], np.float32), "b": np.float32(0)}}
    weights = loop.train(toy_training.config(trainable=("net/b",)), tmp_path, start=start, devices=jax.devices()[:1])
    np.testing.assert_array_equal(weights["net"]["w"], start["net"]["w"])
    assert weights["net"]["b"] != 0


def test_a_refused_run_leaves_its_folder_free(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", toy_training.make_task)
    with pytest.raises(RequestError, match="matches no parameter"):
        loop.train(toy_training.config(trainable=("nte/",)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    loop.train(toy_training.config(steps=1, trainable=("net/",)), tmp_path)


@pytest.mark.parametrize("task", ["vae", "text", "diffusion"])
def test_every_parameter_of_a_task_is_used(task):
    """The gradient is traced, and nothing is compiled."""
    model = toy_model()
    sd, config = pipeline.SD(model), TrainConfig(task=task, model=model, batch_size=2, repeats=3)
    tokens, empty = data.tokenize(data.scene_tokenizer(), ["a red cube", "a picture of a blue cone"])
    mean = np.zeros((2, 4, 4, 4), np.float32)
    start = {
        "vae": params_like(sd.vae, np.zeros((1, 8, 8, 3))),
        "clip": params_like(sd.clip, np.zeros((1, 77), np.int32)),
        "unet": params_like(sd.unet, np.zeros((1, 4, 4, 4)), np.zeros(1), np.zeros((1, 77, 8))),
    }
    if task == "vae":
        made = tasks.vae_task(config, sd, start, np.zeros((2, 8, 8, 3), np.uint8))
    elif task == "text":
        made = tasks.text_task(config, sd, start, tokens, mean, data.scene_tokenizer().eos_id)
        assert made.examples.arrays["tokens"].shape == (2, 8)  # BOS, six words, EOS
        np.testing.assert_array_equal(made.examples.arrays["end"], [4, 7])
    else:
        arrays = {"tokens": tokens, "mean": mean, "std": mean}
        made = tasks.diffusion_task(config, sd, start, arrays, empty, data.scene_tokenizer())
    params = {**made.params, "idle": 0.0}
    gradient = jax.make_jaxpr(jax.grad(made.loss, has_aux=True))(params, made.examples.batch(0), jax.random.key(0))
    used = {id(v) for eqn in gradient.jaxpr.eqns for v in eqn.invars}
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    unused = [path for (path, _), var in zip(leaves, gradient.jaxpr.invars, strict=False) if id(var) not in used]
    assert [jax.tree_util.keystr(path) for path in unused] == ["['idle']"]


@pytest.mark.parametrize("init_from", [None, "tiny"])
def test_a_recipe_goes_on_from_a_model_or_from_nothing(init_from, tmp_path, monkeypatch):
    calls = []

    def train(config, workdir, *, start, data_dir, stop, log):
        calls.append((workdir.name, sorted(start), config.init_from))
        learnt = {"vae": ["vae"], "text": ["clip"], "diffusion": ["clip", "unet", "vae"]}[config.task]
        return {component: workdir.name for component in learnt}

    monkeypatch.setattr(recipe_module, "train", train)
    monkeypatch.setattr(recipe_module, "_measure", lambda *args: 0.5)
    made = dataclasses.replace(load_config(TINY), init_from=init_from)
    model, params = run_recipe(made, tmp_path)
    assert params == dict.fromkeys(("clip", "unet", "vae"), "diffusion") and model.vae.scale == 0.5
    if init_from is None:
        names, held = ["vae", "text", "diffusion"], [[], ["vae"], ["clip", "vae"]]
    else:
        names, held = ["vae", "diffusion"], [["clip", "unet", "vae"]] * 2
    assert calls == [(name, start, init_from) for name, start in zip(names, held, strict=True)]


def test_what_a_recipe_does_not_go_on_from(tmp_path, monkeypatch):
    recipe = load_config(TINY, ["init_from=somewhere"])
    whole = dict.fromkeys(("clip", "unet", "vae"))
    for given, tokenizer, message in (
        ({"vae": None}, None, "somewhere has no clip, unet; give a whole model as init_from"),
        (whole, TOKENIZER, "somewhere has another vocabulary than scenes"),
    ):
        monkeypatch.setattr(recipe_module, "read_start", lambda _, found=(given, tokenizer): found)
        with pytest.raises(RequestError, match=message):
            run_recipe(recipe, tmp_path)


def test_a_shortened_recipe_is_the_same_but_for_its_length():
    shortened = runpy.run_path(str(TINY.parents[1] / "tools" / "train_tiny.py"))["shortened"]
    recipe = load_config(TINY, ["init_from=tiny", "data.scenes=10"])
    assert shortened(recipe, 1.0) == recipe
    short = shortened(recipe, 0.01)
    assert short.init_from == "tiny" and short.model == recipe.model
    assert short.vae.steps == round(recipe.vae.steps * 0.01) and short.diffusion.repeats == recipe.diffusion.repeats


@pytest.mark.full
def test_the_recipe_makes_a_model_from_nothing(tmp_path):
    """Every real task compiles and runs, and hands over to the next; interrupted once on the way."""
    base = TrainConfig(steps=3, batch_size=8, optimizer=OptimizerConfig(1e-3, warmup=0), save_every=2)
    recipe = Recipe(
        toy_model(),
        DataConfig(scenes=32),
        vae=dataclasses.replace(base, task="vae", preview_every=2),
        text=dataclasses.replace(base, task="text"),
        diffusion=dataclasses.replace(base, repeats=2, preview_every=2),
    )
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path, stop=lambda: next(asked) == 6)
    model, params = run_recipe(recipe, tmp_path)
    assert model.vae.scale == json.loads((tmp_path / "scale.json").read_text()) != 1.0
    jax.tree.map(
        np.testing.assert_array_equal, params["vae"], loop.load_weights(tmp_path / "vae" / loop.WEIGHTS)["vae"]
    )
    assert pipeline.load(tmp_path / "diffusion" / loop.WEIGHTS).sd.config == model

    tool = runpy.run_path(str(TINY.parents[1] / "tools" / "train_tiny.py"))
    tool["write_model"](tmp_path / "model", model, params, data.scene_tokenizer())
    pipe = pipeline.load(tmp_path / "model")
    assert pipe.text_to_image("a red cube", steps=2).shape == (1, 8, 8, 3)
