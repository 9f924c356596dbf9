"""Read numpy arrays, dictionaries, lists, text and numbers from a pickle without running it.

CIFAR's Python batches are pickles. Python's unpickler calls whatever a file names, and an unpickler that is restricted to
numpy's own functions still reads memory at an address that the file chooses (numpy trusts the state of a dtype). So nothing
is unpickled here: the standard library's `pickletools` splits the file into its instructions, and this interpreter knows the
few that such files consist of. The few names that a pickled array needs are recognised, never imported or called.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np

# 50,000 images with two labels and a name take 200,000, or 500,000 where Python 3 wrote the older protocol 2.
MOST_INSTRUCTIONS = 10**6


class _Name(Enum):
    """The functions and classes that a pickled array refers to."""

    RECONSTRUCT = "numpy.core.multiarray _reconstruct"
    FROM_BUFFER = "numpy.core.numeric _frombuffer"
    NDARRAY = "numpy ndarray"
    DTYPE = "numpy dtype"
    ENCODE = "_codecs encode"
    BYTES = "__builtin__ bytes"


_NAMES = {name.value: name for name in _Name} | {
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.numeric _frombuffer": _Name.FROM_BUFFER,
}
_NUMBERS = re.compile(r"[ui][1248]|f[248]|b1")


class _Dtype:
    """A dtype that is being built: a kind of number such as `u1`, then its byte order."""

    def __init__(self, number: Any) -> None:
        self.number, self.order = _text(number), "="
        if not _NUMBERS.fullmatch(self.number):
            raise ValueError("an array that does not hold numbers")

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and _text(state[1]) in ("<", ">", "|", "=")):
            raise ValueError("a dtype whose state is not that of a number")
        if any(part is not None for part in state[2:5]):
            raise ValueError("an array that does not hold numbers")
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(("=" if self.order == "|" else self.order) + self.number)


def _text(found: Any) -> str:
    """Text, which Python 2 wrote as bytes; empty for anything else."""
    return found.decode("latin-1") if isinstance(found, bytes) else found if isinstance(found, str) else ""


class _Array:
    """An array that is being built."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise ValueError("an array whose state is not that of an array")
        _, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not (isinstance(content, bytes | bytearray) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
        raise ValueError("an array that does not hold numbers")
    if not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
        raise ValueError("an array whose shape is not one")
    numbers = dtype.numpy()
    if math.prod(shape) * numbers.itemsize != len(content):
        raise ValueError(f"an array of shape {shape} in {len(content)} bytes")
    return np.frombuffer(content, numbers).reshape(shape, order=order)


def _call(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name.RECONSTRUCT, (_Name.NDARRAY, _, _):
            return _Array()
        case _Name.FROM_BUFFER, (content, dtype, shape, order):
            built = _Array()
            built.value = _array(content, dtype, shape, order)
            return built
        case _Name.DTYPE, (number, *_):
            return _Dtype(number)
        case _Name.ENCODE, (str() as text, "latin1" | "latin-1"):  # how protocol 2 holds bytes
            return text.encode("latin-1")
        case _Name.BYTES, ():  # how protocol 2 holds no bytes
            return b""
    raise ValueError("a call that no array needs")


def _named(module: Any, name: Any) -> _Name:
    module, name = _text(module), _text(name)
    if (found := _NAMES.get(f"{module} {name}")) is None:
        raise ValueError(f"{module[:60]}.{name[:60]} has no place in a file of arrays")
    return found


class _Machine:
    """The stack and the memory of a pickle; a method for each kind of instruction.

    encodable: characters of text that may become bytes. Each text of a file becomes bytes once; without a limit, a few
    instructions that encode one long text again and again would fill any memory.
    """

    def __init__(self, encodable: int) -> None:
        self.encodable = encodable
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}

    def above_mark(self) -> list[Any]:
        at = self.marks.pop()
        values, self.stack[at:] = self.stack[at:], []
        return values

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("an instruction without its values")
        return self.stack.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("an item for what is no list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(values) % 2:
            raise ValueError("an item for what is no dictionary")
        keys = values[::2]
        # Other keys are not needed, and the hash of a tuple of tuples that hold each other twice takes a time of 2^depth.
        if not all(isinstance(key, str | bytes | int) for key in keys):
            raise ValueError("a key that is no text")
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def build(self) -> None:
        state = self.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise ValueError("a state for what is no array")
        self.stack[-1].build(state)

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction. Raises ValueError for those that no file of arrays needs."""
        if (constant := _CONSTANTS.get(name)) is not None:
            self.stack.append(constant(argument))
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memory[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memory[argument])
        elif name == "TUPLE":
            self.stack.append(tuple(self.above_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(self.last(int(name[-1])))
        elif name == "LIST":
            self.stack.append(self.above_mark())
        elif name == "DICT":
            values = self.above_mark()
            self.stack.append({})
            self.update(values)
        elif name == "APPEND":
            self.extend([self.pop()])
        elif name == "APPENDS":
            self.extend(self.above_mark())
        elif name == "SETITEM":
            self.update(list(self.last(2)))
        elif name == "SETITEMS":
            self.update(self.above_mark())
        elif name == "GLOBAL":
            self.stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(_named(*self.last(2)))
        elif name == "REDUCE":
            made = _call(*self.last(2))
            self.encodable -= len(made) if isinstance(made, bytes) else 0
            if self.encodable < 0:
                raise ValueError("more text than the file holds")
            self.stack.append(made)
        elif name == "BUILD":
            self.build()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the instruction {name} has no place in a file of arrays")


def _itself(argument: Any) -> Any:
    return argument


def _python2_text(argument: str) -> bytes:
    return argument.encode("latin-1")


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _itself),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _itself),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _itself),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _python2_text),
}


def read_pickled_arrays(data: bytes) -> dict[Any, Any]:
    """Return the dictionary that a pickle holds; its values are arrays, lists, bytes, text and numbers.

    Text that Python 2 wrote comes as bytes. Memory: about twice the file's size, and 0.2 KB for each instruction.

    Raises:
        ValueError: the file is no pickle, is damaged, or holds anything else. (Damage may show as an IndexError, KeyError or
            TypeError, too.)
    """
    machine = _Machine(len(data))
    for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if number >= MOST_INSTRUCTIONS:
            raise ValueError(f"more than {MOST_INSTRUCTIONS:,} instructions")
        machine.step(instruction.name, argument)
    if len(machine.stack) != 1 or not isinstance(machine.stack[0], dict):
        raise ValueError("a pickle of something else than a dictionary")
    return {key: value.value if isinstance(value, _Array) else value for key, value in machine.stack[0].items()}
