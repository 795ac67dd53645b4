"""One network, "clip", "unet" or "vae", from a file or folder of it alone or of a whole model.

So are the autoencoders sd-vae-ft-mse and -ema used, and UNets and text towers that were trained on their own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from sd_jax.config import SDConfig, from_diffusers
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import hub
from sd_jax.weights.files import (
    FOLDERS,
    TINY,
    Request,
    WeightFile,
    as_path,
    choose_file,
    fetch_component,
    open_weights,
    paths_of,
    read_json,
    wanted_files,
)
from sd_jax.weights.metadata import own_config
from sd_jax.weights.other_models import recognise, v1_config
from sd_jax.weights.parameters import Parameter, choose_ema, complain, match, own_rows, set_aside
from sd_jax.weights.tables import NAMES, PART_IGNORED, PREFIXES, Row, table


@dataclasses.dataclass(frozen=True)
class Part:
    """A network that still lies in its file, the whole of it checked."""

    config: SDConfig  # the model's that it goes into, with this network's
    parameters: Mapping[str, Parameter]
    file: WeightFile
    aside: tuple[str, ...]  # tensors that are no parameters of v1
    ema: bool | None  # averaged or not, where the file has both
    revision: str | None  # commit on the hub


def open_part(component: str, part: str, config: SDConfig, request: Request) -> Part:
    """Open ``part``, a path or an address on the hub, for a model of ``config``.

    Its own config is taken from its file, where sd_jax wrote that, or the config.json beside it; without one it has to
    fit ``config``. Raises RequestError where there is no such part; WeightsError where it is broken, or another thing.
    """
    folder, path, revision = _locate(component, part, request)
    if revision is not None and request.verify:
        hub.verify(paths_of(path))
    file = open_weights(path, verify=request.verify)
    if (whole := own_config(path, file)) is not None:
        own = getattr(whole, component)
    elif folder is not None and (folder / "config.json").is_file():
        own = getattr(from_diffusers(**{FOLDERS[component]: read_json(folder / "config.json")}), component)
    else:
        own = getattr(config, component)
        if component == "unet":
            own = dataclasses.replace(own, in_channels=v1_config(file.tensors).unet.in_channels)
    config = dataclasses.replace(config, **{component: own})
    parameters, aside, ema = _match(path, file, component, config, request.ema)
    return Part(config, parameters, file, aside, ema, revision)


def _locate(component: str, part: str, request: Request) -> tuple[Path | None, Path, str | None]:
    """-> (the folder whose config.json it has, its file of weights, the commit where it comes from the hub)."""
    path, name = TINY if part == "tiny" else as_path(part), FOLDERS[component]
    if os.path.isfile(path):
        return path.parent, path, None
    revision = None
    if not os.path.isdir(path):
        if (found := hub.parse(part)) is None:
            raise RequestError(
                f"there is no {NAMES[component]} {part!r}; give a file or folder that exists, or a hub id"
            )
        repo, inner = found
        if inner is not None:
            path = hub.fetch_file(repo, inner)
            return None, path, hub.commit(path)
        path = hub.fetch(repo, ["config.json", f"{name}/config.json"])
        revision = hub.commit(path)
        inside = name if (path / name / "config.json").is_file() else "."
        fetch_component(repo, revision, inside, wanted_files(component, request.variant, request.ema))
    folder = path / name if (path / name).is_dir() else path
    return folder, choose_file(folder, component, request.variant, request.ema)[0], revision


def _match(
    path: Path, file: WeightFile, component: str, config: SDConfig, ema: bool | None
) -> tuple[dict[str, Parameter], tuple[str, ...], bool | None]:
    """-> (parameters, tensors left aside, averaged or not). Of the ways to name a network, that which knows most of the
    file's names is its own: CompVis' in a whole model and alone, diffusers' and ours.
    """
    prefix, tensors, used = PREFIXES[component], dict(file.tensors), None
    compvis = {f"{component}/{row.path}": row for row in table("compvis", component, config)}
    diffusers = {f"{component}/{row.path}": row for row in table("diffusers", component, config)}
    own = {path: row for path, row in own_rows(config).items() if path.startswith(f"{component}/")}
    alone = {
        path: dataclasses.replace(row, names=tuple(name.removeprefix(prefix) for name in row.names))
        for path, row in compvis.items()
    }
    if component == "unet":
        compvis, tensors, used = choose_ema(path, compvis, tensors, ema)
    ways = [(compvis, "model_ema." if used else prefix), (alone, ""), (diffusers, ""), (own, f"{component}/")]

    def known(rows: Mapping[str, Row]) -> int:
        return sum(any(name in tensors for name in row.names) for row in rows.values())

    rows, start = max(ways, key=lambda way: known(way[0]))
    if known(rows) == 0:
        other = recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise WeightsError(f"{path} holds no {NAMES[component]} of v1" + (f"; it is {other}" if other else ""))
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    mine, aside = set_aside(mine, PART_IGNORED)
    parameters, problems = match(rows, config, mine)
    complain(str(path), problems)
    return parameters, aside, used
