"""Archives, tables and databases are named with what to do, and the commands that are given work."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.layout.archives import but, counted, describe, describe_file, kind_of
from falcon_fast.data.sources.layout.tree import walk

from ..opened import folder, refusal, save
from .made import make


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tar archive", "a.tar a.tar.gz a.TGZ a.tar.zst a.tar.bz2 00000.tar"),
        ("ZIP archive", "a.zip A.ZIP"),
        ("7z or RAR archive", "a.7z a.rar"),
        ("Parquet file", "train-00000-of-00004.parquet a.parquet"),
        ("Arrow file", "data-00000-of-00001.arrow"),
        ("TFRecord file", "a.tfrecord train-00000-of-01024 a.tfrecord-00000-of-00005 a.tfrecords"),
        ("LMDB database", "data.mdb train.lmdb"),
        ("HDF5 file", "a.h5 a.hdf5"),
        ("numpy file", "a.npz a.npy"),
        ("MATLAB file", "a.mat"),
        ("RecordIO file", "a.rec a.beton"),
        ("IDX file", "train-images-idx3-ubyte t10k-labels-idx1-ubyte.gz"),
        ("pickle", "a.pkl a.pt"),
        ("video", "a.mp4"),
        ("image of another format", "a.heic a.avif a.dcm a.nii.gz a.svg"),
        ("compressed file", "a.gz"),
        ("", "a.txt a.csv a.json README lock.mdb a.xml a.target notes.tar.txt"),
    ],
)
def test_kinds(kind: str, names: str) -> None:
    found = {name: kind_of(name) for name in names.split()}
    assert {name: each.one if each else "" for name, each in found.items()} == dict.fromkeys(names.split(), kind)


def test_one_line_with_the_number_of_each_kind(tmp_path: Path) -> None:
    make(tmp_path, "train/{0,1,2}.tar", "val/0.tar", "a.zip", "notes.txt")
    top = walk(tmp_path)
    assert counted(top) == "4 tar archives, 1 ZIP archive"
    assert describe(top).startswith(
        "4 tar archives, 1 ZIP archive (the first: train/0.tar), which are not read: unpack them"
    )
    assert but(top) == f", but {describe(top)}" and "\n" not in but(top)
    assert (
        describe(walk(make(tmp_path / "no", "a.txt")))
        == counted(walk(tmp_path / "no"))
        == but(walk(tmp_path / "no"))
        == ""
    )


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_command_that_is_given_unpacks(kind: str, count: int, tmp_path: Path) -> None:
    """The folder has a space in its name, and holds another file that must not be taken for an archive."""
    root = tmp_path / "my data"
    root.mkdir()
    (root / "other.txt").write_text("x")
    for i in range(count):
        image = save(tmp_path / f"{i}.png", i)
        if kind == "zip":
            with zipfile.ZipFile(root / f"{i}.zip", "w") as archive:
                archive.write(image, f"c{i}/1.png")
        else:
            with tarfile.open(root / f"{i}.{kind}", "w:gz" if kind.endswith("gz") else "w") as archive:
                archive.add(image, f"c{i}/1.png")
    message = refusal(DataConfig(path=str(root)))
    command = message.partition("unpack it: " if count == 1 else "unpack them: ")[2]
    assert command.startswith("mkdir IMAGES && "), message
    subprocess.run(command.replace("python ", f"{sys.executable} "), shell=True, check=True, cwd=tmp_path)
    assert walk(tmp_path / "IMAGES").count == count
    if count == 3:
        assert folder(tmp_path / "IMAGES").classes == ("c0", "c1", "c2")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.zip", "a.jpg")
    command = f"mkdir IMAGES && python -m zipfile -e {tmp_path}/a.zip IMAGES"
    assert describe_file(tmp_path / "a.zip") == f"a ZIP archive, not a folder: unpack it: {command}"
    assert describe_file(tmp_path / "a.jpg") == "not a folder"


def test_images_beside_archives_are_read_and_the_rest_is_named(image_folder: Path) -> None:
    make(image_folder, "dark/backup.tar.gz", "light/more.parquet", "light/a.txt")
    Image.new("RGB", (24, 20)).save(image_folder / "light" / "x.png")
    source = folder(image_folder)
    assert len(source.train.images) + len(source.test.images) == 41
    assert "not read: 1 tar archive, 1 Parquet file; the images beside them are used" in source.notes
    assert "1 file left out by extension (.txt)" in source.notes
