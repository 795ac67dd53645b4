"""Files of a model on the Hugging Face hub, through its cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sd_jax.types import RequestError, WeightsError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(rf"hf://(?P<repo>{_ID.pattern})(?:/(?P<file>[^/\x00-\x1f]+(?:/[^/\x00-\x1f]+)*))?")  # as fsspec's
WEIGHT_FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth", ".msgpack")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHERS = 4  # files hashed at a time; a model has no more that are large
# What an error of the HTTP library may quote: the header with the token, a password or a signature in an address.
_SECRETS = re.compile(r"(?<=Bearer )[^\s'\"]+|(?<=://)[^/\s'\"]+(?=@)|\?[^\s'\"]*=[^\s'\"]*")


def parse(source: str) -> tuple[str, str | None] | None:
    """-> (repository, file in it or None) of owner/name, hf://owner/name or hf://owner/name/path/to/file; else None.

    Without the scheme, what ends like a file of weights is a path that is missing here, not a repository.
    """
    if (match := _URL.fullmatch(source)) is not None:
        file = match["file"]
        return None if file is not None and {".", ".."} & set(file.split("/")) else (match["repo"], file)
    is_id = _ID.fullmatch(source) is not None and Path(source).suffix.lower() not in WEIGHT_FILES
    return (source, None) if is_id else None


def fetch(repo: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """A local folder with those files of ``repo`` that match ``patterns``; its name is the commit.

    Where the hub cannot be reached, what the cache holds is taken; for a commit that is here already it is not asked.
    On a terminal a bar shows how far it is. Raises RequestError: one sentence with the address and the way out.
    """
    import huggingface_hub

    patterns = list(patterns)
    with _one_bar(repo) as bar:
        options = {"allow_patterns": patterns, "tqdm_class": bar}
        return _fetch(huggingface_hub.snapshot_download, repo, patterns, revision, options)


def fetch_file(repo: str, file: str, revision: str | None = None) -> Path:
    """The local path of one file of ``repo``; the rest is as with ``fetch``."""
    import huggingface_hub

    return _fetch(huggingface_hub.hf_hub_download, repo, [file], revision, {"filename": file})


def _fetch(
    download: Callable[..., str], repo: str, files: list[str], revision: str | None, options: dict[str, Any]
) -> Path:
    from huggingface_hub import constants, errors

    if not _ID.fullmatch(repo):
        raise RequestError(f"{repo!r} is not a hub id; it has the form owner/name")
    home = f"{_tidy(constants.ENDPOINT)}/{repo}"
    address = f"{home}/tree/{revision}" if revision else home
    silence = None
    try:
        if _COMMIT.fullmatch(revision or "") and ("filename" in options or _is_listed(repo, revision)):
            with contextlib.suppress(errors.LocalEntryNotFoundError):  # the files of a commit do not change
                return Path(download(repo, revision=revision, local_files_only=True, **options))
        silence = _silence(repo, revision)
        return Path(download(repo, revision=revision, local_files_only=silence is not None, **options))
    except errors.GatedRepoError:
        raise RequestError(
            f"{address} is gated: accept its licence there with your account, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise RequestError(f"{repo} has no revision {revision or 'main'!r}; see {home}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise RequestError(
            f"{address} does not exist, or not for you; check the name, or run `hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as e:
        run = shlex.join(["hf", "download", repo, *([options["filename"]] if "filename" in options else [])])
        raise RequestError(
            f"{address} cannot be reached ({silence or _reason(e.__cause__ or e)}) and its files are not in the cache "
            f"({', '.join(files)}); connect once and run `{run}`, or give a folder"
        ) from None
    except errors.EntryNotFoundError:
        raise RequestError(f"{home} has no file {', '.join(files)}; see {home}/tree/{revision or 'main'}") from None
    # HTTPError is that of the HTTP library; hf_xet, which downloads large files, reports a lost line by RuntimeError;
    # an answer that is not the hub's is no JSON, a ValueError like what cannot be a name or a token.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as e:
        if isinstance(e, errors.HfHubHTTPError) and e.response.status_code == 401:
            raise RequestError(
                f"{home} refuses your token ({_reason(e)}); run `hf auth login`, or correct HF_TOKEN"
            ) from None
        raise RequestError(f"{address} cannot be fetched: {_reason(e)}; try again, or give a folder") from None


def _is_listed(repo: str, commit: str) -> bool:
    """Whether the cache has the names of all files of a commit, and so can tell which of them it lacks."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # older ones keep no such list
        return False
    try:
        huggingface_hub.get_cached_repo_tree(repo, revision=commit)
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return False
    return True


def _silence(repo: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked about ``repo``, in a few words; None where it answers, whatever it says.

    The library itself would wait without end, or try again for half a minute with a warning for each time.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError:
        return None
    except errors.HTTPError as e:
        return _reason(e)
    return None


def _reason(error: BaseException) -> str:
    """The first line of what a library says, without secrets."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _tidy(lines[0])


def _tidy(text: str) -> str:
    return _SECRETS.sub("...", text)


@contextlib.contextmanager
def _one_bar(name: str) -> Iterator[type]:
    """A class for the library's bars that shows only that of the bytes, on a terminal, for as long as it is needed.

    The library has two more, shows one of them in files too, and leaves all of them open and on the screen.
    """
    from huggingface_hub.utils import tqdm

    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            if options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer"):
                options |= {"desc": name, "bar_format": None, "leave": False}
            else:
                options["disable"] = True
            super().__init__(*args, **options)
            bars.append(self)

        def set_description(self, *_: Any, **options: Any) -> None:
            pass  # "Reconstruction complete", and the rate, which the bar has anyway

        set_postfix_str = set_description

    try:
        yield Bar
    finally:
        for bar in bars:
            bar.close()


def commit(path: Path) -> str | None:
    """The commit that a folder or a file in the cache is of."""
    for folder, name in itertools.pairwise(path.parts):
        if folder == "snapshots" and _COMMIT.fullmatch(name):
            return name
    return None


def verify(files: Iterable[Path]) -> None:
    """Check cached large files against the SHA-256 that the hub gave each, which is the name of its blob.

    Raises WeightsError for the first that differs. A file that is not such a blob passes.
    """
    with concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool:  # hashing leaves the GIL to others
        for _ in pool.map(_verify, files):
            pass


def _verify(file: Path) -> None:
    if (digest := _digest(file)) is None:
        return
    with open(file, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != digest:
            raise WeightsError(
                f"{file} does not match the SHA-256 of the hub; delete {file.resolve()} and fetch it again"
            )


def _digest(file: Path) -> str | None:
    """The first SHA-256 on the way along symbolic links; the last may be Xet's, in a store that repositories share."""
    while file.is_symlink():
        file = file.parent / os.readlink(file)
        if _SHA256.fullmatch(file.name):
            return file.name
    return None
