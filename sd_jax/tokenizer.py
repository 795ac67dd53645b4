"""Prompt -> tokens: CLIP's byte-pair tokenizer, as Stable Diffusion v1 reads prompts.

It gives the ids of transformers' ``CLIPTokenizer`` without importing transformers, which takes seconds. Two differences
are on purpose. A control token written in a prompt, ``<|endoftext|>`` say, is text here and a token there. And no
tokenizer is made of missing files, where ``CLIPTokenizer`` silently falls back to a vocabulary of two tokens.

Like ``CLIPTokenizer``, and unlike OpenAI's original, it leaves HTML entities and wrongly decoded text ("&amp;", "â€œ")
alone: text is only NFC-normalised, its white space collapsed, and lower-cased.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from sd_jax.types import RequestError

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
WINDOW = 77  # positions the text encoder has
ROOM = WINDOW - 2  # of them, the ones between BOS and EOS
LONG_PROMPT = ("truncate", "error", "chunk")

_END = "</w>"  # marks the symbol that ends a word
_OPENAI_MERGES = 48894  # of the 262,144 in OpenAI's file; the vocabulary is made of these
_OPENAI_BYTES = 1 << 24  # no more than this is unpacked of a file that claims to be OpenAI's, which has 3.2 MB


class TruncationWarning(UserWarning):
    """Words at the end of a prompt were not read."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Tokens for the text encoder, and what did not fit in them.

    ``tokens`` is int32 [B, n, 77], each row BOS, ids, EOS, padding; n is 1 unless long prompts were cut into chunks,
    whose contexts are meant to be joined along the token axis. A prompt with fewer chunks than the longest ends in
    empty ones.
    """

    tokens: np.ndarray
    lengths: tuple[int, ...]  # tokens in each prompt, BOS and EOS not counted, before truncation
    dropped: tuple[str, ...]  # the words at the end of each prompt that were not read; "" where all were
    name: str = "prompt"  # what sentences about one call it

    def warnings(self) -> list[str]:
        """One sentence for each truncated prompt."""
        return [
            f"{_too_long(self.name, i, length)}; these words were dropped: {_shorten(words)!r}"
            for i, (length, words) in enumerate(zip(self.lengths, self.dropped, strict=True))
            if words
        ]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """CLIP's tokenizer: NFC, white space, lower case; words; bytes merged pair by pair.

    ``vocab`` maps each token to its id, 0 ... n-1; ``merges`` are in order of priority. ``pad`` is the token that fills
    the window after EOS; in v1 it is EOS itself. ``words`` are placeholder words (textual inversion), in ``vocab`` too,
    of one token each and made by no merge. An inconsistent set is refused with RequestError.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    pad: str = EOS
    words: tuple[str, ...] = ()

    def __post_init__(self):
        _check_consistent(self.vocab, self.merges, self.pad, self.words)

    @classmethod
    def from_merges(cls, merges: Sequence[tuple[str, str]]) -> Tokenizer:
        """The tokenizer of these merges, its vocabulary in OpenAI's order.

        That is: 256 bytes, the same 256 at the end of a word, what each merge makes, BOS, EOS.
        """
        symbols = _byte_symbols()
        names = [*symbols, *(symbol + _END for symbol in symbols), *(a + b for a, b in merges), BOS, EOS]
        return cls({name: i for i, name in enumerate(dict.fromkeys(names))}, tuple(merges))

    @classmethod
    def from_words(cls, texts: Iterable[str]) -> Tokenizer:
        """A small tokenizer for which every word in ``texts`` is one token, and any other text still has tokens."""
        split = cls.from_merges(())._split
        return cls.from_merges(_merges_for(dict.fromkeys(word for text in texts for word in split(text))))

    def with_words(self, *words: str) -> Tokenizer:
        """The same tokenizer with placeholder words added at the end of its vocabulary, one new token each.

        They are found anywhere in a prompt, inside other words too, in upper or lower case: prefer "<toy>" to "toy".
        """
        if len(set(words)) < len(words) or any(not word.strip() or word in self.vocab for word in words):
            raise RequestError(f"placeholder words must be new, not empty and not repeated, and {words} are not all so")
        first = len(self.vocab)
        vocab = {**self.vocab, **{word: first + i for i, word in enumerate(words)}}
        return dataclasses.replace(self, vocab=vocab, words=(*self.words, *words))

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def bos_id(self) -> int:
        return self.vocab[BOS]

    @property
    def eos_id(self) -> int:
        return self.vocab[EOS]

    @property
    def pad_id(self) -> int:
        return self.vocab[self.pad]

    def encode(self, prompts: str | Sequence[str], *, long_prompt: str = "truncate", name: str = "prompt") -> Encoding:
        """Tokens of a prompt or of several. The empty prompt gives the unconditional tokens: BOS, EOS, padding.

        Args:
          prompts: text; a single string is a batch of one.
          long_prompt: what to do with more than 75 tokens: "truncate" reads the first 75 and names the dropped words in
            the result, "error" refuses, "chunk" reads them all, 75 at a time.
          name: what errors and warnings call one of them.

        Raises:
          RequestError: a prompt is not text, or is too long under "error".
        """
        if long_prompt not in LONG_PROMPT:
            raise RequestError(f"long_prompt {long_prompt!r} is not one of {', '.join(LONG_PROMPT)}")
        prompts = _as_list(prompts, name)
        encoded = [self._backend.encode(prompt) for prompt in prompts]
        lengths = tuple(len(e.ids) for e in encoded)
        dropped = tuple(_dropped(prompt, e) for prompt, e in zip(prompts, encoded, strict=True))
        chunks = 1
        if long_prompt == "chunk":
            chunks = max(1, -(-max(lengths) // ROOM))
            dropped = ("",) * len(prompts)
        elif long_prompt == "error" and any(dropped):
            i = next(i for i, words in enumerate(dropped) if words)
            raise RequestError(
                f"{_too_long(name, i, lengths[i])}; these words are too many: {_shorten(dropped[i])!r}; "
                "shorten it, or set long_prompt to truncate or chunk"
            )

        tokens = np.full((len(prompts), chunks, WINDOW), self.pad_id, np.int32)
        tokens[..., 0] = self.bos_id
        for rows, e in zip(tokens, encoded, strict=True):
            for c, row in enumerate(rows):
                ids = e.ids[c * ROOM : (c + 1) * ROOM]
                row[1 : 1 + len(ids)] = ids
                row[1 + len(ids)] = self.eos_id
        return Encoding(tokens, lengths, dropped, name)

    def positions(self, prompt: str, word: str) -> list[int]:
        """Where ``word`` (or several in a row) stands among the 77 tokens of ``prompt``: all tokens, all occurrences.

        Whole words only: "cube" is not found in "cubes". Raises RequestError where it is not among the tokens read.
        """
        text, part = (self._backend.encode(t) for t in _as_list([prompt, word]))
        size = len(part.ids)
        starts = [
            i
            for i in range(len(text.ids) - size + 1)
            if size and text.ids[i : i + size] == part.ids and (i == 0 or text.word_ids[i] != text.word_ids[i - 1])
        ]
        if not starts:
            raise RequestError(f"{word!r} is not in the prompt {_shorten(prompt)!r}, where whole words are looked for")
        read = {1 + i + k for i in starts if i + size <= ROOM for k in range(size)}
        if not read:
            raise RequestError(f"{word!r} is in the prompt only after the first {ROOM} tokens, where reading stops")
        return sorted(read)

    def check(self, vocab_size: int) -> None:
        """Raises RequestError unless the text encoder has an embedding for each token, and no other."""
        if self.vocab_size != vocab_size:
            raise RequestError(
                f"the tokenizer has {self.vocab_size} tokens and the text encoder {vocab_size}; "
                "use the tokenizer that came with these weights"
            )

    def save(self, folder: str | Path) -> None:
        """Writes a folder that ``load_tokenizer``, transformers and diffusers open."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": self.pad, "unk_token": EOS}
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": WINDOW,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **special,
            "added_tokens_decoder": {
                str(self.vocab[token]): _added_token(token, special=token not in self.words)
                for token in sorted({*special.values(), *self.words}, key=self.vocab.__getitem__)
            },
        }
        _write(folder / "vocab.json", json.dumps(self._by_id(), ensure_ascii=False))
        _write(folder / "merges.txt", "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in self.merges)]))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")

    def hf(self) -> Any:
        """The same tokenizer as a transformers ``CLIPTokenizer`` (imports transformers, which takes seconds)."""
        from transformers import CLIPTokenizer

        hf = CLIPTokenizer(vocab=self._by_id(), merges=list(self.merges), pad_token=self.pad, model_max_length=WINDOW)
        hf.add_tokens(list(self.words))
        return hf

    def _by_id(self) -> dict[str, int]:
        return dict(sorted(self.vocab.items(), key=lambda item: item[1]))

    def _split(self, text: str) -> list[str]:
        """The words of a text, each in byte symbols."""
        text = self._backend.normalizer.normalize_str(text)
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        # BOS and EOS are deliberately not registered here: that is what makes them text when they stand in a prompt.
        model = models.BPE(vocab=dict(self.vocab), merges=list(self.merges), end_of_word_suffix=_END, unk_token=EOS)
        backend = tokenizers.Tokenizer(model)
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
        split = pre_tokenizers.Split(words, behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.add_tokens(list(self.words))
        return backend


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer folder (transformers' and diffusers' files), or OpenAI's ``bpe_simple_vocab_16e6.txt.gz``.

    Raises RequestError, with the path, for whatever is missing, broken or not CLIP's.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise RequestError(f"there is no tokenizer {path}; give a folder or OpenAI's bpe_simple_vocab_16e6.txt.gz")
    try:
        return _load_folder(path) if path.is_dir() else Tokenizer.from_merges(_openai_merges(path))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RequestError(f"the tokenizer {path} cannot be used: {error}") from error
    except (AttributeError, LookupError, RecursionError, TypeError) as error:
        raise RequestError(f"the tokenizer {path} cannot be used: its files are not laid out as CLIP's") from error


def _load_folder(folder: Path) -> Tokenizer:
    def optional(name: str) -> dict:
        return _read_json(folder / name) if (folder / name).is_file() else {}

    if (folder / "tokenizer.json").is_file():
        file = _read_json(folder / "tokenizer.json")
        model = file.get("model")
        if not isinstance(model, dict) or model.get("end_of_word_suffix") != _END:
            raise RequestError("tokenizer.json is not of a CLIP tokenizer")
        vocab, lines, listed = model.get("vocab"), model.get("merges", []), file.get("added_tokens") or []
        merges = [tuple(line.split(" ") if isinstance(line, str) else line) for line in lines]
        added = {token["content"]: token["id"] for token in listed}
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, added = _read_json(folder / "vocab.json"), optional("added_tokens.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        lines = (line.rstrip("\r") for line in lines if not line.startswith("#version"))
        merges = [tuple(line.split(" ")) for line in lines if line]
    else:
        raise RequestError("the folder has neither tokenizer.json nor both vocab.json and merges.txt")

    config, special = optional("tokenizer_config.json"), optional("special_tokens_map.json")
    listed = config.get("added_tokens_decoder", {})
    added |= {token["content"]: int(i) for i, token in listed.items()}
    # The config is the newer file. Where it lists no tokens it is an old one, in which the map has the last word.
    pad = {**config, **special, **(config if listed else {})}.get("pad_token") or EOS
    pad = pad["content"] if isinstance(pad, dict) else pad
    words = sorted(added.keys() - {BOS, EOS, pad}, key=added.__getitem__)
    return Tokenizer({**vocab, **added}, tuple(merges), pad, tuple(words))


def _openai_merges(path: Path) -> list[tuple[str, ...]]:
    with gzip.open(path, "rb") as file:
        lines = file.read(_OPENAI_BYTES).decode().split("\n")
    if "#version" not in lines[0]:
        raise RequestError("it is not OpenAI's bpe_simple_vocab_16e6.txt.gz")
    return [tuple(line.split(" ")) for line in lines[1 : 1 + _OPENAI_MERGES] if line]


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path.name} holds a {type(value).__name__} where an object was expected")
    return value


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _added_token(token: str, *, special: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, "special": special}
    return {"content": token, **flags}


def _check_consistent(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: str, words: Sequence[str]):
    """Refuses, naming all that is wrong, a vocabulary and merges that do not belong together or are not CLIP's."""
    wrong = []
    if missing := [token for token in (BOS, EOS, pad, *words) if token not in vocab]:
        wrong.append(f"it has no {', '.join(missing)}")
    if {*map(type, vocab.values())} != {int} or {*vocab.values()} != {*range(len(vocab))}:
        wrong.append(f"the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
    symbols = _byte_symbols()
    made = {*symbols, *(symbol + _END for symbol in symbols)}
    if absent := made - vocab.keys():
        wrong.append(f"{len(absent)} of the {len(made)} byte symbols are missing")
    if broken := [merge for merge in merges if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}]:
        wrong.append(f"{len(broken)} merges are of tokens that it does not have, such as {' '.join(broken[0])!r}")
    made |= {"".join(merge) for merge in merges}
    if orphans := vocab.keys() - made - {BOS, EOS, pad, *words}:
        wrong.append(f"{len(orphans)} of its tokens are made by no merge, such as {min(orphans)!r}")
    if wrong:
        raise RequestError(f"this is not a whole CLIP tokenizer: {'; '.join(wrong)}; fetch its files again")


def _byte_symbols() -> list[str]:
    """A visible character for each of the 256 bytes, in OpenAI's order: first those that are visible themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(i) for i in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def _merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges under which each word is one token.

    A word is first merged as far as the pairs found so far go, the oldest first, and only then given new ones. New
    pairs come last in priority, so they cannot undo an earlier word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + _END]
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            ranks.setdefault(pairs[at], len(ranks))
            symbols[at : at + 2] = ["".join(pairs[at])]
    return list(ranks)


def _as_list(prompts: str | Sequence[str], name: str = "prompt") -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, bytes) or len(prompts) == 0:
        raise RequestError(f"{name}s must be text or a list of texts, not {_shorten(repr(prompts))}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise RequestError(f"{name} {i} is {_shorten(repr(prompt))}, a {type(prompt).__name__}; it must be text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} {i} has half a character at {error.start}; decode it as UTF-8") from error
    return [str(prompt) for prompt in prompts]


def _dropped(prompt: str, encoded: tokenizers.Encoding) -> str:
    """The end of the prompt that does not fit, from the start of the first word that is not read in full."""
    if len(encoded.ids) <= ROOM:
        return ""
    first = encoded.word_ids.index(encoded.word_ids[ROOM])
    return prompt[encoded.offsets[first][0] :].rstrip(" \r\n")


def _too_long(name: str, i: int, length: int) -> str:
    return f"{name} {i} has {length} tokens and {ROOM} fit"


def _shorten(text: str, width: int = 200) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
