"""Where a model comes from: "tiny", a hub id, a folder or a file -> its config, parameters and tokenizer.

Layouts: a diffusers folder (safetensors, torch's or Flax' own files), one CompVis file (.safetensors, .ckpt), and our
own single file ("native": our paths joined by "/", config and tokenizer in the metadata).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.config import SD_V1_4, CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig, checked, from_diffusers
from sd_jax.tokenizer import Tokenizer, load_tokenizer
from sd_jax.types import Params, RequestError, WeightsError
from sd_jax.weights import hub
from sd_jax.weights.other_models import recognise, recognise_config
from sd_jax.weights.parameters import Parameter, Tensor, complain, match, own_rows, set_aside, to_params
from sd_jax.weights.safetensors_file import open_safetensors
from sd_jax.weights.tables import COMPONENTS, Row, table
from sd_jax.weights.torch_zip import open_checkpoint

TINY = Path(__file__).parents[1] / "tiny"
CLIP_REPO = "openai/clip-vit-large-patch14"  # whose tokenizer every v1 model uses
LICENCE = "CreativeML OpenRAIL-M"
NATIVE = "sd_jax"  # metadata "format" of our own files

FOLDERS = {"clip": "text_encoder", "unet": "unet", "vae": "vae"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "*_config.json", "special_tokens_map.json")
_PLAIN_UNET = "model.diffusion_model."  # what a CompVis file's weights that are not averaged begin with
MANY_EMA = 100  # more keys than this under model_ema. mean that the averaged weights are there

# In files of whole models, but no weights: integer positions, the schedule's tables, the VAE's training loss.
_POSITIONS = r".*\bposition_ids"
_COMPVIS_IGNORED = (
    _POSITIONS,
    r"model_ema\.(decay|num_updates)",
    r"first_stage_model\.loss\..*",
    r"(alphas_cumprod.*|betas|logvar|scale_factor|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights)",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was taken from where."""

    path: str
    layout: str  # "diffusers", "compvis" or "native"
    revision: str | None = None  # commit on the hub
    ema: bool | None = None  # averaged weights or not, where the file has both
    ignored: tuple[str, ...] = ()  # entries that are no weights
    foreign: tuple[str, ...] = ()  # classes that a pickle names, none of which was imported
    notes: tuple[str, ...] = ()  # sentences for the user


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that still lies in its files, the whole of it checked."""

    config: SDConfig
    parameters: Mapping[str, Parameter]  # by path: "unet/conv_in/kernel"
    tokenizer: Tokenizer
    report: Report

    @property
    def licence(self) -> str | None:
        """That of the released v1 weights, of whose terms users are to be told, where these have their shape."""
        return LICENCE if self.config.unet.widths == SD_V1_4.unet.widths else None

    def params(self, dtype: Any = "float32", place: Callable[[str, np.ndarray], Any] | None = None) -> Params:
        """Nested parameters {"clip", "unet", "vae"} in ``dtype``; see ``parameters.to_params``."""
        return to_params(self.parameters, dtype, place)


def open_source(
    source: str | Path = "tiny",
    *,
    revision: str | None = None,
    ema: bool | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    config: SDConfig | str | Path | None = None,
) -> Source:
    """Open a model and check it in full; its tensors are read later, by ``Source.params``.

    Args:
      source: "tiny" (the embedded model), a path, or a hub id; a path that exists wins.
      revision: branch, tag or commit, of a hub id only.
      ema: True takes the averaged weights, False the others, None the averaged ones where both are there.
      tokenizer: replaces the source's own: a Tokenizer, a folder, or OpenAI's bpe_simple_vocab_16e6.txt.gz. A CompVis
        file has none and takes CLIP ViT-L/14's from the hub's cache.
      config: of a CompVis file, which has none; an SDConfig, a diffusers folder or a hub id. v1-4's by default.

    Raises:
      RequestError: no such source. WeightsError: it is broken, or of another model.
    """
    path, commit = _locate(str(source), revision, ema)
    if path.is_dir():
        if config is not None:
            raise RequestError(f"{path} has its own configs; leave config out, it is for single files")
        return _open_folder(path, commit, ema, tokenizer)
    tensors, metadata, ignored, foreign = _open_file(path)
    if metadata.get("format") == NATIVE:
        if config is not None or ema is not None:
            raise RequestError(f"{path} has its own config and one set of weights; leave config and ema out")
        return _open_native(path, tensors, metadata, tokenizer)
    report = Report(str(path), "compvis", ignored=ignored, foreign=foreign)
    return _open_compvis(path, tensors, report, ema, tokenizer, config)


def _locate(source: str, revision: str | None, ema: bool | None) -> tuple[Path, str | None]:
    """-> (path, commit where it comes from the hub)."""
    path = TINY if source == "tiny" else _as_path(source)
    if os.path.exists(path):
        if revision is not None:
            raise RequestError(f"revision {revision!r} is for hub ids, and {source} is a local path; leave it out")
        return path, None
    if not hub.is_hub_id(source):
        raise RequestError(
            f"there is no model {source!r}; give tiny, a hub id (owner/name), a folder or a file that exists"
        )
    return _fetch_model(source, revision, ema)


# ---- diffusers folders ---------------------------------------------------------------------------------------------


def _weight_files(component: str, ema: bool | None) -> list[str]:
    """Names that a component's weights may have, the preferred first."""
    stem = "model" if component == "clip" else "diffusion_pytorch_model"
    torch = "pytorch_model" if component == "clip" else stem
    flax = "flax_model" if component == "clip" else "diffusion_flax_model"
    if ema is False and component == "unet":
        return [f"{stem}.non_ema.safetensors", f"{torch}.non_ema.bin"]
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{torch}.bin"]
    return [*names, f"{stem}.fp16.safetensors", f"{torch}.fp16.bin", f"{flax}.msgpack"]


def _fetch_model(repo: str, revision: str | None, ema: bool | None) -> tuple[Path, str | None]:
    """The configs and the tokenizer, then for each component the first of its weight files that the repository has."""
    small = ["model_index.json", "scheduler/*.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)]
    folder = hub.fetch(repo, [*small, *(f"{name}/config.json" for name in FOLDERS.values())], revision)
    commit = hub.commit(folder)
    for component, name in FOLDERS.items():
        files = _weight_files(component, ema)
        if any((folder / name / file).exists() for file in files if not file.endswith(".index.json")):
            continue  # the files of a commit do not change
        for file in files:
            wanted = [f"{name}/{file}"]
            if file.endswith(".index.json"):
                wanted.append(f"{name}/{file.removesuffix('.index.json').removesuffix('.safetensors')}-*.safetensors")
            folder = hub.fetch(repo, wanted, commit or revision)
            if (folder / name / file).exists():
                break
    return folder, commit


def _open_folder(folder: Path, commit: str | None, ema: bool | None, tokenizer: Any) -> Source:
    config = folder_config(folder)
    if tokenizer is None and not (folder / "tokenizer").is_dir():
        raise WeightsError(f"{folder} has no tokenizer/ folder; give one as tokenizer")
    tokenizer = _as_tokenizer(tokenizer if tokenizer is not None else folder / "tokenizer")
    tokenizer.check(config.clip.vocab_size)
    parameters, problems, ignored, foreign, notes = {}, [], [], [], []
    for component, name in FOLDERS.items():
        names = _weight_files(component, ema)
        file = next((folder / name / n for n in names if (folder / name / n).is_file()), None)
        if file is None:
            raise WeightsError(f"{folder / name} has none of {', '.join(names)}; fetch the whole model")
        if ".fp16." in file.name:
            notes.append(f"{name}: only the float16 variant is there, and it is used")
        tensors, more_ignored, more_foreign = _open_component(file)
        ignored += more_ignored
        foreign += more_foreign
        rows = {f"{component}/{row.path}": row for row in table("diffusers", component, config)}
        tensors, aside = set_aside(tensors, [_POSITIONS])
        ignored += aside
        found, wrong = match(rows, config, tensors)
        parameters |= found
        problems += wrong
    complain(str(folder), problems)
    report = Report(str(folder), "diffusers", commit, ema, tuple(ignored), tuple(foreign), tuple(notes))
    return Source(config, parameters, tokenizer, report)


def folder_config(folder: Path) -> SDConfig:
    """The configs of a diffusers folder. Raises RequestError where they are missing, or are another model's."""
    files = {name: folder / name / "config.json" for name in FOLDERS.values()}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    missing = [str(file.relative_to(folder)) for file in files.values() if not file.is_file()]
    if missing:
        raise WeightsError(f"{folder} is not a diffusers folder of a whole model: it has no {', '.join(missing)}")
    parsed = {name: _read_json(file) for name, file in files.items()}
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if (other := recognise_config(index, parsed["unet"])) is not None:
        raise WeightsError(f"{folder} is {other}")
    return from_diffusers(**parsed)


def _open_component(file: Path) -> tuple[Mapping[str, Tensor], list[str], list[str]]:
    """-> (tensors under diffusers' names, entries ignored, globals not run)."""
    if file.name.endswith(".index.json"):
        tensors: dict[str, Tensor] = {}
        index = _read_json(file).get("weight_map")
        parts = sorted({str(part) for part in index.values()}) if isinstance(index, dict) else []
        missing = [part for part in parts if "/" in part or not (file.parent / part).is_file()]
        if missing or not parts:
            raise WeightsError(
                f"{file} names {', '.join(missing) or 'no files'}, missing beside it; fetch the whole model"
            )
        for part in parts:
            hub.verify(file.parent / part)
            tensors |= open_safetensors(file.parent / part)[0]
        return tensors, [], []
    hub.verify(file)
    if file.suffix == ".msgpack":
        from sd_jax.weights.flax_file import open_flax

        return open_flax(file), [], []
    tensors, _, ignored, foreign = _open_file(file)
    return tensors, list(ignored), list(foreign)


# ---- single files --------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """-> (tensors, metadata, entries ignored, globals not run), whichever the suffix."""
    try:
        with open(path, "rb") as f:
            head = f.read(16)
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror}); check its permissions") from None
    if head[:2] == b"PK" or (path.suffix in (".ckpt", ".bin", ".pt", ".pth") and head[8:9] != b"{"):
        file = open_checkpoint(path)
        return file.tensors, {}, tuple(file.ignored), tuple(file.foreign)
    tensors, metadata = open_safetensors(path)
    return tensors, metadata, (), ()


def _open_compvis(
    path: Path, tensors: Mapping[str, Tensor], report: Report, ema: bool | None, tokenizer: Any, config: Any
) -> Source:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if (other := recognise(shapes)) is not None:
        raise WeightsError(f"{path} is {other}")
    tokenizer_folder = None
    if config is None:
        config = SD_V1_4
        inputs = shapes.get(f"{_PLAIN_UNET}input_blocks.0.0.weight", ())[1:2]
        if inputs == (9,):  # the inpainting model: a mask and the latents of the masked image come along
            config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=9))
    elif not isinstance(config, SDConfig):
        folder = _locate_config(str(config))
        config = folder_config(folder)
        tokenizer_folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else None
    rows = {f"{c}/{row.path}": row for c in COMPONENTS for row in table("compvis", c, config)}
    rows, chosen, used = _choose_ema(path, rows, tensors, ema)
    chosen, aside = set_aside(chosen, _COMPVIS_IGNORED)
    parameters, problems = match(rows, config, chosen)
    complain(str(path), problems)
    if tokenizer is None:
        tokenizer = tokenizer_folder or hub.fetch(CLIP_REPO, TOKENIZER_FILES)
    tokenizer = _as_tokenizer(tokenizer)
    tokenizer.check(config.clip.vocab_size)
    both = used and any(name.startswith(_PLAIN_UNET) for name in tensors)
    note = "both averaged (EMA) and plain weights are there; the averaged ones are used"
    ignored = (*report.ignored, *aside)
    report = dataclasses.replace(report, ignored=ignored, ema=used, notes=(note,) if both and ema is None else ())
    return Source(config, parameters, tokenizer, report)


def _locate_config(config: str) -> Path:
    path = _as_path(config)
    if os.path.isdir(path):
        return path
    if not hub.is_hub_id(config):
        raise RequestError(f"config {config!r} is neither a diffusers folder nor a hub id")
    files = [
        *(f"{name}/config.json" for name in FOLDERS.values()),
        "scheduler/*.json",
        "model_index.json",
        "tokenizer/*",
    ]
    return hub.fetch(config, files)


def _choose_ema(
    path: Path, rows: dict[str, Row], tensors: Mapping[str, Tensor], ema: bool | None
) -> tuple[dict[str, Row], dict[str, Tensor], bool | None]:
    """CompVis keeps the averaged UNet as model_ema.<name without dots>. -> (rows, tensors, which, if both exist)."""
    averaged = {name for name in tensors if name.startswith("model_ema.")}
    there = len(averaged) > MANY_EMA
    if ema is True and not there:
        raise WeightsError(f"{path} has no averaged (EMA) weights beside its own; leave ema out")
    plain = {name: tensor for name, tensor in tensors.items() if name not in averaged}
    if not there:
        return rows, plain, None
    if ema is False:
        return rows, plain, False

    def of_ema(name: str) -> str:
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    chosen = {
        path: dataclasses.replace(row, names=tuple(map(of_ema, row.names)))
        for path, row in rows.items()
        if path.startswith("unet/")
    }
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PLAIN_UNET)}
    return rows | chosen, others, True


def _open_native(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], tokenizer: Any) -> Source:
    try:
        config = config_from_dict(json.loads(metadata["config"]))
        if tokenizer is None:
            tokenizer = tokenizer_from_dict(json.loads(metadata["tokenizer"]))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(
            f"{path} has a config or tokenizer in its metadata that cannot be used ({e}); convert it again"
        ) from None
    tokenizer = _as_tokenizer(tokenizer)
    tokenizer.check(config.clip.vocab_size)
    parameters, problems = match(own_rows(config), config, tensors)
    complain(str(path), problems)
    return Source(config, parameters, tokenizer, Report(str(path), "native"))


def config_from_dict(values: dict[str, Any]) -> SDConfig:
    """The inverse of ``dataclasses.asdict``, through JSON. Raises KeyError, TypeError and RequestError."""

    def make(kind: type, fields: dict[str, Any]) -> Any:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    parts = {"clip": CLIPConfig, "unet": UNetConfig, "vae": VAEConfig, "noise": NoiseConfig}
    return SDConfig(**{name: checked(name, make(parts[name], fields)) for name, fields in values.items()})


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """The inverse of ``tokenizer_to_dict``."""
    vocab = {token: i for i, token in enumerate(values["vocab"])}
    return Tokenizer(
        vocab, tuple(tuple(merge.split(" ")) for merge in values["merges"]), values["pad"], tuple(values["words"])
    )


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """A JSON form: tokens in order of their ids, merges in order of priority."""
    tokens = sorted(tokenizer.vocab, key=tokenizer.vocab.__getitem__)
    merges = [" ".join(merge) for merge in tokenizer.merges]
    return {"vocab": tokens, "merges": merges, "pad": tokenizer.pad, "words": list(tokenizer.words)}


def _as_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, this leaves a "~" whose home is unknown alone


def _as_tokenizer(tokenizer: Tokenizer | str | Path) -> Tokenizer:
    return tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise WeightsError(f"{file} is not JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a {type(value).__name__} where an object is expected; fetch it again")
    return value
