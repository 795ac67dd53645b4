"""Where a model comes from: "tiny", a hub id, a folder or a file -> its config, parameters and tokenizer.

Layouts: a diffusers folder (safetensors, torch's or Flax' own files), one CompVis file (.safetensors, .ckpt), and our
own single file ("native": our paths joined by "/", config and tokenizer in the metadata). Any of the three networks may
come from elsewhere (``parts``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.config import SDConfig, from_diffusers
from sd_jax.tokenizer import Tokenizer, load_tokenizer
from sd_jax.types import Params, RequestError, WeightsError
from sd_jax.weights import hub
from sd_jax.weights.files import (
    FOLDERS,
    TINY,
    Request,
    WeightFile,
    as_path,
    check_folder,
    choose_file,
    fetch_component,
    open_weights,
    paths_of,
    read_json,
    wanted_files,
)
from sd_jax.weights.metadata import (
    NATIVE,
    differences,
    folder_record,
    from_metadata,
    licence_of,
    own_config,
    own_record,
    tokenizer_from_dict,
)
from sd_jax.weights.other_models import recognise, recognise_config, v1_config
from sd_jax.weights.parameters import Parameter, choose_ema, complain, match, own_rows, set_aside, to_params
from sd_jax.weights.parts import Part, open_part
from sd_jax.weights.tables import COMPONENTS, COMPVIS_IGNORED, NAMES, POSITIONS, PREFIXES, table
from sd_jax.weights.torch_pickle import quoting

CLIP_REPO = "openai/clip-vit-large-patch14"  # whose tokenizer every v1 model uses
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "*_config.json", "special_tokens_map.json")


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
    parts: tuple[tuple[str, str], ...] = ()  # (component, where it was taken from instead)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that still lies in its files, the whole of it checked."""

    config: SDConfig
    parameters: Mapping[str, Parameter]  # by path: "unet/conv_in/kernel"
    tokenizer: Tokenizer
    report: Report
    record: Mapping[str, Any] | None = None  # what sd_jax noted when it wrote the file; see ``convert``

    @property
    def licence(self) -> str | None:
        """That of the released v1 weights, of whose terms users are to be told, where these have their shape."""
        return licence_of(self.config)

    def params(self, dtype: Any = "float32", place: Callable[[str, np.ndarray], Any] | None = None) -> Params:
        """Nested parameters {"clip", "unet", "vae"} in ``dtype``; see ``parameters.to_params``."""
        return to_params(self.parameters, dtype, place)


def open_source(
    source: str | Path = "tiny",
    *,
    revision: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    config: SDConfig | str | Path | None = None,
    parts: Mapping[str, str | Path] | None = None,
    verify: bool = True,
) -> Source:
    """Open a model and check it in full; its tensors are read later, by ``Source.params``.

    Args:
      source: "tiny" (the embedded model), a path, or on the hub owner/name, hf://owner/name, hf://owner/name/file; a
        path that exists wins.
      revision: branch, tag or commit, of ``source`` on the hub only.
      ema: True takes the averaged weights, False the others, None the averaged ones where both are there.
      variant: of the files of a diffusers folder, "fp16" say; components that have none are taken plain.
      tokenizer: replaces the source's own: a Tokenizer, a folder, or OpenAI's bpe_simple_vocab_16e6.txt.gz. A CompVis
        file has none and takes CLIP ViT-L/14's from the hub's cache.
      config: of a CompVis file, which has none; an SDConfig, a diffusers folder or a hub id. v1-4's by default.
      parts: networks to be taken from elsewhere, {"vae": "vae-ft-mse-840000-ema-pruned.ckpt"} say: "clip", "unet" or
        "vae" -> a file or folder of it alone or of a whole model, here or on the hub.
      verify: check what SHA-256 and CRC the files have. The structure is checked in any case.

    Raises:
      RequestError: no such source. WeightsError: it is broken, or of another model.
    """
    parts = {component: str(part) for component, part in (parts or {}).items()}
    if unknown := parts.keys() - set(COMPONENTS):
        raise RequestError(f"part {sorted(unknown)[0]!r} is none of a model's; use {', '.join(COMPONENTS)}")
    if variant is not None and not re.fullmatch(r"\w[\w-]*", variant):
        raise RequestError(f"variant {variant!r} is no part of a file's name; give fp16, say")
    request = Request(revision, ema, variant, tokenizer, config, verify, frozenset(parts))
    opened = open_whole(*locate(str(source), request), request)
    for component, part in parts.items():
        opened = _replaced(opened, component, part, open_part(component, part, opened.config, request))
    if wrong := opened.config.misfits:
        raise WeightsError(f"{source} has networks that do not go together: {wrong}; give parts of one kind of model")
    opened.tokenizer.check(opened.config.clip.vocab_size)
    return opened


def _replaced(base: Source, component: str, where: str, part: Part) -> Source:
    """``base`` with one network in place of its own."""
    report = dataclasses.replace(
        base.report,
        ema=base.report.ema if part.ema is None else part.ema,
        ignored=(*base.report.ignored, *part.file.ignored, *part.aside),
        foreign=(*base.report.foreign, *part.file.foreign),
        parts=(*base.report.parts, (component, where if part.revision is None else f"{where} at {part.revision}")),
    )
    return Source(part.config, {**base.parameters, **part.parameters}, base.tokenizer, report)


def open_whole(path: Path, commit: str | None, request: Request) -> Source:
    """A model that ``locate`` has found."""
    if path.is_dir():
        if request.config is not None:
            raise RequestError(f"{path} has its own configs; leave config out, it is for single files")
        return _open_folder(path, commit, request)
    if request.variant is not None:
        raise RequestError(f"{path} is one file, without variants; leave variant out")
    if commit is not None and request.verify:
        hub.verify([path])
    file = open_weights(path, verify=request.verify)
    if file.metadata.get("format") == NATIVE:
        if request.config is not None or request.ema is not None:
            raise RequestError(f"{path} has its own config and one set of weights; leave config and ema out")
        return _open_native(path, commit, file, request)
    return _open_compvis(path, commit, file, request)


def locate(source: str, request: Request) -> tuple[Path, str | None]:
    """-> (path, commit where it comes from the hub)."""
    path = TINY if source == "tiny" else as_path(source)
    if os.path.exists(path):
        if request.revision is not None:
            raise RequestError(
                f"revision {request.revision!r} is for the hub, and {source} is a local path; leave it out"
            )
        return path, None
    if (found := hub.parse(source)) is None:
        raise RequestError(
            f"there is no model {source!r}; give tiny, a folder or a file that exists, or a hub id (owner/name, or "
            "hf://owner/name/file)"
        )
    repo, file = found
    if file is None:
        return _fetch_model(repo, request)
    path = hub.fetch_file(repo, file, request.revision)
    return path, hub.commit(path)


# ---- diffusers folders ---------------------------------------------------------------------------------------------


def _fetch_model(repo: str, request: Request) -> tuple[Path, str | None]:
    """The configs and the tokenizer, then for each component the first of its weight files that the repository has."""
    small = ["model_index.json", "scheduler/*.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)]
    folder = hub.fetch(repo, [*small, *(f"{name}/config.json" for name in FOLDERS.values())], request.revision)
    commit = hub.commit(folder)
    for component, name in FOLDERS.items():
        if component not in request.skip:
            fetch_component(
                repo, commit or request.revision, name, wanted_files(component, request.variant, request.ema)
            )
    return folder, commit


def _open_folder(folder: Path, commit: str | None, request: Request) -> Source:
    if request.verify:
        check_folder(folder)
    config = folder_config(folder, request.skip)
    if request.tokenizer is None and not (folder / "tokenizer").is_dir():
        raise WeightsError(f"{folder} has no tokenizer/ folder; give one as tokenizer")
    tokenizer = _tokenizer(request, config, lambda: folder / "tokenizer")
    chosen = {
        c: choose_file(folder / name, c, request.variant, request.ema)
        for c, name in FOLDERS.items()
        if c not in request.skip
    }
    if commit is not None and request.verify:
        hub.verify([shard for path, _ in chosen.values() for shard in paths_of(path)])
    files = {c: open_weights(path, verify=request.verify) for c, (path, _) in chosen.items()}
    parameters, problems, ignored = {}, [], []
    for component, file in files.items():
        rows = {f"{component}/{row.path}": row for row in table("diffusers", component, config)}
        tensors, aside = set_aside(file.tensors, [POSITIONS])
        ignored += [*file.ignored, *aside]
        found, wrong = match(rows, config, tensors)
        parameters |= found
        problems += wrong
    complain(str(folder), problems)
    notes = tuple(note for _, note in chosen.values() if note)
    if request.variant is not None and len(notes) == len(chosen) > 0:
        raise RequestError(f"{folder} has no variant {request.variant}; leave variant out")
    report = Report(
        str(folder),
        "diffusers",
        commit,
        request.ema,
        tuple(ignored + unread_folders(folder)),
        tuple(name for file in files.values() for name in file.foreign),
        notes,
    )
    return Source(config, parameters, tokenizer, report, folder_record(folder))


def unread_folders(folder: Path) -> list[str]:
    """Models in a diffusers folder that are no part of text-to-image: the safety checker and what it needs."""
    return [f"{name}/" for name in ("safety_checker", "feature_extractor", "image_encoder") if (folder / name).is_dir()]


def folder_config(folder: Path, skip: frozenset[str] = frozenset()) -> SDConfig:
    """The configs of a diffusers folder; v1-4's for components in ``skip`` that it lacks.

    Raises RequestError where they are missing, or are another model's.
    """
    files = {name: folder / name / "config.json" for name in FOLDERS.values()}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    for component in skip:
        if not files[FOLDERS[component]].is_file():
            del files[FOLDERS[component]]
    missing = [str(file.relative_to(folder)) for file in files.values() if not file.is_file()]
    if missing:
        raise WeightsError(f"{folder} is not a diffusers folder of a whole model: it has no {', '.join(missing)}")
    parsed = {name: read_json(file) for name, file in files.items()}
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if (other := recognise_config(index, parsed.get("unet", {}))) is not None:
        raise WeightsError(f"{folder} is {other}")
    try:
        return from_diffusers(**parsed)
    except RequestError as e:
        raise WeightsError(f"{folder}: {quoting(str(e))}") from None


# ---- single files --------------------------------------------------------------------------------------------------


def _open_compvis(path: Path, commit: str | None, file: WeightFile, request: Request) -> Source:
    if (other := recognise({name: tuple(tensor.shape) for name, tensor in file.tensors.items()})) is not None:
        raise WeightsError(f"{path} is {other}")
    config, tokenizer_folder = _compvis_config(path, file, request)
    components = [c for c in COMPONENTS if c not in request.skip]
    rows = {f"{c}/{row.path}": row for c in components for row in table("compvis", c, config)}
    rows, chosen, used = choose_ema(path, rows, file.tensors, request.ema)
    skipped = tuple(PREFIXES[c] for c in request.skip) + (("model_ema.",) if "unet" in request.skip else ())
    chosen = {name: tensor for name, tensor in chosen.items() if not name.startswith(skipped)}
    chosen, aside = set_aside(chosen, COMPVIS_IGNORED)
    for c in components:
        if chosen and not any(name.startswith(PREFIXES[c]) for name in chosen) and not (c == "unet" and used):
            raise WeightsError(f"{path} has no {NAMES[c]}; take one from elsewhere, with --part {c} FILE (parts=)")
    parameters, problems = match(rows, config, chosen)
    complain(str(path), problems)
    tokenizer = _tokenizer(request, config, lambda: tokenizer_folder or hub.fetch(CLIP_REPO, TOKENIZER_FILES))
    both = used and request.ema is None and any(name.startswith(PREFIXES["unet"]) for name in file.tensors)
    notes = ("both averaged (EMA) and plain weights are there; the averaged ones are used",) if both else ()
    report = Report(str(path), "compvis", commit, used, (*file.ignored, *aside), file.foreign, notes)
    return Source(config, parameters, tokenizer, report, own_record(path, file))


def _compvis_config(path: Path, file: WeightFile, request: Request) -> tuple[SDConfig, Path | None]:
    """-> (the config that was asked for, that the file carries, or v1-4's; the tokenizer of a folder it came from)."""
    own = own_config(path, file)
    if request.config is None:
        return own or v1_config(file.tensors), None
    if isinstance(request.config, SDConfig):
        config, tokenizer = request.config, None
    else:
        folder = _locate_config(str(request.config))
        config = folder_config(folder)
        tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else None
    if own is not None and (wrong := differences(config, own)):
        raise WeightsError(f"{path} was written with another config than the one given ({wrong}); leave config out")
    return config, tokenizer


def _locate_config(config: str) -> Path:
    path = as_path(config)
    if os.path.isdir(path):
        return path
    match hub.parse(config):
        case (repo, None):
            configs = (f"{name}/config.json" for name in FOLDERS.values())
            return hub.fetch(repo, [*configs, "scheduler/*.json", "model_index.json", "tokenizer/*"])
    raise RequestError(f"config {config!r} is neither a diffusers folder nor a hub id")


def _open_native(path: Path, commit: str | None, file: WeightFile, request: Request) -> Source:
    config = own_config(path, file)
    own = functools.partial(from_metadata, path, lambda: tokenizer_from_dict(json.loads(file.metadata["tokenizer"])))
    tokenizer = _tokenizer(request, config, own)
    skipped = tuple(f"{c}/" for c in request.skip)
    rows = {path: row for path, row in own_rows(config).items() if not path.startswith(skipped)}
    tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(skipped)}
    parameters, problems = match(rows, config, tensors)
    complain(str(path), problems)
    return Source(config, parameters, tokenizer, Report(str(path), "native", commit), own_record(path, file))


def _tokenizer(request: Request, config: SDConfig, own: Callable[[], Tokenizer | Path]) -> Tokenizer | None:
    """The one that was asked for, or the model's own, of the size of the text encoder's vocabulary."""
    if not request.needs_tokenizer:
        return None
    tokenizer = own() if request.tokenizer is None else request.tokenizer
    try:
        tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    except RequestError as e:
        raise RequestError(quoting(str(e))) from None
    tokenizer.check(config.clip.vocab_size)
    return tokenizer
