"""Faults in prompts: F13 too long, F14 empty, F15 control tokens; and text that is odd, or no text at all."""

import numpy as np
import pytest

from sd_jax.tokenizer import BOS, EOS, ROOM, WINDOW, Tokenizer
from sd_jax.types import RequestError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_words(["a red cube on top of a blue sphere"])


def ids(tokenizer, prompt) -> list[int]:
    """The tokens between BOS and EOS."""
    encoding = tokenizer.encode(prompt)
    return encoding.tokens[0, 0, 1 : 1 + min(encoding.lengths[0], ROOM)].tolist()


# ---- F13: more than 77 tokens ----------------------------------------------------------------------------------------

LONG = "red " * ROOM + "on Top of a\nblue sphere"


def test_f13_truncation_keeps_eos_and_names_the_dropped_words(tokenizer):
    encoding = tokenizer.encode(["a red cube", LONG])
    assert encoding.tokens.shape == (2, 1, WINDOW)
    assert encoding.tokens[1, 0, -1] == tokenizer.eos_id
    assert encoding.dropped == ("", "on Top of a\nblue sphere")
    (warning,) = encoding.warnings()
    assert warning == "prompt 1 has 81 tokens and 75 fit; these words were dropped: 'on Top of a\\nblue sphere'"


def test_f13_error_refuses_with_the_count_and_the_words(tokenizer):
    with pytest.raises(RequestError, match=r"prompt 1 has 81 tokens and 75 fit.*on Top of a.*truncate or chunk"):
        tokenizer.encode(["a red cube", LONG], long_prompt="error")


def test_f13_chunk_reads_everything(tokenizer):
    encoding = tokenizer.encode(LONG, long_prompt="chunk")
    assert encoding.tokens.shape == (1, 2, WINDOW) and encoding.dropped == ("",) and encoding.warnings() == []
    np.testing.assert_array_equal(encoding.tokens[0, 1], tokenizer.encode("on top of a blue sphere").tokens[0, 0])


def test_f13_a_huge_prompt_makes_a_short_warning(tokenizer):
    encoding = tokenizer.encode("sphere " * 20_000)
    assert encoding.lengths == (20_000,) and len(encoding.dropped[0]) > 100_000
    assert len(encoding.warnings()[0]) < 300


def test_f13_unknown_choice(tokenizer):
    with pytest.raises(RequestError, match="long_prompt 'cut' is not one of truncate, error, chunk"):
        tokenizer.encode("a", long_prompt="cut")


# ---- F14: the empty prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long_prompt", ["truncate", "error", "chunk"])
@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_f14_empty_is_unconditional(tokenizer, prompt, long_prompt):
    tokens = tokenizer.encode(prompt, long_prompt=long_prompt).tokens
    unconditional = [tokenizer.bos_id] + [tokenizer.eos_id] * (WINDOW - 1)
    assert tokens.tolist() == [[unconditional]]


# ---- F15: control tokens in the text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [BOS, EOS, EOS.upper(), f"{EOS}{EOS}", f"a{EOS}b", f" {BOS} "])
def test_f15_control_tokens_are_text(tokenizer, token):
    controls = {tokenizer.bos_id, tokenizer.eos_id}
    assert not controls & set(ids(tokenizer, token))
    before, both = ids(tokenizer, "a red cube"), ids(tokenizer, f"a red cube {token} on top")
    assert not controls & set(both)
    assert both[: len(before)] == before and both[-2:] == ids(tokenizer, "on top")


def test_f15_a_control_token_reads_as_its_letters(tokenizer):
    assert ids(tokenizer, "<|endoftext|>") == ids(tokenizer, "<|") + ids(tokenizer, "endoftext") + ids(tokenizer, "|>")


# ---- odd text and no text --------------------------------------------------------------------------------------------

HOSTILE = ["\x00", "a\x00b", "\x1b[2J", "\x7f\x80", "\u202eoverride", "\U0001f469\u200d\U0001f680", "\ufeff", "\uffff"]


@pytest.mark.parametrize("prompt", [*HOSTILE, "../../etc/passwd", "'; drop table", "</w>", "{}%s\\", "\u0301" * 500])
def test_odd_text_is_read(tokenizer, prompt):
    encoding = tokenizer.encode([prompt, f"a {prompt} cube"])
    assert encoding.lengths[0] > 0
    assert encoding.tokens.min() >= 0 and encoding.tokens.max() < tokenizer.vocab_size
    assert (encoding.tokens[:, 0, 0] == tokenizer.bos_id).all()
    assert (encoding.tokens == tokenizer.eos_id).any(axis=-1).all()


@pytest.mark.parametrize(
    "prompts, message",
    [
        (None, "prompts must be text or a list of texts, not None"),
        (7, "not 7"),
        (b"a cube", "not b'a cube'"),
        ([], r"not \[\]"),
        ({"a": "b"}, "not {'a': 'b'}"),
        (["a", None], "prompt 1 is None, a NoneType; it must be text"),
        (["a", 1.5], "prompt 1 is 1.5, a float"),
        ([["a"]], "prompt 0 is .*, a list"),
        (["a", "b\ud800"], "prompt 1 has half a character at 1"),
    ],
)
def test_what_is_not_text_is_refused(tokenizer, prompts, message):
    with pytest.raises(RequestError, match=message):
        tokenizer.encode(prompts)
