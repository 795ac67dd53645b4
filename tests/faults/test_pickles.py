"""Checkpoints that an enemy, or a bad disk, has written: no code runs, nothing is half read.

Rows F23, F24, F25, F27 and F28 of the list of faults. The files are made by hand: a zip of raw pickle
instructions.
"""

import io
import pickle
import pickletools
import struct
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest

from sd_jax.types import WeightsError
from sd_jax.weights import torch_pickle
from sd_jax.weights.files import open_weights
from sd_jax.weights.torch_zip import open_checkpoint

FLOATS = np.arange(6, dtype=np.float32)
STORAGE = (("data/0", FLOATS.tobytes()),)
MARKER = "sd_jax_code_ran"  # what a successful attack creates
NESTED = f"\x80\x02cos\nsystem\nX\x15\x00\x00\x00touch {MARKER}\x85R.".encode("latin1")
KNOWN = {
    code
    for table in ("PUT", "GET", "TEXT", "BYTES", "UNSIGNED", "TUPLES", "EMPTY", "CONSTANTS", "ACTIONS")
    for code in getattr(torch_pickle, f"_{table}")
}
UNKNOWN = [op for op in pickletools.opcodes if ord(op.code) not in KNOWN]


def archive(path, pickled: bytes, members=STORAGE, root="archive", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), *members):
            z.writestr(f"{root}/{name}", content)
    return path


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integer(n: int) -> bytes:
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def pid(kind: bytes = b"ctorch\nFloatStorage\n", key="0", count=6) -> bytes:
    return tuple_of(text("storage"), kind, text(key), text("cpu"), integer(count)) + b"Q"


def tensor(storage=None, offset=0, shape=(2, 3), stride=(3, 1)) -> bytes:
    arguments = (
        pid() if storage is None else storage,
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        name("collections", "OrderedDict") + b")R",
    )
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(*arguments) + b"R"


def checkpoint(value: bytes, key: bytes = text("w")) -> bytes:
    """{key: value}"""
    return b"\x80\x02}" + key + value + b"s."


def operand(op: pickletools.OpcodeInfo) -> bytes:
    """A small operand such as ``op`` has."""
    if op.arg is None:
        return b""
    if op.arg.n == pickletools.UP_TO_NEWLINE:
        return b"'1'\n" if op.arg.name == "stringnl" else b"1\n"
    sizes = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
    if op.arg.n < 0:
        return (1).to_bytes(sizes.get(op.arg.n, 4), "little") + b"1"
    return (1).to_bytes(op.arg.n, "little")


def comes_to(op: pickletools.OpcodeInfo, pickled: bytes) -> int:
    """The byte at which Python's own unpickler, with stubs for all that a pickle names, is to execute ``op``."""
    file = io.BytesIO(pickled)

    class Unpickler(pickle._Unpickler):
        dispatch = dict(pickle._Unpickler.dispatch)

        def find_class(self, module, attribute):
            return lambda *args: None

        def persistent_load(self, pid):
            return None

        def reached(self):
            raise StopIteration(file.tell() - 1)

        dispatch[ord(op.code)] = reached

    with pytest.raises(StopIteration) as caught:
        Unpickler(file).load()
    return caught.value.value


def refused(path, expected: str, seconds: float = 1.0) -> str:
    start = time.process_time()
    with pytest.raises(WeightsError, match=expected) as caught:
        open_checkpoint(path)
    assert time.process_time() - start < seconds
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000
    return message


def test_the_hand_made_form_is_right(tmp_path):
    """Otherwise the refusals below would prove nothing."""
    path = archive(tmp_path / "a.ckpt", checkpoint(tensor()))
    np.testing.assert_array_equal(open_checkpoint(path).tensors["w"].read(), FLOATS.reshape(2, 3))


class TestCodeIsNeverRun:
    """F23."""

    @pytest.fixture(autouse=True)
    def nothing_happens(self, tmp_path, monkeypatch):
        """No file appears, the module that one checkpoint names is not imported, and the audit hooks of the
        interpreter see no process and no unpickling.
        """
        monkeypatch.chdir(tmp_path)
        modules, events, watching = set(sys.modules), [], [True]
        suspicious = {"os.system", "subprocess.Popen", "os.posix_spawn", "pickle.find_class"}
        sys.addaudithook(lambda event, _: events.append(event) if watching and event in suspicious else None)
        yield
        watching.clear()
        assert not (tmp_path / MARKER).exists()
        assert "this" not in set(sys.modules) - modules
        assert not events

    attacks = {
        "system": (name("os", "system") + tuple_of(text(f"touch {MARKER}")) + b"R", "os.system"),
        "eval": (name("builtins", "eval") + tuple_of(text(f"open('{MARKER}','w')")) + b"R", "builtins.eval"),
        "import": (name("this", "s"), "this.s"),
        "stack_global": (
            b"\x8c\x05posix\x8c\x06system\x93" + tuple_of(text(f"touch {MARKER}")) + b"R",
            "posix.system",
        ),
        "getattr of the allowed": (
            name("builtins", "getattr") + tuple_of(name("torch", "FloatStorage"), text("__init__")) + b"R",
            "builtins.getattr",
        ),
        "setstate": (
            name("builtins", "dict") + b")\x81}" + text("__setstate__") + name("os", "system") + b"sb",
            "dict",
        ),
        "newobj": (name("subprocess", "Popen") + tuple_of(text(f"touch {MARKER}")) + b"\x81", "subprocess.Popen"),
        "newobj_ex": (name("subprocess", "Popen") + b")}\x92", "subprocess.Popen"),
        "dotted name": (name("torch._utils", "os.system") + tuple_of(text("true")) + b"R", "os.system"),
        "inst": (b"(" + text(f"touch {MARKER}") + b"ios\nsystem\n", "os.system"),
        "obj": (b"(" + name("os", "system") + text(f"touch {MARKER}") + b"o", "os.system"),
        "ext1": (b"\x82\x01", "0x82"),
        "ext4": (b"\x84\x01\x00\x00\x00", "0x84"),
        "protocol 0": (b"cos\nsystem\n(S'true'\ntR", "os.system"),
        "nested": (
            name("pickle", "loads") + tuple_of(b"B" + struct.pack("<I", len(NESTED)) + NESTED) + b"R",
            "pickle.loads",
        ),
        "nested in a file": (name("torch", "load") + tuple_of(text("b.ckpt")) + b"R", "torch.load"),
    }

    @pytest.mark.parametrize("attack", attacks)
    def test_among_the_tensors_it_is_refused_by_name(self, tmp_path, attack):
        code, named = self.attacks[attack]
        assert named in refused(archive(tmp_path / "a.ckpt", checkpoint(code)), "a.ckpt")

    @pytest.mark.parametrize("attack", attacks)
    def test_as_the_whole_file_it_is_refused(self, tmp_path, attack):
        code, named = self.attacks[attack]
        assert named in refused(archive(tmp_path / "a.ckpt", b"\x80\x02" + code + b"."), "a.ckpt")

    @pytest.mark.parametrize(
        "attack", ["system", "eval", "import", "stack_global", "setstate", "newobj", "newobj_ex", "nested"]
    )
    def test_outside_the_tensors_it_is_inert_and_listed(self, tmp_path, attack):
        code, named = self.attacks[attack]
        pickled = (
            b"\x80\x02}" + text("state_dict") + b"}" + text("w") + tensor() + b"s" + b"s" + text("x") + code + b"s."
        )
        file = open_checkpoint(archive(tmp_path / "a.ckpt", pickled))
        assert file.ignored == ["x"] and any(named in found for found in file.foreign)
        assert file.tensors["w"].read().sum() == FLOATS.sum()

    def test_nested_in_a_tensor(self, tmp_path):
        system = self.attacks["system"][0]
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor(storage=system))), "os.system")
        refused(archive(tmp_path / "b.ckpt", checkpoint(tensor(storage=pid(kind=system)))), "os.system")
        refused(archive(tmp_path / "c.ckpt", checkpoint(b"K\x01", key=system)), "os.system")

    def test_what_the_standard_pickler_makes_of_an_attack(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return eval, (f"open({MARKER!r}, 'w')",)

        for protocol in range(6):
            pickled = pickle.dumps({"w": Attack()}, protocol)
            refused(archive(tmp_path / "a.ckpt", pickled), "eval|is of pickle protocol|instruction")

    @pytest.mark.parametrize("outside", [False, True], ids=["among the tensors", "outside"])
    @pytest.mark.parametrize("op", UNKNOWN, ids=lambda op: op.name)
    def test_every_instruction_that_torch_does_not_write(self, tmp_path, op, outside):
        """Each at a place where Python's own unpickler comes to it, with what it takes from the stack."""
        stack = b"N" + b"".join({"mark": b"(", "stackslice": b""}.get(taken.name, b"N") for taken in op.stack_before)
        before = text("state_dict") + b"}" + text("w") + tensor() + b"s" + b"s"
        before = b"\x80\x02}" + (before + text("x") if outside else text("w") + tensor() + b"s" + text("x")) + stack
        pickled = before + op.code.encode("latin1") + operand(op) + b"s."
        assert comes_to(op, pickled) == len(before)
        message = refused(
            archive(tmp_path / "a.ckpt", pickled), f"instruction 0x{ord(op.code):02x}, which torch.save never"
        )
        assert f"byte {len(before) + 1}" in message and "get it again from its publisher" in message

    def test_a_pickle_in_a_pickle_is_no_more_than_bytes(self, tmp_path):
        pickled = b"\x80\x02}" + text("w") + tensor() + b"s" + text("x") + b"C" + bytes([len(NESTED)]) + NESTED + b"s."
        file = open_checkpoint(archive(tmp_path / "a.ckpt", pickled))
        assert file.ignored == ["x"] and not file.foreign
        refused(
            archive(tmp_path / "b.ckpt", checkpoint(b"C" + bytes([len(NESTED)]) + NESTED)), "no tensors.*give model"
        )

    def test_a_legacy_file(self, tmp_path):
        path = tmp_path / "a.pt"
        path.write_bytes(b"\x80\x02" + self.attacks["system"][0] + b".")
        refused(path, "bare pickle")


class TestOldFormats:
    """What torch wrote before its zip, and what others still write: recognised, not run, and there is a way out."""

    way_out = (
        r"before version 1\.6.*convert it once with torch: torch\.save\(torch\.load\(old, weights_only=True\), new\)"
    )

    def test_several_pickles_in_a_row(self, tmp_path):
        """torch 0.1.10 to 1.5, and later if it is asked to."""
        torch = pytest.importorskip("torch")
        for name in ("a.ckpt", "a.bin", "a.pt", "a.pth"):
            state = {"state_dict": {"w": torch.zeros(2, 3)}}
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
            refused(tmp_path / name, self.way_out)
            with pytest.raises(WeightsError, match=self.way_out):
                open_weights(tmp_path / name)

    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_a_tar(self, tmp_path, form):
        """The first releases of torch."""
        with tarfile.open(tmp_path / "a.pt", "w", format=form) as tar:
            for member in ("sys_info", "pickle", "tensors", "storages"):
                info = tarfile.TarInfo(member)
                info.size = len(NESTED)
                tar.addfile(info, io.BytesIO(NESTED))
        refused(tmp_path / "a.pt", self.way_out)

    @pytest.mark.parametrize("protocol", range(6))
    def test_a_bare_pickle(self, tmp_path, protocol):
        path = tmp_path / "a.ckpt"
        path.write_bytes(pickle.dumps({"w": [1.0]}, protocol))
        expected = "bare pickle, which is never run; get the weights as .safetensors"
        refused(
            path,
            expected if protocol >= 2 else "not a torch checkpoint.*give a .ckpt, .bin or .pt that torch.save wrote",
        )


class TestLies:
    """F24."""

    @pytest.mark.parametrize(
        "lie",
        [
            {"shape": (3, 3)},
            {"shape": (2, 4)},
            {"offset": 1},
            {"offset": -1},
            {"offset": 1 << 80},
            {"stride": (4, 1)},
            {"stride": (-3, 1)},
            {"stride": (1 << 61, 1)},
            {"stride": (3,)},
            {"shape": (-2, -3)},
            {"shape": (1 << 62, 1 << 62)},
            {"shape": (1 << 61, 1), "stride": (0, 0)},  # one element, seen 2^61 times
            {"shape": (7,), "stride": (0,)},
            {"shape": (0,), "stride": (1,), "offset": 7},
            {"shape": (1,) * 40, "stride": (1,) * 40},
        ],
        ids=str,
    )
    def test_a_tensor_that_leaves_its_storage(self, tmp_path, lie):
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor(**lie))), "damaged or hostile")

    @pytest.mark.parametrize("count", [5, 7, -6, 1 << 70])
    def test_a_storage_of_another_size(self, tmp_path, count):
        refused(
            archive(tmp_path / "a.ckpt", checkpoint(tensor(storage=pid(count=count)))), "24 bytes in archive/data/0"
        )

    @pytest.mark.parametrize(
        "storage",
        [
            pid(key="1"),
            pid(key="../version"),
            b"NQ",
            b"]Q",
            text("storage") + b"Q",
            tuple_of(text("storage")) + b"Q",
            tuple_of(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), integer(6)) + b"Q",
            tuple_of(text("storage"), text("FloatStorage"), text("0"), text("cpu"), integer(6)) + b"Q",
            tuple_of(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"N") + b"Q",
            tuple_of(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), integer(6), b"N") + b"Q",
            b"K\x01",
            tensor(),
            name("torch", "FloatStorage") + b")R",
        ],
        ids=range(13),
    )
    def test_a_storage_that_is_none(self, tmp_path, storage):
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor(storage=storage))), "damaged or hostile")

    def test_one_storage_of_two_types(self, tmp_path):
        both = tuple_of(tensor(), tensor(storage=pid(kind=name("torch", "IntStorage"))))
        refused(archive(tmp_path / "a.ckpt", checkpoint(both)), "as float32 and as int32")

    @pytest.mark.parametrize(
        ("code", "expected"),
        {
            b"]" + text("k") + b"Ns.": "sets an item of a list",
            b"K\x01" + text("k") + b"Ns.": "sets an item of a int",
            b"}(" + text("k") + b"u.": "key without a value",
            b"}Na.": "appends to a dict",
            b"]}b.": "state of a list",
            b"K\x01)R.": "calls a int",
            name("os", "system") + b"NR.": "calls a Global with a NoneType",
            b"\x93.": "empty stack",
            b"NN\x93.": "not text",
            b"R.": "empty stack",
            b"N(0.": "empty stack",
            b"(t": "without its STOP",
            b"t.": "mark it never set",
            b"h\x07.": "recalls memo 7",
            b"q\x00.": "empty stack",
            b"\xff.": "instruction 0xff",
            b"\x8b\x01\x00\x00\x00\x01.": "instruction 0x8b",
            b"X\xff\xff\xff\x7fabc": "middle of an instruction",
            b"\x8d" + b"\xff" * 8 + b"abc": "middle of an instruction",
            b"X\x01\x00\x00\x00\xff.": "not UTF-8",
            b"cos": "middle of a name",
            b"\x80\x09.": "protocol 9",
            b"": "without its STOP",
            b".": "empty stack",
            name("torch.loads"[:5], "Size") + b"K\x01\x85R.": "size from the wrong arguments",
            name("collections", "OrderedDict") + b"K\x01\x85R.": "dictionary from the wrong arguments",
            name("torch._utils", "_rebuild_parameter") + b"K\x01\x85R.": "parameter from the wrong arguments",
            name("torch._utils", "_rebuild_tensor_v2") + b")R.": "tensor from the wrong arguments",
            name("torch._utils", "_rebuild_tensor_v3") + b")R.": "tensor from the wrong arguments",
        }.items(),
        ids=lambda v: None if isinstance(v, bytes) else v,
    )
    def test_malformed_pickles(self, tmp_path, code, expected):
        refused(archive(tmp_path / "a.ckpt", b"\x80\x02" + code), expected)

    def test_bombs(self, tmp_path):
        """Sizes that grow faster than the file: nothing is copied, hashed or printed deeply."""
        nested = b")" + b"q\x00h\x00\x86" * 200  # hashing this as a key would take 2^200 steps
        deep = b"]" * 100_000 + b"a" * 99_999
        loop = b"]q\x00h\x00a"
        for code in (nested, deep, loop):
            refused(archive(tmp_path / "a.ckpt", b"\x80\x02}" + code + b"Ns."), "a composite key")
            refused(
                archive(tmp_path / "a.ckpt", b"\x80\x02" + code + b"."), "where a dictionary of tensors was expected"
            )
        refused(archive(tmp_path / "a.ckpt", checkpoint(b"\x8a\xff" + b"\x7f" * 255)), "no tensors")

    def test_too_many_instructions(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 1000)
        refused(archive(tmp_path / "a.ckpt", b"\x80\x02" + b"N0" * 600 + b"N."), "more than 1000 instructions")

    def test_every_cut_and_every_flipped_byte_of_a_pickle(self, tmp_path):
        """Whatever is done to a good pickle, it is read or refused: no other exception."""
        pickled = checkpoint(tensor())
        rng = np.random.default_rng(0)
        mutants = [pickled[:n] for n in range(len(pickled))]
        for i in range(len(pickled)):
            mutants += [pickled[:i] + bytes([b]) + pickled[i + 1 :] for b in rng.integers(0, 256, 3, np.uint8)]
        mutants += [pickled[:i] + pickled[j:] for i, j in rng.integers(0, len(pickled), (200, 2))]
        read = 0
        for mutant in mutants:
            try:
                open_checkpoint(archive(tmp_path / "a.ckpt", mutant))
                read += 1
            except WeightsError:
                pass
        assert 0 < read < len(mutants) / 2

    def test_the_opcode_table_agrees_with_pickletools(self):
        """Operand sizes, checked against the standard library's own description."""
        known = {ord(op.code): op for op in pickletools.opcodes}
        for table, suffix in (
            (torch_pickle._PUT, "PUT"),
            (torch_pickle._GET, "GET"),
            (torch_pickle._UNSIGNED, "BININT"),
        ):
            for code, size in table.items():
                assert suffix in known[code].name and known[code].arg.n == size
        sizes = {
            size: getattr(pickletools, f"TAKEN_FROM_ARGUMENT{size}{'' if size == 1 else 'U'}") for size in (1, 4, 8)
        }
        for table in (torch_pickle._TEXT, torch_pickle._BYTES):
            for code, size in table.items():
                assert known[code].arg.n == sizes[size]
        assert set(torch_pickle._ACTIONS) <= set(known)


class TestArchives:
    """F25."""

    def test_compressed_members(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()), method=zipfile.ZIP_DEFLATED)
        refused(path, "compressed or encrypted")

    def test_a_zip_bomb(self, tmp_path):
        path = tmp_path / "a.ckpt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("archive/data.pkl", bytes(64 << 20))
        refused(path, "compressed or encrypted")

    def test_a_million_members(self, tmp_path):
        """Written by hand: zipfile would take a quarter of a minute."""
        count = 1_000_000
        record = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0)
        directory = b"".join(record + b"%09d" % i for i in range(count))
        local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 9, 0) + b"000000000"
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), len(local))
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(local) + len(directory), 1)
        tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path = tmp_path / "a.ckpt"
        path.write_bytes(local + directory + end + locator + tail)
        refused(path, "zip of 1000000 members")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_two_members_of_one_name(self, tmp_path):
        members = (("data/0", FLOATS.tobytes()), ("data/0", bytes(24)))
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor()), members), "two members named archive/data/0")

    @pytest.mark.parametrize("evil", ["../../x", "a/../../x", "..", "a\\..\\x"])
    def test_names_that_lead_out(self, tmp_path, evil):
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor()), ((evil, b"x"),)), "unsafe name")
        refused(archive(tmp_path / "a.ckpt", checkpoint(tensor()), root="/etc"), "unsafe name")

    def test_overlapping_members(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()), (("data/0", FLOATS.tobytes()), ("big", bytes(3000))))
        raw = bytearray(path.read_bytes())
        for entry in _entries(raw):
            raw[entry + 20 : entry + 28] = struct.pack("<II", 3000, 3000)
        path.write_bytes(raw)
        refused(path, "members claim")

    def test_directory_entries_that_lie(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()))
        good = path.read_bytes()
        for field, value, expected in (
            (42, 0, "no member at byte 0"),
            (42, 1 << 31, "no member at byte"),
            (42, 0xFFFFFFFF, "no member at byte"),
            (24, 25, "compressed"),
            (8, 1, "compressed or encrypted"),
        ):
            raw = bytearray(good)
            entry = list(_entries(raw))[-1]
            raw[entry + field : entry + field + (2 if field == 8 else 4)] = struct.pack("<I", value)[
                : 2 if field == 8 else 4
            ]
            path.write_bytes(raw)
            refused(path, expected)

    def test_no_pickle_two_pickles_other_byte_order(self, tmp_path):
        path = tmp_path / "a.ckpt"
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("x/y.txt", b"hello")
        refused(path, "0 data.pkl")
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("x/data.pkl", b"N.")
            z.writestr("y/data.pkl", b"N.")
        refused(path, "2 data.pkl")
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("x/data.pkl", b"N.")
            z.writestr("x/byteorder", b"big")
        refused(path, "byte order b'big'")

    def test_zip64(self, tmp_path):
        """The wide fields that files of 4 GB need, in a small file."""
        body = directory = b""
        for member, content in (("archive/data.pkl", checkpoint(tensor())), ("archive/data/0", FLOATS.tobytes())):
            name, crc = member.encode(), zlib.crc32(content)
            wide = struct.pack("<HHQQQ", 1, 24, len(content), len(content), len(body))
            common = (20, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(wide))
            directory += struct.pack("<4sH5H3I5H2I", b"PK\x01\x02", 45, *common, 0, 0, 0, 0, 0xFFFFFFFF) + name + wide
            body += struct.pack("<4s5H3I2H", b"PK\x03\x04", *common) + name + wide + content
        tail = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), len(body))
        tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body) + len(directory), 1)
        tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path = tmp_path / "a.ckpt"
        path.write_bytes(body + directory + tail)
        assert zipfile.ZipFile(path).testzip() is None  # a valid archive, says the standard library
        np.testing.assert_array_equal(open_checkpoint(path).tensors["w"].read(), FLOATS.reshape(2, 3))


def _entries(raw: bytearray):
    """Where the entries of the central directory start."""
    at = bytes(raw).find(b"PK\x01\x02")
    while at >= 0:
        yield at
        at = bytes(raw).find(b"PK\x01\x02", at + 4)


class TestDamage:
    """F27 and F28."""

    def test_a_file_cut_short(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor(storage=pid(count=1000))), (("data/0", bytes(4000)),))
        whole = path.read_bytes()
        path.write_bytes(whole[:2000])
        refused(path, r"2000 bytes are here, more than 4000 were expected.*download it again")
        for length in range(4, len(whole), 97):
            path.write_bytes(whole[:length])
            refused(path, f"cut short.*{length} bytes are here")

    def test_bytes_missing_in_the_middle(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()))
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + whole[110:])
        refused(path, "cut short|damaged")

    def test_a_flipped_bit_of_a_tensor(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()))
        raw = bytearray(path.read_bytes())
        at = bytes(raw).find(FLOATS.tobytes())
        raw[at + 5] ^= 16
        path.write_bytes(raw)
        lazy = open_checkpoint(path).tensors["w"]
        for _ in range(2):  # the second time as well
            with pytest.raises(WeightsError, match="archive/data/0 does not match its CRC"):
                lazy.read()
        assert open_checkpoint(path, verify=False).tensors["w"].read().shape == (2, 3)

    def test_a_flipped_bit_of_the_pickle(self, tmp_path):
        path = archive(tmp_path / "a.ckpt", checkpoint(tensor()))
        raw = bytearray(path.read_bytes())
        raw[bytes(raw).find(b"FloatStorage")] ^= 1
        path.write_bytes(raw)
        refused(path, "data.pkl does not match its CRC")

    def test_random_damage_anywhere(self, tmp_path):
        """Read with the right values, or refused."""
        whole = archive(tmp_path / "a.ckpt", checkpoint(tensor())).read_bytes()
        rng = np.random.default_rng(1)
        for _ in range(500):
            raw = bytearray(whole)
            for at in rng.integers(0, len(raw), rng.integers(1, 4)):
                raw[at] ^= 1 << int(rng.integers(8))
            (tmp_path / "b.ckpt").write_bytes(raw)
            try:
                tensors = open_checkpoint(tmp_path / "b.ckpt").tensors
            except WeightsError:
                continue
            try:
                np.testing.assert_array_equal(tensors["w"].read(), FLOATS.reshape(2, 3))
            except WeightsError:
                pass
