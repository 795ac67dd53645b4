"""Faults in requests, F05, F07, F13, F14, F16, F17, F19, F20: found early, and said in one sentence."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

from sd_jax import cli
from sd_jax import pipeline as pl
from sd_jax.config import NANO
from sd_jax.diffusion import draws
from sd_jax.images import read_metadata
from sd_jax.pipeline import RUN, SD, Pipeline
from sd_jax.types import RequestError
from sd_jax.weights.tables import parameter_shapes
from tests.micro import SIZE, TOKENIZER, micro_file, params, picture, pipeline

STEPS = 3
LIMIT = 2**63 - 1


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs ``sd-jax`` in an empty folder -> (status, lines on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_cache_folder", lambda: None)

    def run(*argv: str) -> tuple[int, list[str], str]:
        model = [f"--model={micro_file()}", f"--steps={STEPS}"] if argv[0] in ("txt2img", "img2img", "inpaint") else []
        status = cli.main([argv[0], *model, *argv[1:]])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


@pytest.fixture
def nothing_runs(monkeypatch):
    """Whatever is compiled or run from here on is a failure: ``RUN`` is where requests end."""

    def compile(*args, **kwargs):
        raise AssertionError("a wrong request came as far as compiling")

    for name in RUN:
        monkeypatch.setitem(RUN, name, compile)


# ---- F05: nothing can be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing", "no\0name", "x" * 300])
def test_f05_the_output_folder_is_tried_before_a_model_is_loaded(command, monkeypatch, out):
    monkeypatch.setattr(pl, "load", lambda *args, **kwargs: pytest.fail("too late"))
    Path("file").write_text("something")
    status, paths, err = command("txt2img", "a cone", "--out", out)
    assert status == 2 and not paths and err.count("\n") == 1
    assert err.startswith(f"error: nothing can be written to the folder {out!r}: ") and err.endswith("choose another\n")
    assert ("is a file" in err) == ("file" in out)


def test_f05_a_file_where_a_folder_is_wanted(command):
    Path("file").write_text("something")
    Path("config.py").write_text("from sd_jax.train.config import TrainConfig\n\nget_config = TrainConfig\n")
    for argv in (("convert", str(micro_file()), "file/out"), ("train", "config.py", "--workdir=file")):
        status, paths, err = command(*argv)
        assert status == 2 and not paths
        said = "nothing can be written to the folder 'file': it, or a part of its path, is a file; choose another"
        assert err == f"error: {said}\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_f05_read_only(command):
    Path("out").mkdir(mode=0o500)
    status, _, err = command("txt2img", "a cone", "--out=out")
    assert status == 2 and "Permission denied" in err


# ---- F07: prompts and file names -------------------------------------------------------------------------------------

HOSTILE = [
    "../../up",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m\n\r",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "x" * 300,
    ".",
]


@pytest.mark.filterwarnings("ignore:prompt")
def test_f07_file_names_hold_no_prompt(command, tmp_path):
    status, paths, _ = command("txt2img", *HOSTILE, "--out=out", "--grid")
    assert status == 0
    assert paths == [*(f"out/{i:05d}-{i}.png" for i in range(len(HOSTILE))), "out/grid-00000-0.png"]
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted(paths)
    assert [read_metadata(path)["prompt"] for path in paths[:-1]] == HOSTILE


# ---- F13, F14: long and empty prompts --------------------------------------------------------------------------------


def test_f13_dropped_words_are_said_and_recorded(command):
    long = "red " * 40 + "cube"
    status, (path,), err = command("txt2img", long)
    assert status == 0 and "warning: prompt 0 has" in err and "cube" in read_metadata(path)["dropped"]
    status, paths, err = command("txt2img", "a cone", long, f"--negative={long}s", "--batch-size=3", "--out=b")
    warned = [line.partition(" has ")[0] for line in err.splitlines() if line.startswith("warning: ")]
    assert warned == ["warning: prompt 1", "warning: negative prompt 0"], "once each, however they are batched"
    assert "cubes" in read_metadata(paths[0])["negative_dropped"] and "dropped" not in read_metadata(paths[0])
    negative = ("--guidance=1", f"--negative={long}", "--long-prompt=error")
    status, (path,), _ = command("txt2img", "a cone", *negative)
    assert status == 0 and "negative_dropped" not in read_metadata(path), "nothing reads it"
    status, paths, err = command("txt2img", "a cone", long, "--long-prompt=error")
    assert status == 2 and not paths and err.splitlines()[-1].startswith("error: prompt 1 has")
    status, _, err = command("txt2img", "a cone", f"--negative={long}", "--long-prompt=error")
    assert status == 2 and err.splitlines()[-1].startswith("error: negative prompt 0 has")


def test_f14_the_empty_prompt_is_the_unconditional_embedding():
    unconditional = np.array([[[TOKENIZER.bos_id, *[TOKENIZER.eos_id] * 76]]], np.int32)
    context = jax.jit(pl.encode_tokens, static_argnums=0)(pipeline().sd, params(), unconditional)
    np.testing.assert_array_equal(pipeline().encode_prompt(""), context)
    tokens = pipeline()._pairs([""], "", 1, True, "truncate")
    np.testing.assert_array_equal(tokens[0, 0], tokens[0, 1])


# ---- F16: sizes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    """A model whose sizes are multiples of eight; it refuses before it would need parameters."""
    return Pipeline(SD(NANO), {}, TOKENIZER)


@pytest.mark.parametrize(
    "value, message",
    [
        (500, "500 is not a multiple of 8; use 496 or 504"),
        (65, "65 is not a multiple of 8; use 64 or 72"),
        (1, "1 is not a multiple of 8; use 8"),
        (0, "0 is not a multiple of 8; use 8"),
        (-8, "-8 is not a multiple of 8; use 8"),
        (64.0, "64.0 is not a whole number of pixels; give a multiple of 8"),
        (True, "True is not a whole number of pixels"),
        ("64", "'64' is not a whole number of pixels"),
    ],
)
@pytest.mark.parametrize("side", ["height", "width"])
def test_f16_sizes_that_are_not_multiples(nano, nothing_runs, side, value, message):
    with pytest.raises(RequestError, match=f"^{side} {message}"):
        nano.text_to_image("a cone", **{side: value})


def test_f16_every_multiple_of_eight_is_made():
    """Not only those of 64: 9 x 13 latents are odd on three levels. Shapes alone are traced: nothing is run."""
    unet = dataclasses.replace(NANO.unet, layers=1, attention=(False,) * 4)
    config = dataclasses.replace(NANO, unet=unet, vae=dataclasses.replace(NANO.vae, layers=1))
    abstract = {
        name: unflatten_dict(
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}, sep="/"
        )
        for name, shapes in parameter_shapes(config).items()
    }
    rows = np.zeros((1, 1, 1, 77), np.int32), draws.seed_words([0]), np.ones(1, np.float32)
    run = functools.partial(pl.text_to_image, SD(config), size=(72, 104))
    assert jax.eval_shape(run, abstract, pl.make_plan(NANO.noise, 2, "ddim"), *rows).shape == (1, 72, 104, 3)


def test_f16_status(command, nothing_runs):
    status, paths, err = command("txt2img", "a cone", "--height=15")
    assert status == 2 and not paths and err.endswith("\nerror: height 15 is not a multiple of 2; use 14 or 16\n")
    Image.fromarray(picture("a")).save("start.png")
    status, _, err = command("img2img", "a cone", "--image=start.png", "--width=17")
    assert status == 2 and err.endswith("\nerror: width 17 is not a multiple of 2; use 16 or 18\n")


# ---- F17, F19: numbers -----------------------------------------------------------------------------------------------

BAD_NUMBERS = [
    ({"guidance": float("nan")}, "guidance nan is not usable; give a finite number"),
    ({"guidance": [1.0, float("inf")]}, r"guidance \[1.0, inf\] is not usable; give a finite number"),
    ({"guidance": "high"}, "guidance high is not usable; give a finite number"),
    ({"guidance": [1.0, 2.0, 3.0]}, "there are 3 values of guidance and 1 pictures to make; give one, or one for each"),
    ({"rescale": 1.5}, "rescale 1.5 is not usable; give a number from 0 to 1"),
    ({"eta": -0.1}, "eta -0.1 is out of range; give 0 .* to 1"),
    ({"eta": 0.5, "sampler": "euler"}, "sampler 'euler' has no eta"),
    ({"sampler": "best"}, "sampler 'best' is not known; choose one of plms, ddim"),
    ({"spacing": "even"}, "spacing 'even' is not known; choose one of leading"),
    ({"steps": 0}, "steps 0 is out of range; give a whole number from 1 to 1000"),
    ({"steps": 1001}, "steps 1001 is out of range"),
    ({"steps": 2.5}, "steps 2.5 is out of range"),
    ({"steps": 1000}, "1000 steps of leading spacing do not fit .* use at most 999 steps"),
    ({"seed": -1}, f"seed -1 is out of range; give a whole number from 0 to {LIMIT}"),
    ({"seed": 2**63}, f"seed {2**63} is out of range"),
    ({"seed": 2**64}, f"seed {2**64} is out of range"),
    ({"seed": 1.0}, "seed 1.0 is out of range"),
    ({"seeds": [0, -5]}, "seed -5 is out of range"),
    ({"seeds": 5}, "seeds are 5; give a list of at least one"),
    ({"seeds": []}, r"seeds are \[\]; give a list of at least one"),
    ({"negative": ["a", "b"]}, "there are 2 negative prompts and 1 pictures to make; give one, or one for each"),
    ({"long_prompt": "cut"}, "long_prompt 'cut' is not one of truncate, error, chunk"),
]


@pytest.mark.parametrize("options, message", BAD_NUMBERS)
def test_f17_f19_numbers_are_checked_before_compiling(nothing_runs, options, message):
    with pytest.raises(RequestError, match=message) as caught:
        pipeline().text_to_image("a cone", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan"), 0.05])
def test_f17_strength(nothing_runs, strength):
    with pytest.raises(RequestError, match=f"strength {strength} (is out of range|leaves none of the 10 steps to run)"):
        pipeline().image_to_image("a cone", picture("a"), strength=strength, steps=10)


@pytest.mark.parametrize("prompts", [None, 7, [], b"a cone", ["a", None]])
def test_prompts_that_are_no_text(nothing_runs, prompts):
    with pytest.raises(RequestError, match="^prompts? "):
        pipeline().text_to_image(prompts)


def test_f17_status(command, nothing_runs):
    assert command("evaluate", "reconstruction", "--seed=-1")[0] == 2
    for flags, said in (("--guidance=nan", "guidance nan"), ("--steps=0", "steps 0"), ("--seed=-1", "seed -1")):
        status, paths, err = command("txt2img", "a cone", flags)
        assert status == 2 and not paths and err.splitlines()[-1].startswith(f"error: {said} is ")
        assert "Traceback" not in err


def test_f19_the_last_seed_is_checked_before_the_first_picture(command):
    status, paths, err = command("txt2img", "a cone", f"--seed={LIMIT}", "--num=2")
    assert (status, paths) == (2, [])
    assert err == f"error: seed {2**63} is out of range; give a whole number from 0 to {LIMIT}\n"


def test_f19_distinct_seeds_have_distinct_noise():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, LIMIT]
    noise = np.asarray(pl.starting_latents(SD(pipeline().sd.config), draws.seed_words(seeds), (SIZE, SIZE)))
    assert len({image.tobytes() for image in noise}) == len(seeds)


# ---- F20: NaN --------------------------------------------------------------------------------------------------------


def test_f20_what_is_not_finite_is_reported_and_not_written(command, monkeypatch):
    """The embedding of one letter is NaN, so only the prompt that has it is spoilt."""
    token = TOKENIZER.encode("z").tokens[0, 0, 1]
    spoilt = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(leaf).at[token].set(np.nan) if leaf.shape[:1] == (514,) else leaf, params()
    )
    assert sum(int(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(spoilt)) == 1
    monkeypatch.setattr(pl, "load", lambda *args, **kwargs: dataclasses.replace(pipeline(), params=spoilt))
    status, paths, err = command("txt2img", "a cone", "z", "a cube", "--seed=4", "--batch-size=2", "--grid")
    assert status == 1
    assert paths == ["outputs/00000-4.png", "outputs/00001-6.png", "outputs/grid-00000-4.png"]
    assert "failed: 'z' with seed 5 has NaN or infinite values, and is not written\n" in err
    assert err.endswith("failed: 1 of 3 pictures; try --dtype float32, a lower --guidance, or check the weights\n")
