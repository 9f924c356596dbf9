"""Files that are written whole or not at all, and the line that says what a disk refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from falcon_fast.errors import WriteError
from falcon_fast.files import Appended, free_bytes, why_not_written, writing, written_whole


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), written_whole(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]  # noqa: PTH208
    with written_whole(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before" and partial.name.startswith(".") and partial.name.endswith(".partial")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file"]  # noqa: PTH208


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_an_error_of_the_disk_is_one_line_that_names_the_file(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(WriteError) as caught, writing(path, 3 * 2**30):
        raise OSError(number, os.strerror(number))
    line = str(caught.value)
    assert line.startswith(f"{path} cannot be written: {os.strerror(number)}") and "\n" not in line and ";" in line
    assert ("it needs 3,072.0 MiB" in line and "are free" in line) is (number in (errno.ENOSPC, errno.EDQUOT))


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file"):
        raise ZeroDivisionError
    assert why_not_written(tmp_path, ValueError("no")) is None
    with pytest.raises(WriteError, match=r"^mine$"), writing(tmp_path / "file"):
        raise WriteError("mine")


def test_safetensors_errors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(WriteError, match=f"{path} cannot be written: No such file"), writing(path):
        save_file({"a": torch.ones(3)}, path)


def test_free_space_is_that_of_the_file_system(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    measured = free_bytes(tmp_path / "not" / "there")
    assert measured == pytest.approx(found.f_bavail * found.f_frsize, rel=0.2)


def test_rows_are_whole_and_a_file_that_was_taken_away_is_noticed(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rows.csv"
    with Appended(path) as rows:
        rows.write(("a", 1, 'with "quotes", and a comma'))
        assert path.read_bytes() == b'a,1,"with ""quotes"", and a comma"\r\n'
        before, file = path.read_bytes(), rows._file

        class Short:  # a disk with room for three bytes
            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data: bytes) -> int:
                return file.write(data[:3])

        monkeypatch.setattr(rows, "_file", Short())
        with pytest.raises(WriteError, match=r"rows\.csv cannot be written: No space left"):
            rows.write(("b", 2))
        assert path.read_bytes() == before
        monkeypatch.setattr(rows, "_file", file)
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(WriteError, match="removed or renamed"):
            rows.write(("c", 3))
        path.touch()  # another file of that name is not it
        with pytest.raises(WriteError, match="removed or renamed"):
            rows.write(("c", 3))
    assert (tmp_path / "elsewhere").read_bytes() == before
