"""Files of a model on the Hugging Face hub, through its cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from sd_jax.types import RequestError, WeightsError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHT_FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth", ".msgpack")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(source: str) -> bool:
    """Whether it has the form owner/name, and not that of a file of weights in a folder."""
    return _ID.fullmatch(source) is not None and Path(source).suffix.lower() not in _WEIGHT_FILES


def fetch(repo: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """A local folder with those files of ``repo`` that match ``patterns``; its name is the commit.

    Without a network, and for a commit that is here already, what the cache holds is taken. Raises RequestError: one
    sentence with the address and the way out.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = list(patterns)
    if not is_hub_id(repo):
        raise RequestError(f"{repo!r} is not a hub id; it has the form owner/name")
    address = f"https://huggingface.co/{repo}" + (f"/tree/{revision}" if revision else "")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise RequestError(
            f"{address} is gated: accept its licence there with your account, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise RequestError(f"{repo} has no revision {revision!r}; see {address.split('/tree')[0]}/commits") from None
    except errors.RepositoryNotFoundError:
        raise RequestError(
            f"{address} does not exist, or not for you; check the name, or run `hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise RequestError(
            f"{address} cannot be reached and its files are not in the cache ({', '.join(patterns)}); connect once and "
            f"run `hf download {repo}`, or give a folder"
        ) from None
    # HTTPError is that of the HTTP library; hf_xet, which downloads large files, reports a lost line by RuntimeError.
    except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise RequestError(f"{address} cannot be fetched: {reason[0]}; try again, or give a folder") from None


def commit(folder: Path) -> str | None:
    """The commit whose files a folder of the cache holds."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def verify(file: Path) -> None:
    """Check a cached large file against the SHA-256 that the hub gave it, which is the name of its blob.

    Raises WeightsError where they differ. A file that is not such a blob passes.
    """
    blob = file.resolve()
    if blob == file or not _SHA256.fullmatch(blob.name):
        return
    with open(blob, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != blob.name:
            raise WeightsError(f"{file} does not match the SHA-256 of the hub; delete {blob} and fetch it again")
