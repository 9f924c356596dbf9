"""MATLAB files: arrays of numbers are read, and whatever else a file holds or claims is refused in limited memory."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from falcon_fast.data.sources.matlab import read_matlab_arrays

LIMIT = 10 * 2**20
X, Y = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5), np.arange(1, 6)[:, None]


def write(path: Path, compress: bool = True, format_: str = "5", **content: Any) -> Path:
    savemat(path, content, do_compression=compress, format=format_)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "f4", "f8"])
def test_arrays_are_those_that_scipy_reads(tmp_path: Path, dtype: str, compress: bool) -> None:
    path = write(tmp_path / "a.mat", compress, X=X.astype(dtype), other="text", y=Y)
    found = read_matlab_arrays(path, ("X", "y"), LIMIT)
    assert found.keys() == {"X", "y"}
    for name, array in found.items():
        expected = loadmat(path)[name]
        assert array.dtype == expected.dtype and array.shape == expected.shape and np.array_equal(array, expected)


def refused(path: Path, limit: int = LIMIT) -> str:
    with pytest.raises(ValueError) as caught:
        read_matlab_arrays(path, ("X", "y"), limit)
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["text", np.array([{"a": 1}], object), {"field": 1}, X.astype(complex), X > 3, np.array(["a", "b"], object)],
    ids=["text", "cells", "structure", "complex", "logical", "cells of text"],
)
def test_other_values_are_refused(tmp_path: Path, value: Any) -> None:
    assert "X is not an array of numbers" in refused(write(tmp_path / "a.mat", X=value, y=Y))


def test_a_file_that_lacks_a_variable_or_is_of_another_version_is_refused(tmp_path: Path) -> None:
    assert "does not hold y" in refused(write(tmp_path / "a.mat", X=X))
    assert "not a MATLAB 5 file" in refused(write(tmp_path / "b.mat", compress=False, format_="4", X=X[0, 0], y=Y))
    (tmp_path / "c.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))  # MATLAB 7.3
    assert "not a MATLAB 5 file" in refused(tmp_path / "c.mat")
    assert "at most 100 are read" in refused(write(tmp_path / "a.mat", X=X, y=Y), limit=100)


def test_a_variable_that_appears_twice_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mat", X=X, y=Y).read_bytes()
    (tmp_path / "a.mat").write_bytes(data + data[128:])
    assert "holds X twice" in refused(tmp_path / "a.mat")


def test_a_file_of_many_variables_is_refused(tmp_path: Path) -> None:
    assert "more than 16 variables" in refused(write(tmp_path / "a.mat", X=X, y=Y, **{f"v{i}": 1 for i in range(20)}))


def compressed(content: bytes) -> bytes:
    packed = zlib.compress(content, 9)
    return struct.pack("<II", 15, len(packed)) + packed


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def matrix(name: bytes, shape: tuple[int, ...], data: bytes, stated: int | None = None) -> bytes:
    """A uint8 array; `stated` is the size of its data that its tag claims."""

    def element(kind: int, content: bytes, length: int | None = None) -> bytes:
        size = len(content) if length is None else length
        return struct.pack("<II", kind, size) + content + bytes(-len(content) % 8)

    sizes = struct.pack(f"<{len(shape)}i", *shape)
    body = element(6, struct.pack("<II", 9, 0)) + element(5, sizes) + element(1, name) + element(2, data, stated)
    return struct.pack("<II", 14, len(body)) + body


def test_the_crafted_files_of_these_tests_are_read_where_they_are_right(tmp_path: Path) -> None:
    data = compressed(matrix(b"X", (2, 3), b"abcdef")) + matrix(b"y", (2, 1), b"\x01\x02")
    (tmp_path / "a.mat").write_bytes(HEADER + data)
    found = read_matlab_arrays(tmp_path / "a.mat", ("X", "y"), LIMIT)
    assert found["X"].T.tobytes() == b"abcdef" and found["y"].tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: compressed(matrix(b"X", (2**28,), bytes(2**28))), "unpacks to more than"),
        (lambda: compressed(bytes(2**28)), "unpacks to more than"),
        (lambda: matrix(b"X", (2**16, 2**16, 2**16), b"abc"), "has the shape"),
        (lambda: matrix(b"X", (-1, 5), b"abc"), "has the shape"),
        (lambda: matrix(b"X", (2, 3), b"abcdef", 2**31), "cut short"),
        (lambda: compressed(matrix(b"X", (2, 3), b"abcdef"))[:30], "cut short|damaged"),
        (lambda: struct.pack("<II", 14, 2**32 - 1), "cut short"),
        (lambda: struct.pack("<II", 1, 8) + bytes(8), "an element of kind 1"),
        (lambda: bytes(5), "of kind 0|cut short"),
    ],
    ids=["zeros", "no matrix", "shape", "negative", "size", "truncated", "length", "kind", "rest"],
)
def test_bombs_and_lies_are_refused_in_little_memory(tmp_path: Path, content: Any, reason: str) -> None:
    (tmp_path / "a.mat").write_bytes(HEADER + content() + matrix(b"y", (2, 1), b"\x01\x02"))
    tracemalloc.start()
    try:
        assert re.search(reason, refused(tmp_path / "a.mat"))
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()
