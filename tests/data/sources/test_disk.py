"""Reading files: what is a bad file, and what is a failing disk."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from falcon_fast.data.sources import disk
from falcon_fast.data.sources.decoding import header, read_image
from falcon_fast.data.sources.disk import BadImage, MissingFile, check_disk, file_bytes, regular_file
from falcon_fast.errors import TemporaryError

from ..images import smooth


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    smooth(300, 200).save(tmp_path / "a" / "x.png")
    return tmp_path / "a" / "x.png"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOTCONN])
@pytest.mark.parametrize("moment", ["open", "read"])
def test_an_error_of_the_disk_is_no_bad_image(number: int, moment: str, image: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if moment == "open":
        monkeypatch.setattr(disk.os, "open", fail)
    else:
        monkeypatch.setattr(disk, "_File", failing_file(number))
    for function in (file_bytes, read_image, header):
        with pytest.raises(TemporaryError) as caught:
            function(image)
        text = str(caught.value)
        assert text.startswith(
            f"{image} cannot be read: {os.strerror(number)} ({errno.errorcode[number]}): is the disk"
        )
        assert caught.value.exit_code == 75


def failing_file(number: int) -> type:
    """A file of which only the first 20 bytes can be read, too few for the header of a PNG."""

    class File(disk._File):
        given = 0

        def _next(self) -> None:
            if self.given >= 20:
                self.failure = OSError(number, os.strerror(number))
                raise self.failure
            self.given += 10

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            self._next()
            return io.FileIO.readinto(self, memoryview(buffer)[:10])

        def readall(self) -> bytes:
            self._next()
            return io.FileIO.read(self, 10) + self.readall()

    return File


def test_a_file_that_ends_too_early_was_not_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    class Short(disk._File):
        def readall(self) -> bytes:
            return io.FileIO.read(self, 10)

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return 0

    monkeypatch.setattr(disk, "_File", Short)
    with pytest.raises(TemporaryError, match=r"only \d+ of [\d,]+ bytes could be read"):
        file_bytes(image)


def test_a_missing_file_is_told_from_a_missing_folder(image: Path) -> None:
    with pytest.raises(MissingFile, match=r"^no such file$"):
        file_bytes(image.with_name("y.png"))
    with pytest.raises(TemporaryError, match="ENOENT"):
        file_bytes(image.parent / "b" / "y.png")


def test_a_file_that_is_missing_alone_is_bad_and_with_all_others_it_is_not(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.jpg") for i in range(100)]
    with pytest.raises(TemporaryError, match="is the disk still there"):
        check_disk(paths[3], paths)
    Path(paths[0]).write_bytes(b"x")
    check_disk(paths[3], paths)
    check_disk(paths[3], [paths[3]])  # there is no other


def test_a_file_of_more_than_the_limit_is_not_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with image.open("r+b") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(BadImage, match=r"1,024\.0 GiB are more than the 1 GiB that an image file may have"):
        file_bytes(image)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="a folder, not a file"), regular_file(tmp_path):
        pass
