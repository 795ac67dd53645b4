"""Mutants of real files of weights, as hypothesis strategies.

Some mutations know nothing of a format: bits flip, spans are lost, doubled or taken from another format's file. Others
keep what encloses the lie in order (the zip's CRC, the SHA-256 of our own files, the lengths around it), so that the
code behind the first check is reached.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import strategies as st

from sd_jax.weights import sums
from sd_jax.weights.safetensors_file import SUMS
from sd_jax.weights.tables import COMPONENTS
from tests.fuzz import Mutant, original

INTEGERS = (-1, 0, 1, 2, 3, 7, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, 1 << 62)
INTEGERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**30)
TEXTS = ("", "\x1b[31mred", "a\nb", "\0", "\ud800", "\u202eabc", "😀", "n" * 300, "m" * 20_000, ".", "..", "a/../../b")
TEXTS += ("/dev/null", "../../etc/passwd", "os", "torch", "builtins", "collections", "state_dict", "config.json", "pt")
TEXTS += ("diffusion_pytorch_model.safetensors.index.json", "unet/conv_in/kernel", "sd_jax", "__metadata__", SUMS)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "I64", "U8", "BOOL", "float16", "float64", "bfloat16", "int8")


@st.composite
def mutants(draw, kind: str) -> Mutant:
    """One to three mutations of a file, or of several in a folder."""
    files, steps = dict(original(kind).files), []
    for _ in range(_pick(draw, (1, 1, 2, 3))):
        name = _pick(draw, _by_weight(files))
        change = _STRUCTURED.get(Path(name).suffix, _edited)
        try:
            files[name], step = _pick(draw, (change, change, _edited))(draw, files[name])
        except (_Broken, RecursionError):  # by an earlier mutation
            continue
        steps.append(f"{name}: {step}")
    if sums.NAME in files and _pick(draw, (True, True, False)):
        digests = {n: hashlib.sha256(content).hexdigest() for n, content in files.items() if n != sums.NAME}
        files[sums.NAME] = sums.to_text(digests).encode()
        steps.append(f"{sums.NAME} made anew")
    way = _pick(draw, ("whole", "whole", "info", "info", *COMPONENTS))
    return Mutant(kind, files, tuple(steps), way, verify=draw(st.booleans()))


@st.composite
def flipped(draw, kind: str) -> Mutant:
    """One bit, anywhere in a model whose every byte has a checksum."""
    files = dict(original(kind).files)
    name = _pick(draw, _by_weight(files))
    raw = bytearray(files[name])
    at, bit = _place(draw, len(raw) - 1), draw(st.integers(0, 7))
    raw[at] ^= 1 << bit
    return Mutant(kind, files | {name: bytes(raw)}, (f"{name}: bit {bit} of byte {at}",), exact=True)


class _Broken(Exception):
    """A structure that is no longer there to be mutated."""


def _pick(draw, options: Sequence[Any]) -> Any:
    return draw(st.sampled_from(options))


def _by_weight(files: dict[str, bytes]) -> list[str]:
    """Names of files, those with something of tensors in them several times."""
    often = (".ckpt", ".bin", ".msgpack", ".safetensors", ".index.json")
    return [name for name in sorted(files) for _ in range(3 if name.endswith(often) else 1)]


def _place(draw, last: int) -> int:
    """0 to ``last``, most of the time near an end, where headers and directories are."""
    first = _pick(draw, (0, 0, max(0, last - 2000)))
    return draw(st.integers(first, min(last, first + 2000) if draw(st.booleans()) else last))


# ---- any file ------------------------------------------------------------------------------------------------------


def _edited(draw, raw: bytes) -> tuple[bytes, str]:
    """-> (bytes changed without a thought for what they mean, what was done)."""
    at = _place(draw, len(raw))
    size = min(_pick(draw, (1, 2, 4, 8, 64, 1000)), len(raw) - at)
    before, span, after = raw[:at], raw[at : at + size], raw[at + size :]
    how = _pick(draw, ("flip", "random", "zeros", "ones", "cut", "insert", "lose", "double", "swap", "splice"))
    match how:
        case "flip":
            after = span[1:] + after
            span = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in span[:1])
        case "random":
            span = draw(st.binary(min_size=min(size, 64), max_size=64))[:size] + span[64:]
        case "zeros" | "ones":
            span = (b"\0" if how == "zeros" else b"\xff") * size
        case "cut":
            span = after = b""
        case "insert":
            span = draw(st.binary(min_size=1, max_size=16)) + span
        case "lose":
            span = b""
        case "double":
            span *= 2
        case "swap":
            to = draw(st.integers(0, len(after)))
            other = after[to : to + size]
            span, after = other, after[:to] + span + after[to + size :]
        case "splice":
            donor = original(_pick(draw, ("ckpt", "safetensors", "native", "flax")))
            content = donor.files[donor.main or "vae/diffusion_flax_model.msgpack"]
            start = _place(draw, len(content))
            span = content[start : start + _pick(draw, (16, 1000, 100_000))]
    return before + span + after, f"{how} {size} bytes at {at}"


# ---- JSON, and what is like it -------------------------------------------------------------------------------------


class Object(list):
    """The [key, value] pairs of a JSON object, of which two may have one key."""


class Raw(str):
    """JSON that ``json`` would not write."""


def _parsed(raw: str | bytes) -> Object:
    try:
        root = json.loads(raw, object_pairs_hook=lambda pairs: Object(list(pair) for pair in pairs))
    except (ValueError, RecursionError):
        raise _Broken from None
    if not isinstance(root, Object) or not root:
        raise _Broken
    return root


def _text(value: Any) -> str:
    match value:
        case Raw():
            return value
        case Object():
            return "{" + ",".join(f"{_text(key)}:{_text(inner)}" for key, inner in value) + "}"
        case list():
            return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def _hostile(draw) -> Any:
    """A JSON value that nobody expects."""
    match _pick(draw, ("integer", "integer", "text", "dtype", "number", "plain", "many", "deep")):
        case "integer":
            return _pick(draw, INTEGERS)
        case "text":
            return _pick(draw, TEXTS)
        case "dtype":
            return _pick(draw, DTYPES)
        case "number":
            return _pick(draw, (0.5, -1.5, 1e308, 1e-320, Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000)))
        case "plain":
            return _pick(draw, (None, True, False, Object(), [], [[]], [None], Object([["a", 1]])))
        case "many":
            return [_pick(draw, INTEGERS)] * _pick(draw, (2, 20, 70, 3000))
    opening, closing = _pick(draw, (("[", "]"), ('{"a":', "}")))
    depth = draw(st.one_of(st.sampled_from((2, 40, 100_000)), st.integers(700, 1000)))  # 1000 is Python's own limit
    return Raw(opening * depth + "1" + closing * depth)


def _change(draw, root: list) -> str:
    """Change something somewhere in a tree of Objects and lists, in place -> what was done."""
    node, path = root, ""
    while True:
        values = [pair[1] for pair in node] if isinstance(node, Object) else node
        inner = [i for i, value in enumerate(values) if isinstance(value, list) and value]
        if not inner or _pick(draw, (True, False, False)):
            break
        i = _pick(draw, inner)
        path += f"/{str(node[i][0] if isinstance(node, Object) else i):.60}"
        node = values[i]
    i = draw(st.integers(0, len(node) - 1)) if node else 0
    how = _pick(draw, ("set", "set", "set", "add", "lose", "double", "name", "swap")) if node else "add"
    match how:
        case "set" if isinstance(node, Object):
            node[i] = [node[i][0], _hostile(draw)]
        case "set":
            node[i] = _hostile(draw)
        case "lose":
            del node[i]
        case "double":
            node.insert(i, list(node[i]) if isinstance(node, Object) else node[i])
        case "name" if isinstance(node, Object):
            node[i] = [_pick(draw, (*TEXTS, node[-1][0])), node[i][1]]
        case "swap" if isinstance(node, Object):
            j = draw(st.integers(0, len(node) - 1))
            node[i], node[j] = [node[i][0], node[j][1]], [node[j][0], node[i][1]]
        case _:
            value = _hostile(draw)
            node.insert(i, [_pick(draw, TEXTS), value] if isinstance(node, Object) else value)
    return f"{how} {i} of {path or '/'}"


def _changed_json(draw, raw: bytes) -> tuple[bytes, str]:
    root = _parsed(raw)
    steps = [_change(draw, root) for _ in range(_pick(draw, (1, 1, 2)))]
    return _text(root).encode("utf-8", "surrogatepass"), ", ".join(steps)


# ---- safetensors ---------------------------------------------------------------------------------------------------


def _changed_safetensors(draw, raw: bytes) -> tuple[bytes, str]:
    """Another header, with what it says of itself kept right or not."""
    length = int.from_bytes(raw[:8], "little")
    header, data = _parsed(raw[8 : 8 + length]), raw[8 + length :]
    entries = [value for key, value in header if isinstance(value, Object) and key != "__metadata__"]
    texts = [pair for pair in _metadata(header) if str(pair[1]).startswith("{")]
    how = _pick(draw, ("any", "tensor", "tensor", "metadata", "metadata", "empty", "data"))
    if how == "tensor" and entries:
        step = _change(draw, _pick(draw, entries))
    elif how == "metadata" and texts:  # JSON in texts: the config, which comes first, the tokenizer and the record
        pair = _pick(draw, [texts[0], *texts])
        changed, step = _changed_json(draw, pair[1].encode("utf-8", "surrogatepass"))
        pair[1] = changed.decode("utf-8", "surrogatepass")
    elif how == "empty":
        shape = _empty_shape(draw)
        entry = [["dtype", _pick(draw, DTYPES)], ["shape", shape], ["data_offsets", [len(data)] * 2]]
        header.append([_pick(draw, TEXTS), Object(entry)])
        step = f"a tensor of shape {shape[:4]}"
    elif how == "data":
        data, step = _edited(draw, data)
    else:
        step = _change(draw, header)
    return _resummed(draw, header, data), f"{how}, {step}"


def _metadata(header: Object) -> Object:
    return next((v for key, v in header if key == "__metadata__" and isinstance(v, Object)), Object())


def _empty_shape(draw) -> list[int]:
    """Of a tensor without elements, and with sizes as large as there are."""
    return draw(st.permutations([0, *draw(st.lists(st.sampled_from(INTEGERS), max_size=3))])) * _pick(draw, (1, 1, 30))


def _resummed(draw, header: Object, data: bytes) -> bytes:
    """A file with this header, its SHA-256 made anew, as they were, or left out."""
    metadata, digests = _metadata(header), None
    if (
        SUMS in (key for key, _ in metadata)
        and (how := _pick(draw, ("anew", "anew", "as they were", "out"))) != "as they were"
    ):
        metadata[:] = [pair for pair in metadata if pair[0] != SUMS]
        if how == "anew":
            digests = _digests(header, data)
            metadata.append([SUMS, zeros := "0" * 64 * (len(digests) + 1)])
    raw = _text(header).encode("utf-8", "surrogatepass")
    if digests is not None:
        raw = raw.replace(zeros.encode(), "".join((*digests, hashlib.sha256(raw).hexdigest())).encode(), 1)
    return len(raw).to_bytes(8, "little") + raw + data


def _digests(header: Object, data: bytes) -> list[str]:
    spans = [
        dict(map(tuple, v)).get("data_offsets") for k, v in header if isinstance(v, Object) and k != "__metadata__"
    ]
    spans = [s for s in spans if isinstance(s, list) and len(s) == 2 and all(type(n) is int and n >= 0 for n in s)]
    return [hashlib.sha256(data[start:stop]).hexdigest() for start, stop in sorted(spans)]


# ---- torch's zip ---------------------------------------------------------------------------------------------------


def _changed_zip(draw, raw: bytes) -> tuple[bytes, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # zipfile has many for what earlier mutations do to it
        raise _Broken from None
    how = _pick(draw, ("pickle",) * 5 + ("directory", "directory", "member"))
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith("/data.pkl")]
    method, step = zipfile.ZIP_STORED, how
    if how == "directory" or not pickles:
        return _changed_directory(draw, raw)
    if how == "pickle":
        name, content = members[pickles[0]]
        for _ in range(draw(st.integers(1, 3))):
            content, done = _changed_pickle(draw, content)
            step += f", {done}"
        members[pickles[0]] = (name, content)
    else:
        i = draw(st.integers(0, len(members) - 1))
        (name, content), change = members[i], _pick(draw, ("name", "double", "lose", "content", "deflate"))
        step = f"{change} of {name}"
        match change:
            case "name":
                new = f"{name.partition('/')[0]}/{_pick(draw, (*TEXTS, 'data.pkl', 'byteorder', 'data/0', '.data/x'))}"
                members[i] = (new.encode("utf-8", "replace").decode(), content)
            case "double":
                members.insert(i, members[i])
            case "lose":
                del members[i]
            case "content":
                members[i] = (name, _edited(draw, content)[0])
            case _:
                method = zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue(), step


# What a record of a zip starts with -> the places of its fields, and their bytes (PKWARE APPNOTE 4.3).
_RECORDS = {
    b"PK\x03\x04": {6: 2, 8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2},
    b"PK\x01\x02": {8: 2, 10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 42: 4},
    b"PK\x05\x06": {8: 2, 10: 2, 12: 4, 16: 4, 20: 2},
}


def _changed_directory(draw, raw: bytes) -> tuple[bytes, str]:
    """Another number in a local header, in the directory or at its end; or an end such as large files have."""
    value, (magic, fields) = _pick(draw, INTEGERS), _pick(draw, list(_RECORDS.items()))
    starts = [found.start() for found in re.finditer(re.escape(magic), raw)]
    if not starts:
        raise _Broken
    if magic == b"PK\x05\x06" and draw(st.booleans()):
        numbers = [_pick(draw, INTEGERS) & (1 << 64) - 1 for _ in range(5)]
        numbers[0] = _pick(draw, (starts[-1], numbers[0]))
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers[1:])
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, numbers[0], 1)
        return raw[: starts[-1]] + wide + raw[starts[-1] :], f"a zip64 end of {numbers}"
    start, place = _pick(draw, starts), _pick(draw, list(fields))
    at, size = start + place, fields[place]
    changed = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return raw[:at] + changed + raw[at + size :], f"{value} at {place} of {magic!r} at {start}"


# ---- pickles -------------------------------------------------------------------------------------------------------

GLOBALS = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"cthis\ns\n", b"cpickle\nloads\n", b"csubprocess\nPopen\n")
GLOBALS += (b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n", b"ctorch\nHalfStorage\n", b"ctorch\nfloat8_e4m3fn\n")
GLOBALS += (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nSize\n")
GLOBALS += (b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"c\x1b[31m\n\xe2\x80\xae\n")
SIMPLE = [op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None]
WITH_OPERAND = [op.code.encode("latin1") for op in pickletools.opcodes if op.arg is not None]


def unicode(text: str) -> bytes:
    """BINUNICODE"""
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(n: int) -> bytes:
    """LONG1"""
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _changed_pickle(draw, raw: bytes) -> tuple[bytes, str]:
    """Other instructions, one or a few in a row."""
    try:
        starts = [at for _, _, at in pickletools.genops(raw)] + [len(raw)]
    except Exception:  # genops, too, has many
        raise _Broken from None
    code = [raw[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
    i, j = (draw(st.integers(0, len(code) - 1)) for _ in range(2))
    many = _pick(draw, (1, 1, 1, 2, 10))
    how = _pick(draw, ("operand", "operand", "replace", "insert", "lose", "double", "swap"))
    match how:
        case "operand":
            code[i] = _other_operand(draw, code[i])
        case "replace":
            code[i : i + many] = [_instruction(draw)]
        case "insert":
            code.insert(i, _instruction(draw))
        case "lose":
            del code[i : i + many]
        case "double":
            code[i:i] = code[i : i + many]
        case _:
            code[i], code[j] = code[j], code[i]
    return b"".join(code), f"{how} {many} at instruction {i} of {len(starts) - 1}"


def _other_operand(draw, instruction: bytes) -> bytes:
    match instruction[:1]:
        case b"X" | b"\x8c":
            return unicode(_pick(draw, (*TEXTS, "storage", "0", "1", "cpu")))
        case b"K" | b"M" | b"J" | b"\x8a":
            return integer(_pick(draw, INTEGERS))
        case b"c":
            return _pick(draw, GLOBALS)
    size = len(instruction) - 1
    return instruction[:1] + draw(st.binary(min_size=min(size, 64), max_size=64))[:size] + instruction[65:]


def _instruction(draw) -> bytes:
    match _pick(draw, ("simple", "simple", "global", "integer", "text", "memo", "any", "tensor")):
        case "simple":
            return _pick(draw, SIMPLE)
        case "global":
            return _pick(draw, GLOBALS)
        case "integer":
            return integer(_pick(draw, INTEGERS))
        case "text":
            return unicode(_pick(draw, TEXTS))
        case "memo":
            return _pick(draw, (b"h", b"q")) + bytes([draw(st.integers(0, 255))])
        case "tensor":
            return unicode(_pick(draw, TEXTS)) + _tensor(draw) + b"s"  # into the dictionary that is being made
    return _pick(draw, WITH_OPERAND) + draw(st.binary(max_size=9))


def _tensor(draw) -> bytes:
    """A tensor in the first storage, whose shape and stride are not what fits there."""
    numbers = st.lists(st.sampled_from(INTEGERS), max_size=3)
    shape = _pick(draw, (_empty_shape(draw), draw(numbers)))
    stride = _pick(draw, ([1] * len(shape), draw(numbers)))
    pid = b"(" + unicode("storage") + b"ctorch\nFloatStorage\n" + unicode("0") + unicode("cpu") + integer(4) + b"tQ"
    counts = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, stride)]
    rest = b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + integer(0) + b"".join(counts) + rest


# ---- Flax' msgpack -------------------------------------------------------------------------------------------------


class Leaf(list):
    """An array: [shape, dtype, bytes]."""


class Packed(bytes):
    """What msgpack itself would not write."""


def _changed_msgpack(draw, raw: bytes) -> tuple[bytes, str]:
    if _pick(draw, (False, False, True)):  # a head, of more than there is
        at, head = _place(draw, len(raw)), _pick(draw, (0xC6, 0xC9, 0xDB, 0xDD, 0xDF, 0xCF))
        size = 8 if head == 0xCF else 4
        number = (_pick(draw, INTEGERS) & (1 << 8 * size) - 1).to_bytes(size)
        return raw[:at] + bytes([head]) + number + raw[at + 1 + size :], f"head {head:#x} at {at}"
    root = _unpacked(raw)
    how, step = _pick(draw, ("any", "any", "deep", "empty")), ""
    if how == "any":
        step = _change(draw, root)
    elif how == "deep":
        depth = _pick(draw, (5, 40, 100_000))
        root.append(["deep", Packed(b"\x81\xa1a" * depth + b"\x80")])
    else:
        shape = _empty_shape(draw)
        root.append([_pick(draw, TEXTS), Leaf([shape, _pick(draw, DTYPES), b""])])
        step = f"an array of shape {shape[:4]}"
    return _packed(root), f"{how} {step}"


def _unpacked(raw: bytes) -> Object:
    def pairs(found) -> Object:
        return Object(list(pair) for pair in found)

    def leaf(kind: int, content: bytes) -> Leaf:
        return Leaf(msgpack.unpackb(content))

    try:
        root = msgpack.unpackb(raw, ext_hook=leaf, object_pairs_hook=pairs, strict_map_key=False)
    except Exception:  # msgpack's own and Python's
        raise _Broken from None
    if not isinstance(root, Object) or not root:
        raise _Broken
    return root


def _packed(value: Any) -> bytes:
    packer = msgpack.Packer(unicode_errors="surrogatepass")
    match value:
        case Packed():
            return value
        case Leaf():
            return packer.pack_ext_type(1, packer.pack_array_header(len(value)) + b"".join(map(_packed, value)))
        case Object():
            return packer.pack_map_header(len(value)) + b"".join(_packed(v) for pair in value for v in pair)
        case list():
            return packer.pack_array_header(len(value)) + b"".join(map(_packed, value))
        case int():
            return packer.pack(max(-(1 << 63), min(value, (1 << 64) - 1)))
    return packer.pack(value)


_STRUCTURED: dict[str, Callable[[Any, bytes], tuple[bytes, str]]] = {
    ".ckpt": _changed_zip,
    ".bin": _changed_zip,
    ".safetensors": _changed_safetensors,
    ".json": _changed_json,
    ".msgpack": _changed_msgpack,
}
