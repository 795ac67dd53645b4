"""A zip archive of uncompressed members, mapped into memory: names to bytes, without a copy.

``zipfile`` reads any directory it is given, however long, and takes the last of two members of one name. Here a
directory is checked as if an enemy had written it, in bounded time: members that are compressed, encrypted, doubled,
named like a path out of the archive, or together larger than the file are refused. Zip64, which files of 4 GB need, is
read.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable

from sd_jax.types import WeightsError
from sd_jax.weights.mapped import MappedFile
from sd_jax.weights.torch_pickle import HOSTILE, short

MAX_MEMBERS = 1 << 16
MAX_DIRECTORY = 16 << 20  # bytes; with MAX_MEMBERS it bounds the time a hostile directory can take
WIDE = 0xFFFFFFFF  # a 32-bit field that says: look in the zip64 one


@dataclasses.dataclass(frozen=True)
class Member:
    header: int  # where its local header starts
    size: int
    crc: int


class StoredZip:
    """The members of a zip by name.

    ``expected`` may say how many bytes a file without its end should have, given the bytes that are there. Raises
    WeightsError, here and in ``view`` and ``read``.
    """

    def __init__(self, file: MappedFile, expected: Callable[[memoryview], int | None] = lambda data: None):
        self.file, self.path, self.data = file, file.path, file.data
        path, data = self.path, self.data
        try:
            self.members = _directory(path, data)
        except _CutShort as e:
            size = expected(data)
            more = f", more than {size} were expected" if size else ""
            raise WeightsError(
                f"{path} is cut short or damaged: {e} ({len(data)} bytes are here{more}); download it again"
            ) from None
        # torch.serialization.set_crc32_options(False) writes zeros.
        self.has_crc = any(member.crc for member in self.members.values())

    def view(self, name: str) -> memoryview:
        """The bytes of a member, unchecked."""
        start = self.start(name)
        return self.data[start : start + self.members[name].size]

    def start(self, name: str) -> int:
        """Where the bytes of a member start, which its local header says."""
        member, wanted = self.members[name], name.encode()
        header = bytes(self.data[member.header : member.header + 30])
        if len(header) == 30 and header.startswith(b"PK\x03\x04"):
            names, extra = struct.unpack_from("<HH", header, 26)
            start = member.header + 30 + names + extra
            found = bytes(self.data[member.header + 30 : member.header + 30 + names])
            if found == wanted and start + member.size <= len(self.data):
                return start
        raise WeightsError(
            f"{self.path} has no member at byte {member.header}, where {short(name)} should be; {HOSTILE}"
        )

    def read(self, name: str, limit: int) -> bytes:
        """A copy of a small member, its CRC checked."""
        if self.members[name].size > limit:
            raise WeightsError(
                f"{self.path} has {self.members[name].size} bytes in {short(name)}; at most {limit} are read"
            )
        content = self.view(name)
        self.check(name, content)
        return bytes(content)

    def check(self, name: str, content: memoryview) -> None:
        if self.has_crc and zlib.crc32(content) != self.members[name].crc:
            raise WeightsError(f"{self.path} is damaged: {short(name)} does not match its CRC; download it again")


class _CutShort(Exception):
    """The directory, which ends a zip, is not where it should be."""


def _directory(path: str, data: memoryview) -> dict[str, Member]:
    """The central directory (PKWARE APPNOTE 4.3.12)."""
    count, start, size = _find_directory(data)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise WeightsError(
            f"{path} is a zip of {count} members ({size} bytes of names); at most {MAX_MEMBERS} are read"
        )
    members: dict[str, Member] = {}
    table, at = bytes(data[start : start + size]), 0
    for _ in range(count):
        if at + 46 > size or table[at : at + 4] != b"PK\x01\x02":
            raise _CutShort(f"its zip directory breaks off after {len(members)} of {count} members")
        flags, method, crc, stored, plain, names, extra, comment, header = struct.unpack_from(
            "<HH4xIIIHHH8xI", table, at + 8
        )
        name = table[at + 46 : at + 46 + names].decode("utf-8", "replace")
        plain, stored, header = _widen([plain, stored, header], table[at + 46 + names : at + 46 + names + extra])
        at += 46 + names + extra + comment
        if method != 0 or flags & 1 or plain != stored:
            raise WeightsError(
                f"{path} has the compressed or encrypted member {short(name)}, which torch.save never writes; {HOSTILE}"
            )
        if ".." in name.split("/") or name.startswith("/") or any(c in name for c in "\\\0\ufffd"):
            raise WeightsError(f"{path} has a member with the unsafe name {short(name)}; {HOSTILE}")
        if name in members:
            raise WeightsError(f"{path} has two members named {short(name)}; {HOSTILE}")
        members[name] = Member(header, plain, crc)
    if (total := sum(member.size for member in members.values())) > len(data):
        raise WeightsError(f"{path} has {len(data)} bytes but its members claim {total}; {HOSTILE}")
    return members


def _find_directory(data: memoryview) -> tuple[int, int, int]:
    """-> (members, start, size) from the end record (4.3.16), or from the zip64 one (4.3.14) where there is one."""
    end = len(data) - 22
    if end < 0 or data[end : end + 4] != b"PK\x05\x06":
        raise _CutShort("its zip directory is missing at the end")
    count, size, start = struct.unpack_from("<HII", data, end + 10)
    if end >= 76 and data[end - 20 : end - 16] == b"PK\x06\x07":
        wide_end = struct.unpack_from("<Q", data, end - 12)[0]
        if wide_end > end - 76 or data[wide_end : wide_end + 4] != b"PK\x06\x06":
            raise _CutShort("its zip64 directory is not where it should be")
        end = wide_end
        count, size, start = struct.unpack_from("<QQQ", data, end + 32)
    if start + size > end:
        raise _CutShort(f"its zip directory should lie in bytes {start} to {start + size}, but ends by {end}")
    return count, start, size


def _widen(values: list[int], extra: bytes) -> list[int]:
    """``values`` with those that are WIDE taken from the zip64 extra field (4.5.3), in order."""
    at = 0
    while WIDE in values and at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1 and size >= 8 * values.count(WIDE) and at + 4 + size <= len(extra):
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            return [next(wide) if value == WIDE else value for value in values]
        at += 4 + size
    return values
