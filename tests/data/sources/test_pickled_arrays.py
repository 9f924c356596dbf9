"""Pickles of arrays: what Python and numpy write is read, everything else is refused, and nothing is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from falcon_fast.data.sources import pickled_arrays
from falcon_fast.data.sources.pickled_arrays import read_pickled_arrays

from ...fuzz import COUNTS, fuzz

PIXELS = np.arange(4 * 12, dtype=np.uint8).reshape(4, 12)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        PIXELS,
        np.asfortranarray(PIXELS),
        PIXELS.astype(">i4"),
        PIXELS.astype("<f8"),
        PIXELS > 7,
        np.float32([]),
        [1, -2, 300, 70000, 2**40],
        [b"a", "text \u00e4", 1.5, None, True, False],
        (1, 2),
        {"inner": [b"x"]},
    ],
    ids=str,
)
def test_what_was_written_comes_back(value: Any, protocol: int) -> None:
    found = read_pickled_arrays(pickle.dumps({b"value": value, b"again": value}, protocol=protocol))
    assert list(found) == [b"value", b"again"]
    for read in found.values():
        if isinstance(value, np.ndarray):
            assert read.dtype == value.dtype and read.shape == value.shape and (read == value).all()
        else:
            assert read == value and type(read) is type(value)


def test_text_of_python_2_is_bytes() -> None:
    # cPickle.dumps({"labels": [3], "batch_label": "one"}, 2)
    written = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x03aU\x0bbatch_labelq\x04U\x03oneq\x05u."
    assert read_pickled_arrays(written) == {b"labels": [3], b"batch_label": b"one"}


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    for call in (Call(os.mkdir, str(tmp_path / "owned")), Call(getattr, "", "upper"), Call(np.dtype, "O")):
        with pytest.raises(ValueError, match=r"no place|no array needs|does not hold numbers"):
            read_pickled_arrays(pickle.dumps({b"x": call}, protocol=protocol))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(3, "V8"),
        np.zeros(3, [("a", "u1")]),
        np.array(["text"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.zeros(3, "c8"),
        {1, 2},
        Path("x"),
    ],
    ids=["objects", "raw bytes", "fields", "text", "dates", "complex", "set", "path"],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        read_pickled_arrays(pickle.dumps({b"x": value}, protocol=2))


def instructions(value: Any) -> bytes:
    """What leaves `value` on the stack, without header and end."""
    return pickle.dumps(value, protocol=2)[2:-1]


def test_a_state_of_a_dtype_with_fields_is_refused() -> None:
    """numpy takes raw bytes for addresses of objects where a dtype's state says so (a crash, or worse)."""
    dtype = b"cnumpy\ndtype\n" + instructions(("V8", False, True)) + b"R"
    array = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + instructions((0,)) + instructions(b"b") + b"\x87R"
    )
    state = instructions(1) + instructions((4,)) + dtype + b"\x89" + b"C\x20" + b"A" * 32
    with pytest.raises(ValueError, match="does not hold numbers"):
        read_pickled_arrays(b"\x80\x03}C\x04data" + array + b"(" + state + b"tbs.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b".",
        b"\x80\x02].",
        b"\x80\x02N.",
        b"\x80\x02}e.",
        b"\x80\x02(u.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02h\x07.",
        b"\x80\x02}(a.",
        b"\x80\x02K\x01K\x02b.",
        b"I" + b"9" * 10**6 + b"\n.",
    ],
)
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError, KeyError, TypeError, AttributeError)):
        read_pickled_arrays(data)


def test_an_array_larger_than_its_bytes_is_refused() -> None:
    content = pickle.dumps({b"x": np.zeros(10, np.uint8)}, protocol=2)
    for count in (9, 11, 255):
        with pytest.raises(ValueError, match="in 10 bytes"):
            read_pickled_arrays(content.replace(b"K\n\x85", b"K" + bytes([count]) + b"\x85"))


def test_a_key_that_takes_forever_to_hash_is_refused() -> None:
    """A tuple that holds another one twice, 60 times: its hash takes 2^60 steps."""
    with pytest.raises(ValueError, match="a key that is no text"):
        read_pickled_arrays(b"\x80\x02}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.")


def test_text_that_is_encoded_again_and_again_is_refused() -> None:
    """A thousand copies of a text of 100 KB from a few bytes each."""
    text = "x" * 100_000
    start = (
        b"\x80\x02}c_codecs\nencode\nq\x00X"
        + struct.pack("<I", len(text))
        + text.encode()
        + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    )
    once = b"h\x00h\x01h\x02\x86R"
    with pytest.raises(ValueError, match="more text than the file holds"):
        read_pickled_arrays(start + once * 1000 + b".")


def test_more_instructions_than_a_batch_needs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte can make a list of 56 bytes."""
    monkeypatch.setattr(pickled_arrays, "MOST_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 instructions"):
        read_pickled_arrays(b"\x80\x02" + b"]" * 2000 + b".")


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_end_in_a_value_or_an_error(tmp_path: Path, count: int) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"labels": [1, 2, 3, 4], b"data": PIXELS, b"name": "x"}, protocol=2))
    errors = (ValueError, IndexError, KeyError, TypeError, AttributeError)
    outcome = fuzz(
        lambda: read_pickled_arrays(path.read_bytes()), [path], count, name="pickled arrays", refusals=errors
    )
    assert outcome.refused > count // 4
