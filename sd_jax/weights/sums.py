"""Lists of SHA-256 in the format of the ``sha256sum`` program, which checks them without sd_jax."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"


def sha256(path: str | os.PathLike) -> str | None:
    """64 hex digits; None if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def digests(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """``sha256`` of files by their names in ``folder``, several at a time: hashing leaves the interpreter's lock."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(sha256, [folder / name for name in names]), strict=True))


def to_text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def from_text(text: str) -> dict[str, str]:
    """The inverse of ``to_text``; lines of another form are left out."""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}


def write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
