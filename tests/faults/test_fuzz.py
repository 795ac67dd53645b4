"""Files of weights that are damaged at random, and with skill (rows F23 to F33 of the list of faults).

The mutants are the same every time; ``python -m tools.fuzz_weights`` makes others. What it found has its test here.
"""

import io
import json
import os
import subprocess
import sys
import zipfile

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from sd_jax.config import SD_V1_4
from sd_jax.types import WeightsError
from sd_jax.weights import torch_pickle
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import parameter_shapes, table
from tests import fuzz
from tests.fuzz import KINDS, MODEL, TOKENIZER, Mutant, Outcome, examine, original
from tests.mutants import flipped, integer, mutants, unicode
from tools import fuzz_weights

COVERED = [kind for kind in KINDS if kind not in ("safetensors", "shards", "flax")]
# A hundred of ckpt, with its 7000 instructions, take 5 seconds; of a folder 3; of a file 2.
EXAMPLES = {"ckpt": 60, "safetensors": 80, "compvis": 80, "native": 100, "folder": 70, "shards": 60, "flax": 60}
FLAX = "unet/diffusion_flax_model.msgpack"
NOTHING = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What is imported and traced once, beforehand."""
    parameter_shapes(SD_V1_4)
    for kind in KINDS:
        for way in ("whole", "info"):
            fuzz.examine(Mutant(kind, original(kind).files, (), way))


def same_every_time(examples: int):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("way", ["whole", "info", "clip", "unet", "vae"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_originals_open(kind, way):
    assert original(kind).covered == (kind in COVERED)
    assert examine(Mutant(kind, original(kind).files, (), way, exact=way == "whole")).opened


@pytest.mark.parametrize("kind", KINDS)
def test_mutants(kind):
    opened = []

    @same_every_time(EXAMPLES[kind])
    @given(mutants(kind))
    def run(mutant):
        opened.append(examine(mutant).opened)

    run()
    assert any(opened) and not all(opened)


@pytest.mark.parametrize("kind", COVERED)
def test_a_flipped_bit_changes_nothing_without_a_word(kind):
    @same_every_time(25)
    @given(flipped(kind))
    def run(mutant):
        examine(mutant)

    run()


# ---- what it found -------------------------------------------------------------------------------------------------


def refused(kind: str, name: str, content: bytes | str, *, way: str = "whole", expected: str = "") -> Outcome:
    """A model with one other file: refused within the bounds, or described by ``info``; ``expected`` is in the text."""
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    files = {n: c for n, c in original(kind).files.items() if n != "SHA256SUMS"} | {name: content}
    texts, check = [], fuzz._check_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "_check_text", lambda text: texts.append(text) or check(text))
        outcome = examine(Mutant(kind, files, (), way))
    assert way == "info" or not outcome.opened
    assert expected in texts[-1], texts
    return outcome


def safetensors_of(header: str, data: bytes = b"") -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def native_of(config=None, tokenizer=None) -> bytes:
    """A file of ours without tensors; what is None is as it should be."""
    raw = original("native").files["a.safetensors"]
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    texts = {"format": "sd_jax", "config": json.dumps(config) if config else metadata["config"]}
    texts["tokenizer"] = json.dumps(json.loads(metadata["tokenizer"]) | (tokenizer or {}))
    return safetensors_of(json.dumps({"__metadata__": texts}))


def changed(kind: str, name: str, **values) -> str:
    """A JSON file of an original, with other values."""
    return json.dumps(json.loads(original(kind).files[name]) | values)


def zip_of(pickled: bytes, storage: bytes = bytes(16)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
        archive.writestr("archive/data/0", storage)
    return buffer.getvalue()


def tensor_of(count: int, shape: tuple[int, ...]) -> bytes:
    """Instructions for a tensor in a storage of ``count`` numbers."""
    pid = b"(" + unicode("storage") + b"ctorch\nFloatStorage\n" + unicode("0") + unicode("cpu") + integer(count) + b"tQ"
    sizes, strides = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, (1,) * len(shape)))
    rest = b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + integer(0) + sizes + strides + rest


def leaf_of(shape: list[int]) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([shape, "int8", b""]))


@pytest.mark.parametrize("shape", [(0, 1 << 61), (1 << 61, 0, 1 << 61), (0,) * 40], ids=str)
def test_tensors_without_elements_that_numpy_cannot_make(shape):
    """NumPy raised ValueError when they were read, by ``sd-jax info`` say."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    for way in ("whole", "info", "unet"):
        refused("safetensors", "a.safetensors", safetensors_of(json.dumps({"a": entry})), way=way)
        refused("ckpt", "a.ckpt", zip_of(b"}" + unicode("a") + tensor_of(4, shape) + b"s."), way=way)
        refused("flax", FLAX, msgpack.packb({"a": leaf_of(list(shape))}), way=way)


@pytest.mark.parametrize(
    "part",
    [
        {"unet": {"in_channels": 1 << 40}},  # JAX ran out of memory
        {"unet": {"in_channels": 0}},  # a division by zero
        {"unet": {"context_width": 0}},
        {"unet": {"widths": [32] * 20, "heads": [1] * 20, "attention": [True] * 20, "layers": 20}},  # minutes
        {"unet": {"attention": [True]}},  # an IndexError
        {"unet": {"layers": 10**9}},  # for ever
        {"vae": {"widths": [32] * 100}},
        {"vae": {"image_channels": 0}},
        {"clip": {"width": 0, "heads": 1}},
        {"clip": {"positions": 1 << 62}},  # an OverflowError
        {"clip": {"activation": "relu"}},  # a KeyError
    ],
    ids=str,
)
def test_configs_that_make_no_network(part):
    config = {"clip": {"vocab_size": 514, **part.pop("clip", {})}} | part
    for way in ("whole", "info"):
        refused("native", "a.safetensors", native_of(config), way=way, expected="no network is made with")


def test_an_index_that_names_itself_or_more_than_a_file_system_can():
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    for name, expected in ((index.rpartition("/")[2], "no file of weights"), ("n" * 300, "missing"), ("\0", "missing")):
        file = changed("shards", index, weight_map={"conv_in.weight": name})
        for way in ("whole", "info", "unet"):
            refused("shards", index, file, way=way, expected=expected)


def test_names_in_the_list_of_hashes_that_no_file_has():
    text = original("folder").files["SHA256SUMS"].decode()
    for name in ("\0", "n" * 300, "n" * 300 + ".safetensors", "../x", "/dev/null"):
        files = original("folder").files | {"SHA256SUMS": f"{text}{'0' * 64}  {name}\n".encode()}
        assert examine(Mutant("folder", files, ())).opened


@pytest.mark.parametrize("way", ["whole", "info"])
def test_what_would_move_the_cursor_is_not_shown(way):
    """Messages quoted a file's words as they stood there."""
    red, shown = "\x1b[31m", r"\x1b[31m"
    header = safetensors_of(json.dumps({red: json.loads(NOTHING)}))
    refused("safetensors", "a.safetensors", header, way=way, expected=shown)
    refused("native", "a.safetensors", native_of({"clip": {red: 1}}), way=way, expected=shown)
    refused("native", "a.safetensors", native_of({"noise": {"prediction": red}}), way=way, expected="printed")
    if way == "whole":  # the others need no tokenizer
        refused("native", "a.safetensors", native_of(tokenizer={"pad": red}), expected=shown)
    scheduler, tokenizer = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
    for word in (red, "\ud800", "\u202e"):
        refused("flax", scheduler, changed("flax", scheduler, _class_name=word), way=way, expected="is not known")
        if way == "whole":
            refused("flax", tokenizer, changed("flax", tokenizer, pad_token=word), expected="it has no ")


def test_a_record_is_shown_as_text():
    files = original("folder").files | {"sd_jax.json": b'{"version": "\\u001b[31m", "source": "\\ud800"}'}
    files = {name: content for name, content in files.items() if name != "SHA256SUMS"}
    assert examine(Mutant("folder", files, (), "info")).opened


def test_globals_are_shown_as_text():
    name = "\x1b[31m\n\u202e\n".encode()
    refused("ckpt", "a.ckpt", zip_of(b"(i" + name + b"."), expected=r"an instance of \x1b[31m.\u202e by INST")
    code = b"}" + unicode("state_dict") + b"}" + unicode("a") + tensor_of(4, (4,)) + b"s" + b"s"
    refused("ckpt", "a.ckpt", zip_of(code + b"Nc" + name + b"s."), way="info", expected=r"not run  \x1b[31m.\u202e")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-le"])
def test_a_header_is_utf_8(encoding):
    """As the safetensors library has it; Python's json takes others, and imports what reads them."""
    raw = json.dumps({"a": json.loads(NOTHING)}).encode(encoding)
    refused("safetensors", "a.safetensors", len(raw).to_bytes(8, "little") + raw, expected="a header that is not JSON")


@pytest.mark.parametrize("way", ["whole", "info", "vae"])
def test_a_value_too_long_to_be_quoted(way):
    for value in ("m" * 20_000, [1 << 62] * 3000):
        name = "vae/config.json"
        refused(
            "flax", name, changed("flax", name, block_out_channels=value), way=way, expected="too long, or too deep"
        )


@pytest.mark.parametrize("depth", [20, 900, 940, 960, 980, 1000])
def test_json_as_deep_as_python_can_read(depth):
    """It was read, and then too deep to be quoted."""
    deep = "[" * depth + "]" * depth
    for name, key in (("unet/config.json", "act_fn"), ("model_index.json", "_class_name")):
        text = changed("flax", name).rstrip("}") + f', "{key}": {deep}}}'
        refused("flax", name, text, expected="too long, or too deep" if depth < 900 else "")
    refused("native", "a.safetensors", native_of({"unet": {"eps": "DEEP"}}).replace(b'\\"DEEP\\"', deep.encode()))


def test_small_files_that_grow():
    """Each took hundreds of megabytes, or minutes, and the more of either the larger it was."""
    globals_ = unicode("m" * 100_000) + b"q\x00(" + b"h\x00h\x00\x93" * 10_000 + b"t."
    refused("ckpt", "a.ckpt", zip_of(globals_), expected="names a global by 200000 characters")
    pairs = b"](" + b"".join(unicode(str(i)) + b"N\x86" for i in range(2000)) + b"e"
    dicts = b"ccollections\nOrderedDict\nq\x00" + pairs + b"\x85q\x01(" + b"h\x00h\x01R" * 10_000 + b"t."
    refused("ckpt", "a.ckpt", zip_of(dicts), expected="where a dictionary of tensors was expected")
    views = tensor_of(1 << 18, (1 << 18,)) + b"q\x00}(" + b"".join(unicode(str(i)) + b"h\x00" for i in range(20_000))
    refused("ckpt", "a.ckpt", zip_of(views + b"u.", bytes(4 << 18)), way="unet", expected="more than 8 times its size")
    names = msgpack.packb({"x" * 50_000: {str(i): leaf_of([0]) for i in range(5000)}})
    refused("flax", FLAX, names, expected="a name has 50000 bytes")
    refused("flax", FLAX, msgpack.packb({"a": leaf_of([1 << 63] * 100_000)}), expected="100000 axes")
    refused("flax", FLAX, msgpack.packb({str(i): {} for i in range(300_000)}), expected="300000 modules")


def test_files_of_nothing_but_small_values(monkeypatch):
    """A byte may become a hundred, so there are limits to how many values there are."""
    assert torch_pickle.MAX_INSTRUCTIONS <= 400_000
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 40_000)
    for code in (b"N" + b"\x94" * 100_000, b"(" + b"".join(b"c%d\n\n" % i for i in range(100_000))):
        outcome = refused("ckpt", "a.ckpt", zip_of(code + b"."), expected="more than 40000 instructions")
        assert outcome.peak < (fuzz.CONSTANT + 20 * len(code)) / 10
    for value in ("[]", '"aa"', '{"a":1}'):
        values = '{"a":[' + ",".join([value] * 300_000) + "]}"
        refused("safetensors", "a.safetensors", safetensors_of(values), expected="more than 250000 values")
        refused("flax", "unet/config.json", values, expected="larger than any file of its kind")
    refused("flax", "unet/config.json", '{"a":"' + "x" * (9 << 20) + '"}', expected="larger than any file of its kind")
    header = "{" + ",".join(f'"{i}":{NOTHING}' for i in range(20_000)) + "}"
    refused("safetensors", "a.safetensors", safetensors_of(header))


def test_floats_of_eight_bits_are_looked_at_in_parts():
    """They become float32 for that, of which a large tensor would take four times the file."""
    for dtype, size in (("F8_E4M3", 1), ("BF16", 2), ("F64", 8)):
        entry = {"dtype": dtype, "shape": [(32 << 20) // size], "data_offsets": [0, 32 << 20]}
        content = safetensors_of(json.dumps({"a": entry}), b"\xff" * (32 << 20))
        outcome = examine(Mutant("safetensors", {"a.safetensors": content}, (), "info"))
        assert outcome.opened and outcome.peak < 40 << 20


def test_the_nearest_name_is_not_looked_up_among_thousands(tmp_path):
    """Each comparison takes some 0.03 ms: this file of half a megabyte took seconds."""
    names = [row.names[0] for row in table("compvis", "unet", MODEL)]
    rng = np.random.default_rng(0)
    shuffled = ["".join(rng.permutation(list(names[i % len(names)]))) + str(i) for i in range(4000)]
    shuffled += ["cond_stage_model.transformer.x", "model.diffusion_model.input_blocks.x", "first_stage_model.x"]
    (tmp_path / "a.safetensors").write_bytes(safetensors_of("{" + ",".join(f'"{n}":{NOTHING}' for n in shuffled) + "}"))
    with pytest.raises(WeightsError, match="202 missing, 4003 extra") as caught:
        open_source(tmp_path / "a.safetensors", config=MODEL, tokenizer=TOKENIZER)
    assert "(nearest" not in str(caught.value)


# ---- that it can find anything -------------------------------------------------------------------------------------


def _loop(path):
    while True:
        pass


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        (lambda path: {}["x"], "KeyError"),
        (lambda path: open(path, "ab").close(), "more than read"),
        (lambda path: open("/dev/null", "rb").close(), "more than read"),
        (lambda path: os.rename(path, f"{path}.x"), "more than read"),
        (lambda path: os.system("true"), "more than read"),
        (lambda path: subprocess.run(["true"]), "more than read"),
        (lambda path: __import__("this"), "more than read"),
        (lambda path: exec("1"), "more than read"),
        (lambda path: bytes(200 << 20), "bytes of memory"),
        (_loop, "CPU time"),
        (lambda path: _raise("\x1b[31m"), "x1b"),
        (lambda path: _raise("x" * 5000), "a message of 5000"),
        (lambda path: _raise("one\ntwo"), "two"),
        (lambda path: _raise(""), "a message of 0"),
    ],
    ids=range(14),
)
def test_what_no_file_may_do_is_noticed(monkeypatch, capfd, deed, expected):
    """Reading a file is replaced by something else."""
    sys.modules.pop("this", None)
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "open_source", lambda path, **options: (deed(path), None)[1])
    with pytest.raises((AssertionError, KeyError)) as caught:
        examine(Mutant("native", original("native").files, ()))
    assert expected in f"{caught.type.__name__} {caught.value}"


def _raise(message: str):
    raise WeightsError(message)


def test_other_values_are_noticed():
    """A bit of the data of a file without checksums, which no one can notice but he who knows what was there."""
    raw = bytearray(original("safetensors").files["a.safetensors"])
    raw[-3] ^= 1
    mutant = Mutant("safetensors", {"a.safetensors": bytes(raw)}, (), exact=True)
    with pytest.raises(AssertionError, match="has other values without a word"):
        examine(mutant)


# ---- the program ---------------------------------------------------------------------------------------------------


def test_the_program_runs(capsys, tmp_path):
    options = ["--format", "native", "flax", "--seed", "3", "--out", str(tmp_path / "out")]
    assert fuzz_weights.main(["--minutes", "0.03", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["format", "mutants", "a", "second", "opened", "refused", "peak", "MiB", "allowed"]
    assert lines[1].startswith("native") and int(lines[1].split()[1]) > 0
    assert not (tmp_path / "out").exists()


def test_the_program_keeps_what_fails(monkeypatch, capsys, tmp_path):
    real = fuzz.examine

    def examine(mutant):
        assert not mutant.steps or "flip" not in mutant.steps[0], "a flip"
        return real(mutant)

    monkeypatch.setattr(fuzz, "examine", examine)
    assert fuzz_weights.main(["--minutes", "5", "--format", "native", "--out", str(tmp_path)]) == 1
    (folder,) = tmp_path.iterdir()
    assert (folder / "model" / "a.safetensors").read_bytes() != original("native").files["a.safetensors"]
    report = (folder / "failure.txt").read_text()
    assert "flip" in report and "AssertionError: a flip" in report
    assert str(folder) in capsys.readouterr().err
