"""The command line: flags in, files and exit statuses out. What goes wrong is in faults/test_requests.py."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_jax import cli, flags
from sd_jax import pipeline as pl
from sd_jax.images import grid, read_metadata, write_png
from sd_jax.weights.source import Report, open_source
from tests.micro import MICRO, SIZE, micro_file, picture, pipeline

STEPS = 3


@pytest.fixture
def sd_jax_(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own -> (status, written paths, what was said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_cache_folder", lambda: None)

    def run(command: str, *argv: str) -> tuple[int, list[Path], str]:
        if command in ("txt2img", "img2img", "inpaint") and "--from-png" not in argv:
            argv = (f"--model={micro_file()}", f"--steps={STEPS}", *argv)
        status = cli.main([command, *argv])
        out, err = capsys.readouterr()
        return status, [Path(line) for line in out.splitlines()], err

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---- pictures of prompts ---------------------------------------------------------------------------------------------


def test_txt2img(sd_jax_):
    status, paths, err = sd_jax_("txt2img", "a red cube", "a cone", "--num", "2", "--seed=5", "--out=a b/ö")
    assert status == 0
    assert [str(path) for path in paths] == [f"a b/ö/{i:05d}-{i + 5}.png" for i in range(4)]
    assert "micro.safetensors in float32 on 8 cpu devices, from seed 5" in err
    alone = [pipeline().text_to_image("a cone", steps=STEPS, seed=seed)[0] for seed in (7, 8)]
    np.testing.assert_array_equal([pixels(path) for path in paths[2:]], alone)

    again = sd_jax_("txt2img", "a cone", "--out=a b/ö")[1]
    assert [path.name for path in again] == ["00004-0.png"], "a second run goes on counting"


def test_a_picture_is_the_same_whatever_it_is_made_beside(sd_jax_):
    _, paths, err = sd_jax_("txt2img", "a red cube", "--num=3", "--batch-size=2", "--grid")
    assert len(paths) == 4 and "seed 0, 1: " in err and "seed 2: " in err
    images = np.stack([pixels(path) for path in paths[:3]])
    assert paths[3].name == "grid-00000-0.png"
    np.testing.assert_array_equal(pixels(paths[3]), grid(images))
    _, (last,), _ = sd_jax_("txt2img", "a red cube", "--seed=2", "--batch-size=2")
    np.testing.assert_array_equal(pixels(last), images[2])
    for path in (*paths[:3], last):
        path.unlink()
    status, paths, _ = sd_jax_("txt2img", "a red cube", "--batch-size=2", "--grid")
    assert status == 0 and [path.name for path in paths] == ["00001-0.png", "grid-00001-0.png"], "no grid is replaced"


def test_from_png_makes_the_picture_again(sd_jax_):
    asked = ["--negative=--a, cone", "--guidance=3.3", "--eta=0.7", "--seed=9", "--num=2"]
    _, (_, path), _ = sd_jax_("txt2img", "a 'red' cube,\nünder", *asked)
    _, (again,), _ = sd_jax_("txt2img", "--from-png", str(path))
    assert read_metadata(again) == read_metadata(path)
    np.testing.assert_array_equal(pixels(again), pixels(path))
    _, (other,), _ = sd_jax_("txt2img", "--from-png", str(path), "--seed", "8")
    assert read_metadata(other) == read_metadata(path) | {"seed": 8}
    assert not np.array_equal(pixels(other), pixels(path))
    _, (other,), _ = sd_jax_("txt2img", "a cone", "--from-png", str(path))
    assert read_metadata(other) == read_metadata(path) | {"prompt": "a cone"}


def test_from_png_with_another_model(sd_jax_):
    """What says how the first one is read is not said of the other; all else is."""
    argv, metadata = ["txt2img", "--from-png=a.png"], {"model": "sd.ckpt", "ema": True, "config": "c", "steps": 7}
    metadata |= {"prompt": "a cone", "guidance": 3.0, "revision": "main", "tokenizer": "t"}
    same = flags.parse([*argv, "--model=sd.ckpt"], metadata)
    assert (same.model, same.ema, same.config, same.tokenizer, same.revision) == ("sd.ckpt", True, "c", "t", "main")
    assert vars(flags.parse(argv, metadata)) | {"argv": same.argv} == vars(same)
    other = flags.parse([*argv, "--model", "tiny"], metadata)
    assert (other.model, other.ema, other.config, other.tokenizer, other.revision) == ("tiny", *[None] * 4)
    assert (other.steps, other.guidance, other.prompts) == (7, 3.0, ["a cone"])


def test_from_png_of_another_making(sd_jax_):
    write_png("a.png", picture("a"), {"prompt": "a cone", "seed": 1})
    status, paths, err = sd_jax_("txt2img", "--from-png", "a.png")
    assert status == 2 and not paths
    assert err == "error: a.png was not made by this command line; give its settings as flags\n"


def test_metadata(sd_jax_):
    _, (path,), _ = sd_jax_("txt2img", "a cone")
    expected = {"command": "txt2img", "prompt": "a cone", "seed": 0, "model": str(micro_file()), "dtype": "float32"}
    expected |= {"steps": STEPS, "guidance": 7.5, "sampler": "ddim", "negative": "", "eta": 0.0, "rescale": 0.0}
    expected |= {"long_prompt": "truncate", "height": SIZE, "width": SIZE, "batch_size": 1}
    metadata = read_metadata(path)
    assert metadata.pop("version")
    assert metadata == expected


def test_flags_are_the_options():
    assert set(flags.OPTIONS) <= {field.name for field in dataclasses.fields(pl.Options)}


def test_progress(sd_jax_, monkeypatch):
    def told(*flags):
        return [line for line in sd_jax_("txt2img", "a cone", *flags)[2].splitlines() if line.startswith("step")]

    assert told("--progress") == [f"step {i} of 3" for i in (1, 2, 3)]
    assert told() == [], "it would be compiled anew for nothing"
    monkeypatch.setattr(pl.Pipeline, "is_slow", True)
    assert told() == [f"step {i} of 3" for i in (1, 2, 3)]
    assert told("--no-progress") == []


# ---- pictures from pictures ------------------------------------------------------------------------------------------


def test_img2img(sd_jax_):
    Image.fromarray(picture("a", SIZE + 1, SIZE + 1)).save("start.png")
    status, (path,), err = sd_jax_("img2img", "a cone", "--image=start.png", "--strength=0.9")
    assert status == 0 and "note: start.png is 17 x 17 pixels, and is fitted to 16 x 16" in err
    metadata = read_metadata(path)
    assert metadata["image"] == "start.png" and metadata["strength"] == 0.9

    _, (again,), _ = sd_jax_("img2img", "--from-png", str(path))
    np.testing.assert_array_equal(pixels(again), pixels(path))
    assert read_metadata(again) == metadata
    Image.fromarray(picture("b")).save("start.png")
    status, paths, err = sd_jax_("img2img", "--from-png", str(path))
    assert status == 2 and not paths
    assert f"error: start.png has changed since {path} was made of it" in err
    status, paths, err = sd_jax_("txt2img", "--from-png", str(path))
    assert status == 2 and err == f"error: {path} was made by img2img; use that instead of txt2img\n"


def test_inpaint(sd_jax_):
    Image.fromarray(picture("a")).save("start.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save("mask.png")
    status, (path,), _ = sd_jax_("inpaint", "a cone", "--image=start.png", "--mask=mask.png", "--out=x")
    assert status == 0
    np.testing.assert_array_equal(pixels(path), pipeline().inpaint("a cone", picture("a"), mask, steps=STEPS)[0])
    Image.fromarray(mask[:9]).save("mask.png")
    status, _, err = sd_jax_("inpaint", "a cone", "--image=start.png", "--mask=mask.png")
    assert status == 2
    assert err == "error: mask.png is 16 x 9 pixels and start.png 16 x 16; give both the same size\n"
    status, _, err = sd_jax_("inpaint", "a cone", "--image=start.png")
    assert (status, err) == (2, "error: --mask is missing; give a JPEG, PNG or WebP file\n")


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_convert(sd_jax_):
    status, paths, _ = sd_jax_("convert", str(micro_file()), "folder", "--to=diffusers", "--dtype=float16")
    assert status == 0 and paths == [Path("folder")]
    opened = open_source("folder")
    assert opened.config == MICRO and opened.parameters["unet/conv_in/kernel"].dtype == np.float16
    assert sd_jax_("convert", "folder", "back.safetensors")[0] == 0
    status, _, err = sd_jax_("convert", "folder", "back.safetensors")
    assert status == 2 and "back.safetensors" in err and err.count("\n") == 1
    status, _, err = sd_jax_("convert", "folder", "x", "--to=onnx")
    assert (status, err) == (
        2,
        "error: to 'onnx' is not a layout that is written; use one of diffusers, compvis, native\n",
    )


def test_what_else_a_file_holds_is_said(capsys):
    cli._say_ignored(Report("a.ckpt", "compvis", ignored=tuple("abcdefghij"), foreign=("lightning.Trainer",)))
    assert capsys.readouterr().err.splitlines() == [
        "note: left out, as it is not needed: a, b, c, d, e, f, g, h and 2 more",
        "note: named in its pickle, and not run: lightning.Trainer",
    ]
    cli._say_ignored(Report("a.safetensors", "native"))
    assert capsys.readouterr().err == ""


def test_evaluate(sd_jax_, capsys):
    command = ["evaluate", "compositional", f"--model={micro_file()}", f"--steps={STEPS}", "--n=1"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| | images | colours |") and "| one object | 1 |" in out
    assert "4 pictures, " in err
    assert cli.main(["evaluate", "reconstruction", f"--model={micro_file()}", "--n=3", "--batch-size=2"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(" over 3 scenes\n") and 0 < float(out.split()[0]) < 60


def test_train(sd_jax_, monkeypatch):
    calls = []

    def run(config, workdir, *, log):
        calls.append((config.vae.steps, config.data.scenes, workdir))
        log("vae 1/7")
        return 75

    monkeypatch.setattr("sd_jax.train.loop.run", run)
    tiny = str(Path(__file__).parents[1] / "configs" / "tiny.py")
    status, _, err = sd_jax_("train", tiny, "vae.steps=7", "data.scenes=10", "--workdir=runs")
    assert status == 75 and calls == [(7, 10, "runs")] and err.endswith("vae 1/7\n")
    status, _, err = sd_jax_("train", tiny, "vae.stepz=7", "--workdir=runs")
    assert status == 2 and "did you mean 'steps'?" in err


# ---- talking and stopping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, "evaluate compositional", "evaluate reconstruction"])
def test_help(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "usage: sd-jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND; see sd-jax --help"),
        (["txt2img", "a", "--steps", "many"], "argument --steps: invalid int value: 'many'; see sd-jax txt2img --help"),
        (["txt2img", "a", "--num", "0"], "argument --num: '0' is not a whole number from 1; see"),
        (["txt2img", "a", "--ema", "maybe"], "argument --ema: 'maybe' is neither yes nor no; see"),
        (["txt2img", "a", "--stepz", "3"], "unrecognized arguments: --stepz 3; see"),
        (["txt2img"], "there is no prompt; give at least one text"),
        (["draw", "a"], "invalid choice: 'draw'"),
    ],
)
def test_mistyped(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_help_waits_for_nothing():
    code = "import sys; from sd_jax.cli import main; main(['txt2img', '--help']); sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    "error, status, said",
    [
        (KeyboardInterrupt(), 130, "interrupted; the pictures written so far are whole\n"),
        (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device\n"),
        (pl.NotFinite("no number", None, []), 1, "failed: no number\n"),
    ],
)
def test_exit_status(error, status, said, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "convert", fail)
    assert cli.main(["convert", "a", "b"]) == status
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "convert", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["convert", "a", "b"])


def test_the_licence_notice_is_given_once(sd_jax_, monkeypatch, tmp_path):
    load = pl.load

    def noticing(*args, **kwargs):
        warnings.warn("no harm", pl.LicenceNotice, stacklevel=2)
        warnings.warn("the float16 variant is used", stacklevel=2)
        return load(*args, **kwargs)

    def told() -> list[str]:
        _, _, err = sd_jax_("txt2img", "a cone")
        return [line for line in err.splitlines() if line.startswith("warning: ")]

    monkeypatch.setattr(pl, "load", noticing)
    both = ["warning: no harm", "warning: the float16 variant is used"]
    assert told() == told() == both, "there is no folder to note it in"
    monkeypatch.setattr(cli, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cli, "_start_jax", lambda device: "a device")
    assert told() == both and told() == both[1:]
