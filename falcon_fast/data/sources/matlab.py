"""Read arrays of numbers from a MATLAB 5 file in limited memory.

scipy's reader is not used: it allocates whatever sizes a file states, unpacks compressed parts without a limit, and scipy 1.17.1
crashed with a segmentation fault on files that a fuzz test had changed. SVHN's files need little of the format. After a header of
128 bytes comes one element for each variable: a matrix, or a compressed matrix. An element is a tag (kind, size) and its data,
padded to 8 bytes; an element of up to 4 bytes may have both in 8 bytes. A matrix consists of four elements: class and flags,
shape, name, and numbers. ("MAT-File Format", The MathWorks, R2024a, chapter 1.)
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from falcon_fast.reading import read_bytes

HEADER = 128  # bytes; the last four are the version and the byte order
ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
TEXT, SHAPE, FLAGS, MATRIX, COMPRESSED = 1, 5, 6, 14, 15  # kinds of elements
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = range(6, 16)  # of matrices: double, single, and integers of 8 to 64 bits; others are objects, cells, text ...
COMPLEX_OR_LOGICAL = 0x0A00
MOST_VARIABLES = 16
MOST_DIMENSIONS = 8


def read_matlab_arrays(path: Path, names: Collection[str], limit: int) -> dict[str, np.ndarray]:
    """Return the arrays `names` of a MATLAB 5 file, in the dtype in which they are stored.

    Args:
        limit: largest size of the file, and of all variables unpacked, in bytes. Three times this is taken at most.

    Raises:
        OSError, ValueError: the file cannot be read, is damaged, is too large, or holds something else under these names.
    """
    found: dict[str, np.ndarray] = {}
    data = read_bytes(path, limit)
    if (order := ORDERS.get(data[HEADER - 4 : HEADER])) is None:
        raise ValueError("it is not a MATLAB 5 file")
    for number, (kind, content) in enumerate(_elements(memoryview(data)[HEADER:], order, padded=False)):
        if number >= MOST_VARIABLES:
            raise ValueError(f"it has more than {MOST_VARIABLES} variables")
        if kind == COMPRESSED:
            content = _unpacked(content, limit)
            limit -= len(content)
            kind, content = next(_elements(content, order))
        if kind != MATRIX:
            raise ValueError(f"it has an element of kind {kind} where a variable is expected")
        name, array = _matrix(content, order, names)
        if name in found:
            raise ValueError(f"it holds {name} twice")
        if array is not None:
            found[name] = array
    if missing := sorted(set(names) - found.keys()):
        raise ValueError(f"it does not hold {' and '.join(missing)}")
    return found


def _elements(data: memoryview, order: str, padded: bool = True) -> Iterator[tuple[int, memoryview]]:
    """Yield kind and data of each element. Raises ValueError if the data ends within one."""
    at = 0
    while at < len(data):
        if len(data) < at + 8:
            raise ValueError("it is cut short")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # a short element: size and kind in the first word
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            if size > 4:
                raise ValueError("it has a short element that is not short")
        if start + size > len(data):
            raise ValueError("it is cut short")
        yield kind, data[start : start + size]
        end = start + size
        at = end + (-end + at) % 8 if padded else end


def _unpacked(content: memoryview, limit: int) -> memoryview:
    """Return the data of a compressed element, which has at most `limit` bytes."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(content, limit + 1)
    except zlib.error as error:
        raise ValueError(f"it is damaged: {error}") from None
    if len(data) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    if len(data) < 8:
        raise ValueError("it is cut short")
    return memoryview(data)


def _matrix(content: memoryview, order: str, names: Collection[str]) -> tuple[str, np.ndarray | None]:
    """Return the name of a variable, and its array if it is one of `names`."""
    parts = _elements(content, order)
    try:
        flags_kind, flags = next(parts)
        shape_kind, sizes = next(parts)
        name_kind, text = next(parts)
    except StopIteration:
        raise ValueError("it has a variable without a name") from None
    if (flags_kind, shape_kind, name_kind) != (FLAGS, SHAPE, TEXT) or len(flags) != 8 or len(sizes) % 4:
        return "", None  # a kind of variable that is built otherwise: not one of ours
    if (name := bytes(text).decode("latin-1")) not in names:
        return name, None
    word = struct.unpack(f"{order}II", flags)[0]
    kind, numbers = next(parts, (0, content[:0]))
    if (word & 0xFF) not in CLASSES or word & COMPLEX_OR_LOGICAL or kind not in NUMBERS:
        raise ValueError(f"its {name} is not an array of numbers")
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    dtype = np.dtype(order + NUMBERS[kind])
    if len(shape) > MOST_DIMENSIONS or min(shape, default=-1) < 0 or math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError(f"its {name} has the shape {shape}, but {len(numbers):,} bytes")
    return name, np.frombuffer(numbers, dtype).reshape(shape, order="F")
