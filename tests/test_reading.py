"""Files from elsewhere: regular ones of a limited size are read, everything else is an error of one line."""

from __future__ import annotations

import json
import os
import tomllib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from falcon_fast import reading

LIMIT = 1000
READERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: reading.read_bytes(path, LIMIT),
    "text": lambda path: reading.read_text(path, LIMIT),
    "json": lambda path: reading.read_json(path, LIMIT),
    "toml": lambda path: reading.read_toml(path, LIMIT),
    "csv": lambda path: list(reading.csv_rows(path, LIMIT)),
    "records": lambda path: list(reading.csv_records(path, LIMIT)),
}


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link to a device", "endless", "too large", "missing"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_small_regular_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "endless":
        path.symlink_to(path)
    elif kind == "too large":
        path.write_text("1" * (LIMIT + 1))
    with pytest.raises((OSError, ValueError)) as caught:
        READERS[name](path)
    reasons = {
        "directory": "file is a directory",
        "too large": "file has 1,001 bytes, but at most 1,000 are read",
        "missing": "No such file",
        "endless": "Too many levels of symbolic links",
    }
    assert reasons.get(kind, "is not a regular file") in str(caught.value)


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, regular = tmp_path / "file", tmp_path / "regular"
    os.mkfifo(path)
    regular.write_text("")
    status = regular.stat()
    monkeypatch.setattr(Path, "stat", lambda self: status)
    with pytest.raises(ValueError, match="file is not a regular file"):
        reading.read_bytes(path, LIMIT)


def test_a_file_that_grows_is_not_read_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    small = os.stat_result((0o100644, 0, 0, 0, 0, 0, 10, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self: small)
    monkeypatch.setattr(os, "fstat", lambda number: small)
    assert len(reading.read_bytes(path, 5000)) == 11
    with pytest.raises(ValueError, match="file has more than 10 bytes"):
        reading.read_bytes(path, 10)


def test_no_more_memory_is_taken_than_the_file_needs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    tracemalloc.start()
    reading.read_bytes(path, 2**30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_what_is_right_is_read_as_the_standard_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    value = {"a": [1, 2.5, None, True, "\u00e4\ud83d\ude00"], "b": {"c": {}}}
    path.write_text(json.dumps(value))
    assert reading.read_json(path, LIMIT) == json.loads(json.dumps(value))
    text = 'a = 1\n[b]\nc = "x"\nd = [1, {e = 2.5}]\n'
    path.write_text(text)
    assert reading.read_toml(path, LIMIT) == tomllib.loads(text)
    path.write_text('a,b\n1,"x, ""y""\nz"\n\n2\n3,4,5\n6,7\n')
    assert list(reading.csv_rows(path, LIMIT)) == [["a", "b"], ["1", 'x, "y"\nz'], ["2"], ["3", "4", "5"], ["6", "7"]]
    assert list(reading.csv_records(path, LIMIT)) == [{"a": "1", "b": 'x, "y"\nz'}, {"a": "6", "b": "7"}]
    path.write_text("")
    assert list(reading.csv_records(path, LIMIT)) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        ('[{"x": {"k": 1, "k": 1}}]', "the key 'k' appears twice"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("-Infinity", "-Infinity is not a number of JSON"),
        ("9" * 5000, "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("{", "is not valid JSON"),
        ("\0", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
    ids=lambda text: f"{text[:30]!r}-{len(text)}",
)
def test_json_that_is_ambiguous_or_hostile_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        reading.read_json(tmp_path / "file", 10**6)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "most"),
    [("[" + "[]," * 300_000 + "0]", 25), ("[" + "{}," * 300_000 + "0]", 25), ("[" + "999," * 200_000 + "0]", 25)],
    ids=["lists", "objects", "numbers"],
)
def test_json_takes_at_most_25_times_its_size(tmp_path: Path, text: str, most: int) -> None:
    (tmp_path / "file").write_text(text)
    tracemalloc.start()
    reading.read_json(tmp_path / "file", 10**7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * len(text) + 3 * len(text)  # the bytes and the text come on top


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a." * 600 + "a = 1", "a line of more than 512 dots"),
        ("a = " + "[" * 50_000, "is nested too deeply"),
        ("a = " + "9" * 5000, "is not valid TOML"),
        ("a = 1\na = 2", "is not valid TOML"),
        ('a = "\x00"', "is not valid TOML"),
    ],
    ids=lambda text: f"{text[:20]!r}-{len(text)}",
)
def test_toml_that_is_hostile_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        reading.read_toml(tmp_path / "file", 2**16)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"a," + b"x" * 200_000, "a row of more than 131,072 characters"),
        (b'"' + b"x\n" * 100_000, "a row of more than 131,072 characters"),
        (b'"\n",' * 100_000, "a row of more than 131,072 characters"),
        (b"," * 200_000, "a row of more than 131,072 characters"),
        (b"a,\xff", "not UTF-8"),
    ],
    ids=["cell", "quoted lines", "cells of a row", "commas", "bytes"],
)
def test_csv_that_is_hostile_is_refused_in_little_memory(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(text)
    tracemalloc.start()
    with pytest.raises(ValueError, match=reason):
        list(reading.csv_rows(tmp_path / "file", 10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_names_of_files_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"caf\xe9,1\n")
    assert list(reading.csv_rows(tmp_path / "file", LIMIT, any_bytes=True)) == [["caf\udce9", "1"]]


def test_one_line_of_an_error() -> None:
    assert reading.one_line(ValueError("a\n b")) == "a  b"
    assert reading.one_line(ValueError("a\nb\n"), last=True) == "b"
    assert reading.one_line(ValueError("\x1b[31m")) == repr("\x1b[31m")
    assert reading.one_line(KeyError()) == "KeyError"
    assert len(reading.one_line(ValueError("x" * 1000))) == 200
