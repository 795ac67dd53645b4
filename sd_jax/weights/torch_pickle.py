"""A pickle machine that builds only inert values: numbers, text, tuples, lists, dicts, and what its caller allows.

The standard library's unpickler imports and calls whatever a file names; this one has no import and no call to make.
A global is a ``Global``, which is only its name; calling it gives a ``Global`` again, unless the caller's allow-list
has a builder of its own for that name. The instructions are those that ``torch.save`` (pickle protocols 2 to 5) writes,
as ``pickletools`` documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from sd_jax.types import WeightsError

MAX_INSTRUCTIONS = 400_000  # 60 MB of small objects at most; v1 with EMA and optimizer states needs some 100,000
MAX_NAME = 1000  # characters; STACK_GLOBAL makes a new text of two old ones, in one byte
MAX_EMPTY = 1 << 56  # product of the other sizes of a tensor that has a 0 among them; NumPy makes none much beyond
HOSTILE = "the file is damaged or hostile, get it again from its publisher"

Builder = Callable[[tuple], Any]


class Global:
    """A class or function that a pickle names, or something made with it. Never imported, never called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return f"Global({self.name!r})"


class Halt(Exception):
    """The STOP instruction."""


def run(data: bytes, builders: Mapping[str, Builder], persistent: Callable[[Any], Any], where: str) -> Any:
    """The value that the pickle ``data`` describes.

    ``builders`` maps the dotted name of a global to a function of the pickled arguments (a tuple); ``persistent`` turns
    a persistent id into a value. Both may raise WeightsError, and so does any malformed pickle, with ``where`` in
    front. Sets come back as lists.
    """
    return Machine(data, builders, persistent, where).run()


class Machine:
    def __init__(self, data: bytes, builders: Mapping[str, Builder], persistent: Callable[[Any], Any], where: str):
        self.data, self.at, self.where = data, 0, where
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack; nothing below the last one may be popped
        self.memo: dict[int, Any] = {}
        self.foreign: dict[str, None] = {}  # globals outside the allow-list, in the order they were named

    def run(self) -> Any:
        try:
            for _ in range(MAX_INSTRUCTIONS):
                if self.at >= len(self.data):
                    raise self.error("ends without its STOP instruction")
                self.at += 1
                self.step(self.data[self.at - 1])
        except Halt:
            return self.pop()
        raise self.error(f"has more than {MAX_INSTRUCTIONS} instructions")

    def step(self, op: int) -> None:
        if op in _PUT:
            self.memo[self.number(_PUT[op])] = self.top()
        elif op in _GET:
            self.push(self.recall(self.number(_GET[op])))
        elif op in _TEXT:
            self.push(self.text(self.take(self.number(_TEXT[op]))))
        elif op in _UNSIGNED:
            self.push(self.number(_UNSIGNED[op]))
        elif op in _TUPLES:
            self.push(tuple(reversed([self.pop() for _ in range(_TUPLES[op])])))
        elif op in _EMPTY:
            self.push(_EMPTY[op]())
        elif op in _CONSTANTS:
            self.push(_CONSTANTS[op])
        elif op in _BYTES:
            self.push(bytes(self.take(self.number(_BYTES[op]))))
        elif op in _ACTIONS:
            _ACTIONS[op](self)
        else:
            raise self.error(f"has the instruction 0x{op:02x}, which torch.save never writes")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise self.error("ends in the middle of an instruction")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.error("has text that is not UTF-8") from None

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise self.error("ends in the middle of a name")
        return self.text(self.take(end + 1 - self.at)[:-1])

    # ---- the stack ---------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("takes a value from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.error("closes a mark it never set")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise self.error(f"recalls memo {index}, which it never stored")
        return self.memo[index]

    # ---- instructions ------------------------------------------------------------------------------------------------

    def proto(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise self.error(f"is of pickle protocol {version}; 2 to 5 are read")

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number(1)), "little", signed=True))

    def named(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self.error("names a global by something that is not text")
        if len(module) + len(name) > MAX_NAME:
            raise self.error(f"names a global by {len(module) + len(name)} characters")
        full = f"{module}.{name}"
        if full not in self.builders:
            self.foreign[full] = None
        return Global(full)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.named(module, name))

    def inst(self) -> None:
        found = self.named(self.line(), self.line())
        raise self.error(f"makes an instance of {short(found.name)} by INST, which torch.save never writes")

    def call(self, drop: int = 0) -> None:
        """REDUCE and NEWOBJ: function and arguments. NEWOBJ_EX has keyword arguments on top, which no builder takes."""
        for _ in range(drop):
            self.pop()
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.error(f"calls a {type(function).__name__} with a {type(args).__name__}")
        builder = self.builders.get(function.name)
        self.push(builder(args) if builder and not drop else function)

    def build(self) -> None:
        """BUILD gives an object its state (``__setstate__``). Inert values have none."""
        self.pop()
        if isinstance(self.top(), str | bytes | int | float | tuple | list | None):
            raise self.error(f"sets the state of a {type(self.top()).__name__}")

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Global):
            raise self.error(f"appends to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise self.error("sets a key without a value")
        if isinstance(target, dict):
            target.update((_key(k), v) for k, v in zip(values[::2], values[1::2], strict=True))
        elif not isinstance(target, Global):
            raise self.error(f"sets an item of a {type(target).__name__}")

    def stop(self) -> None:
        raise Halt

    def error(self, reason: str) -> WeightsError:
        named = ", ".join(short(name) for name in list(self.foreign)[:5])
        also = f"; it names {named}, which was not run" if named else ""
        return WeightsError(f"{self.where} {reason} (byte {self.at}){also}; {HOSTILE}")


def short(text: str, limit: int = 120) -> str:
    """Text of a file's author, fit for one line of a message."""
    plain = ascii(text[: limit + 1])[1:-1]
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def quoting(message: str, limit: int = 1000) -> str:
    """A message of others that quotes a file as it is, fit for one line of ours."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[: 2 * limit])
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def _key(key: Any) -> Any:
    """Hashing a nest of shared tuples takes exponential time: only plain values stay keys."""
    return key if isinstance(key, str | bytes | int | float | Global | None) else Global("a composite key")


_PUT = {0x71: 1, 0x72: 4}  # BINPUT, LONG_BINPUT; the numbers are the bytes of the operand
_GET = {0x68: 1, 0x6A: 4}  # BINGET, LONG_BINGET
_TEXT = {0x8C: 1, 0x58: 4, 0x8D: 8}  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
_BYTES = {0x43: 1, 0x42: 4, 0x8E: 8, 0x96: 8}  # SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
_UNSIGNED = {0x4B: 1, 0x4D: 2}  # BININT1, BININT2
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}  # TUPLE1, TUPLE2, TUPLE3
_EMPTY = {0x7D: dict, 0x5D: list, 0x29: tuple, 0x8F: list}  # EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, EMPTY_SET
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}  # NONE, NEWTRUE, NEWFALSE
_ACTIONS: dict[int, Callable[[Machine], Any]] = {
    0x80: Machine.proto,
    0x95: lambda m: m.take(8),  # FRAME: a hint for readers of streams
    0x28: lambda m: m.marks.append(len(m.stack)),  # MARK
    0x30: Machine.pop,  # POP
    0x31: Machine.pop_mark,  # POP_MARK
    0x74: lambda m: m.push(tuple(m.pop_mark())),  # TUPLE
    0x91: lambda m: m.push(tuple(m.pop_mark())),  # FROZENSET
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.top()),  # MEMOIZE
    0x4A: lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),  # BININT
    0x8A: Machine.long,  # LONG1
    0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    0x61: lambda m: m.append([m.pop()]),  # APPEND
    0x65: lambda m: m.append(m.pop_mark()),  # APPENDS
    0x90: lambda m: m.append(m.pop_mark()),  # ADDITEMS
    0x73: lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
    0x75: lambda m: m.set_items(m.pop_mark()),  # SETITEMS
    0x63: lambda m: m.push(m.named(m.line(), m.line())),  # GLOBAL
    0x93: Machine.stack_global,
    0x69: Machine.inst,
    0x52: Machine.call,  # REDUCE
    0x81: Machine.call,  # NEWOBJ
    0x92: lambda m: m.call(drop=1),  # NEWOBJ_EX
    0x62: Machine.build,
    0x51: lambda m: m.push(m.persistent(m.pop())),  # BINPERSID
    0x2E: Machine.stop,
}
