"""The tokenizer: ids equal to transformers', positions of words, files in every layout it reads and writes.

OpenAI's vocabulary is not part of the repository. The tests that need it take it from the path in SD_JAX_TEST_BPE, or
from ``shared/data`` next to the checkout, and are skipped where it is in neither. The others make a small one.
"""

import dataclasses
import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sd_jax.tokenizer import BOS, EOS, ROOM, WINDOW, Tokenizer, load_tokenizer
from sd_jax.types import RequestError

CAPTIONS = ["a red cube on top of a blue sphere", "an orange cone to the left of a small grey cylinder"]

ODD = [
    "",
    " ",
    " \t\r\n ",
    "a photo of a cat",
    "A PHOTO Of A Cat",
    "  two  spaces\tand\ta\ttab\nand a new line ",
    "no\u00a0break, em\u2003space, ideographic\u3000space, zero\u200bwidth, line\u2028separator, next\u0085line",
    "\x00 NUL, \x07 bell, \x1b[31m escape, \x1c file separator, \x7f delete",
    "\ufeffbyte order mark",
    "it's the dog's, they're, we've, I'm, you'll, he'd, don't, IT'S, ''s, 'S, o'clock, 'tis",
    "curly \u2018quotes\u2019 and \u201cquotes\u201d, it\u2019s",
    "4k, 1920x1080, 3.14159, 2^10, \u0661\u0662\u0663, \u2460\u2461, \u00bd, \u00b2, \u2167",
    "&amp; &lt;b&gt; &#39;x&#39; &nbsp; <b>bold</b>",
    "caf\u00e9 and cafe\u0301, \u00c5ngstr\u00f6m and A\u030angstro\u0308m, \u1e9b\u0323",
    "STRASSE stra\u00dfe \u1e9e, \u0130stanbul I\u0307 \u0131, \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u03a3",
    "\uff26\uff55\uff4c\uff4c\uff0d\uff57\uff49\uff44\uff54\uff48 \uff11\uff12\uff13",
    "\ufb01 ligature, \u2122 \u00ae \u00a9 \u20ac \u00a5",
    "\u732b\u306e\u5199\u771f\u3001\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u041a\u041e\u0422",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8",
    "\U0001f600 \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f\U0001f525",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U00020000 \U0010ffff \ue000 \ufffd",
    "a(b)[c]{d}:1.2, ((x)), --no, **bold**, a_b, a-b, C++, #tag, @user, http://x.y/z?a=b&c=d",
    "<|startoftext> endoftext|> </w> <w/> a</w>",
    "!!!!!!!! ........ \u2026 --- \u2014 ~~~~ \\ / |",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 300,
    "long " * 200,
    "z\u0300\u0301\u0302\u0303\u0304\u0305\u0306 zalgo",
]


def odd_prompts(count: int = 300) -> list[str]:
    """ODD, and random mixtures of pieces of it with characters from all over Unicode."""
    rng = random.Random(0)
    pieces = [piece for text in ODD for piece in text.split(" ")]
    prompts = list(ODD)
    while len(prompts) < count:
        stray = (chr(c) for c in (rng.choice((rng.randrange(0x250), rng.randrange(0xD800))) for _ in range(6)))
        mixed = [*rng.choices(pieces, k=rng.randrange(1, 12)), *stray]
        rng.shuffle(mixed)
        prompts.append(rng.choice(("", " ", "  ", "\n")).join(mixed))
    return [p for p in prompts if BOS not in p.lower() and EOS not in p.lower()]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_words(CAPTIONS)


@pytest.fixture(scope="module")
def openai_file() -> Path:
    path = Path(
        os.environ.get("SD_JAX_TEST_BPE", Path(__file__).parents[2] / "shared/data/bpe_simple_vocab_16e6.txt.gz")
    )
    if not path.is_file():
        pytest.skip("OpenAI's bpe_simple_vocab_16e6.txt.gz is not here; set SD_JAX_TEST_BPE to its path")
    return path


@pytest.fixture(scope="module")
def full(openai_file) -> Tokenizer:
    return load_tokenizer(openai_file)


def hf_ids(hf, prompts):
    return np.array(hf(prompts, padding="max_length", truncation=True, max_length=WINDOW)["input_ids"], np.int32)


def same_ids(a: Tokenizer, b: Tokenizer):
    prompts = odd_prompts(60)
    np.testing.assert_array_equal(a.encode(prompts).tokens, b.encode(prompts).tokens)


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_known_ids_of_the_released_vocabulary(full):
    full.check(49408)
    assert (full.bos_id, full.eos_id, full.pad_id) == (49406, 49407, 49407)
    tokens = full.encode("a photo of a cat").tokens
    assert tokens.shape == (1, 1, 77) and tokens.dtype == np.int32
    assert tokens[0, 0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokens[0, 0, 7:] == 49407).all()


def test_full_vocabulary_equals_transformers(full, openai_file):
    """The referee is built here from OpenAI's file in OpenAI's own order of tokens, not by ``hf()``."""
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(openai_file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(bytes_to_unicode().values())
    names = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + [BOS, EOS]
    hf = transformers.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    prompts = odd_prompts()
    assert len(prompts) >= 200
    expected, tokens = hf_ids(hf, prompts), full.encode(prompts).tokens[:, 0]
    assert [p for p, a, b in zip(prompts, expected, tokens, strict=True) if (a != b).any()] == []


def test_small_vocabulary_equals_transformers(small):
    pytest.importorskip("transformers")
    prompts = odd_prompts() + CAPTIONS
    np.testing.assert_array_equal(hf_ids(small.hf(), prompts), small.encode(prompts).tokens[:, 0])


def test_html_and_full_width_letters_are_left_alone(small):
    assert small.encode("&amp;").lengths != small.encode("&").lengths
    assert small.encode("\uff41").lengths != small.encode("a").lengths


def test_a_batch_is_its_prompts_one_by_one(small):
    prompts = odd_prompts(60)
    together = small.encode(prompts)
    for i, prompt in enumerate(prompts):
        alone = small.encode(prompt)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        assert alone.dropped[0] == together.dropped[i]


# ---- long prompts ----------------------------------------------------------------------------------------------------


def test_75_tokens_fit_and_76_do_not(small):
    encoding = small.encode(["red " * 75, "red " * 75 + "blue cube "])
    assert encoding.lengths == (75, 77) and encoding.dropped == ("", "blue cube")
    np.testing.assert_array_equal(encoding.tokens[0], encoding.tokens[1])
    assert (encoding.tokens[:, 0, -1] == small.eos_id).all() and (encoding.tokens[:, 0, 1:-1] < small.bos_id).all()
    assert len(small.encode("red " * 75, long_prompt="error").tokens) == 1


def test_a_word_cut_in_two_is_named_whole(small):
    assert small.encode("red " * (ROOM - 2) + "Photo, red").dropped == ("Photo, red",)


def test_chunks_hold_every_token_once(small):
    prompts = ["red cube " * 100, "blue", ""]
    encoding = small.encode(prompts, long_prompt="chunk")
    assert encoding.tokens.shape == (3, 3, WINDOW) and encoding.dropped == ("", "", "") and encoding.warnings() == []
    assert (encoding.tokens[..., 0] == small.bos_id).all()
    red, cube = (small.encode(word).tokens[0, 0, 1] for word in ("red", "cube"))
    body = encoding.tokens[0, :, 1:-1].reshape(-1)
    np.testing.assert_array_equal(body[:200], [red, cube] * 100)
    assert (body[200:] == small.eos_id).all() and (encoding.tokens[0, :, -1] == small.eos_id).all()
    empty = small.encode("").tokens[0, 0]
    np.testing.assert_array_equal(encoding.tokens[1, 0], small.encode("blue").tokens[0, 0])
    np.testing.assert_array_equal(encoding.tokens[1, 1:], [empty, empty])
    np.testing.assert_array_equal(encoding.tokens[2], [empty] * 3)


def test_chunking_short_prompts_changes_nothing(small):
    np.testing.assert_array_equal(
        small.encode(CAPTIONS, long_prompt="chunk").tokens, small.encode(CAPTIONS, long_prompt="truncate").tokens
    )


# ---- positions of words ----------------------------------------------------------------------------------------------


def test_positions(small):
    prompt = "A red cube, a RED sphere and reddish cubes"
    tokens = small.encode(prompt).tokens[0, 0]
    red = small.encode("red").tokens[0, 0, 1]
    assert small.positions(prompt, "red") == [2, 6] == [i for i in range(WINDOW) if tokens[i] == red]
    assert small.positions(prompt, " Red  cube ") == [2, 3]
    size = small.encode("photo").lengths[0]
    assert size > 1  # not one of its words
    assert small.positions("a photo photo", "photo") == [*range(2, 2 + 2 * size)]


@pytest.mark.parametrize("word", ["ed", "cub", "green", "", " ", "red sphere"])
def test_positions_of_what_is_not_a_word_of_the_prompt(small, word):
    with pytest.raises(RequestError, match="is not in the prompt"):
        small.positions("a red cube, reddish", word)


def test_positions_stop_where_reading_stops(small):
    prompt = "a " * 74 + "red red"
    assert small.positions(prompt, "red") == [75]
    with pytest.raises(RequestError, match="only after the first 75"):
        small.positions("a " * 75 + "red", "red")
    with pytest.raises(RequestError, match="only after the first 75"):
        small.positions("a " * 73 + "photo", "photo")


# ---- made tokenizers -------------------------------------------------------------------------------------------------


def test_from_words_gives_each_word_one_token(small):
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    assert small.encode(words).lengths == (1,) * len(words)
    assert len({int(t) for t in small.encode(words).tokens[:, 0, 1]}) == len(words)
    assert small.encode("spheres, unknown").lengths[0] > 2


def test_from_words_when_words_share_parts():
    rng = random.Random(1)
    words = list(dict.fromkeys("".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(300)))
    tokenizer = Tokenizer.from_words(words)
    assert tokenizer.encode(words).lengths == (1,) * len(words)


def test_no_words_gives_the_smallest_vocabulary():
    assert Tokenizer.from_words([]).vocab_size == 514


def test_placeholder_words(small, tmp_path):
    tokenizer = small.with_words("<toy>", "<My-Style>")
    assert tokenizer.vocab_size == small.vocab_size + 2 and small.words == ()
    prompt = "a <toy>, in <my-style>"
    assert tokenizer.positions(prompt, "<toy>") == [2]
    tokens = tokenizer.encode(prompt).tokens[0, 0]
    assert tokens[2] == small.vocab_size and small.vocab_size + 1 in tokens
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.words == tokenizer.words
    np.testing.assert_array_equal(loaded.encode(prompt).tokens, tokenizer.encode(prompt).tokens)
    for words in [("<toy>",), ("x", "x"), (" ",), (EOS,)]:
        with pytest.raises(RequestError, match="must be new"):
            tokenizer.with_words(*words)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_saved_folder_loads_to_the_same(small, tmp_path):
    small.save(tmp_path / "new" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    assert loaded.vocab == small.vocab and loaded.merges == small.merges and loaded.pad == EOS
    same_ids(small, loaded)


def test_saved_full_vocabulary_opens_in_transformers(full, tmp_path):
    transformers = pytest.importorskip("transformers")
    full.save(tmp_path)
    assert len((tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()) == 48895
    hf = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert len(hf) == 49408 and hf.pad_token_id == 49407 and hf.model_max_length == 77
    prompts = odd_prompts(60)
    expected = full.encode(prompts).tokens[:, 0]
    np.testing.assert_array_equal(hf_ids(hf, prompts), expected)
    np.testing.assert_array_equal(hf_ids(full.hf(), prompts), expected)
    same_ids(load_tokenizer(tmp_path), full)


@pytest.mark.parametrize("words", [(), ("<toy>",)])
def test_folders_written_by_transformers(small, tmp_path, words):
    """transformers 5 writes tokenizer.json alone; ours is written as vocab.json and merges.txt and read there too."""
    transformers = pytest.importorskip("transformers")
    tokenizer = small.with_words(*words)
    tokenizer.hf().save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "ours")
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    loaded = load_tokenizer(tmp_path / "theirs")
    assert loaded.vocab == tokenizer.vocab and loaded.words == words and loaded.pad == EOS
    same_ids(loaded, tokenizer)
    prompts = [*CAPTIONS, "a <toy> on a <toy>", *odd_prompts(40)]
    hf = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(hf_ids(hf, prompts), tokenizer.encode(prompts).tokens[:, 0])


def test_older_layouts(small, tmp_path):
    """As in the released v1 models: the map has the last word on padding, and added words have their own file."""
    small.save(tmp_path)
    config = {"bos_token": {"content": BOS}, "eos_token": {"content": EOS}, "pad_token": EOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<toy>": small.vocab_size}))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(merges.replace("\n", "\r\n").encode())
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad == "!" and loaded.words == ("<toy>",) and loaded.merges == small.merges
    assert loaded.encode("").tokens[0, 0, :3].tolist() == [loaded.bos_id, loaded.eos_id, loaded.vocab["!"]]
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name).unlink()
    assert load_tokenizer(tmp_path).pad == EOS


def test_openai_layout_of_a_small_file(small, tmp_path):
    lines = ["#version: 0.2", *(" ".join(merge) for merge in small.merges), ""]
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert load_tokenizer(path).vocab == small.vocab


# ---- what is refused -------------------------------------------------------------------------------------------------


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(folder: Path, config: dict):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def edit_vocab(folder: Path, change):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(change(vocab)), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "vocab.json").unlink(), "neither tokenizer.json nor both vocab.json and merges.txt"),
        (lambda f: (f / "merges.txt").unlink(), "neither tokenizer.json nor both vocab.json and merges.txt"),
        (lambda f: truncate(f / "vocab.json"), "vocab.json is not JSON"),
        (lambda f: truncate(f / "merges.txt"), "made by no merge"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\n"), "made by no merge"),
        (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe\x00"), "cannot be used"),
        (lambda f: (f / "merges.txt").write_text("q q\na b c\n"), "2 merges are of tokens that it does not have"),
        (lambda f: (f / "vocab.json").write_text("[1, 2]"), "holds a list where an object was expected"),
        (lambda f: (f / "vocab.json").write_text("[" * 100000), "cannot be used"),
        (lambda f: edit_vocab(f, lambda v: {BOS: 0, EOS: 1}), "512 of the 512 byte symbols are missing"),
        (lambda f: put(f, {}) or edit_vocab(f, lambda v: {k: i for k, i in v.items() if k != EOS}), f"it has no {EOS}"),
        (lambda f: edit_vocab(f, lambda v: v | {"a": 7}), "ids of its"),
        (lambda f: edit_vocab(f, lambda v: v | {"a": None}), "ids of its"),
        (lambda f: edit_vocab(f, lambda v: v | {"a": []}), "ids of its"),
        (
            lambda f: (f / "special_tokens_map.json").write_text("{}") and put(f, {"pad_token": "<pad>"}),
            "it has no <pad>",
        ),
        (lambda f: put(f, {"added_tokens_decoder": {"1": 2}}), "not laid out as CLIP's"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}'), "not of a CLIP tokenizer"),
    ],
)
def test_damaged_folders(small, tmp_path, damage, message):
    small.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_foreign_paths(tmp_path):
    with pytest.raises(RequestError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(RequestError, match="neither tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in (b"plain text", gzip.compress(b"x y\nnot merges\n"), gzip.compress(b"v\na b\n" * 999)[:40], b""):
        path = tmp_path / "bpe.txt.gz"
        path.write_bytes(content)
        with pytest.raises(RequestError, match="cannot be used"):
            load_tokenizer(path)


def test_check_against_the_text_encoder(small):
    small.check(small.vocab_size)
    with pytest.raises(RequestError, match="and the text encoder 49408; use the tokenizer"):
        small.check(49408)


# ---- conduct ---------------------------------------------------------------------------------------------------------


def test_it_is_a_value(small):
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.pad = "!"
    same_ids(pickle.loads(pickle.dumps(small)), small)


def test_importing_it_imports_no_transformers_or_torch():
    code = "import sys, sd_jax.tokenizer; print(sorted({'transformers', 'torch', 'diffusers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
