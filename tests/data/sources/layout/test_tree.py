"""Walking a folder: which files are images, in which order, and links, pipes and closed folders."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from falcon_fast.data.sources.layout.tree import Folder, walk

from .made import make


def below(folder: Folder) -> list[str]:
    return [os.path.relpath(path, folder.path) for path in folder.image_paths()]


def test_images_and_other_files(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a/1.jpg",
        "a/2.PNG",
        "a/notes.txt",
        "a/.hidden.jpg",
        ".thumbs/1.jpg",
        "b/c/3.tif",
        "4.webp",
        "empty/x.csv",
    )
    top = walk(tmp_path)
    assert below(top) == ["4.webp", "a/1.jpg", "a/2.PNG", "b/c/3.tif"]
    assert {folder.name: (folder.count, folder.others) for folder in top.all()} == {
        tmp_path.name: (4, []),
        "a": (2, ["notes.txt"]),
        "b": (1, []),
        "c": (1, []),
        "empty": (0, ["x.csv"]),
    }


def test_the_order_is_that_of_sorted_paths(tmp_path: Path) -> None:
    make(
        tmp_path, "a/1.jpg", "a-b/1.jpg", "a/z/1.jpg", "a.jpg", "a b/1.jpg", "B/2.jpg", "é/1.jpg", "a/10.jpg", "a/9.jpg"
    )
    top = walk(tmp_path)
    assert list(map(Path, top.image_paths())) == sorted(tmp_path.rglob("*.jpg"))


def test_unwanted_folders_are_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    scandir, listed = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert below(walk(tmp_path, lambda path: not path.endswith("/b"))) == ["a/1.jpg"]
    assert listed == [str(tmp_path), str(tmp_path / "a")]


def test_no_file_is_asked_for_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/*50", "b/notes.txt")
    (tmp_path / "a" / "link.jpg").symlink_to("0.jpg")
    asked: list[object] = []
    for function in ("stat", "lstat"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda path, *a, real=real, **k: asked.append(path) or real(path, *a, **k))
    top = walk(tmp_path)
    monkeypatch.undo()
    assert top.count == 51 and not asked


def test_links_between_folders_do_not_multiply(tmp_path: Path) -> None:
    """Each of eight folders links to all others: followed without a limit, that is 109,601 ways."""
    for i in range(8):
        make(tmp_path, f"{i}/1.jpg")
    for i in range(8):
        for k in range(8):
            (tmp_path / str(i) / f"to{k}").symlink_to(tmp_path / str(k))
    top = walk(tmp_path)
    assert 8 <= top.count <= 16
    assert sum(len(folder.again) for folder in top.all()) > 0


def test_links_that_lead_back_outside_and_nowhere(tmp_path: Path) -> None:
    make(tmp_path, "data/a/1.jpg", "else/2.jpg", "else/3.jpg")
    root = tmp_path / "data"
    for name, target in {
        "a/up": root,
        "a/self": root / "a",
        "a/around": tmp_path,
        "b": tmp_path / "else",
        "c": tmp_path / "missing",
        "a/loop": root / "a" / "loop",
        "a/dangling.jpg": Path("nowhere.jpg"),
        "d.jpg": tmp_path / "else",  # a folder with the name of an image
        "listing": tmp_path / "else" / "2.jpg",
    }.items():
        (root / name).symlink_to(target)
    top = walk(root)
    assert below(top) == ["a/1.jpg", "a/dangling.jpg", "b/2.jpg", "b/3.jpg"]
    problems = [(os.path.relpath(path, root), reason) for folder in top.all() for path, reason in folder.problems]
    assert [path for path, _ in problems] == ["c", "a/loop"] and all(
        "leads nowhere" in reason for _, reason in problems
    )
    assert [os.path.relpath(path, root) for path in top.again] == ["d.jpg"] and top.others == ["listing"]


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    top = walk(tmp_path)
    assert below(top) == ["1.jpg"] and top.problems == [(str(tmp_path / "pipe.jpg"), "not a regular file")]


def test_closed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "closed/1.jpg")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    top = walk(tmp_path)
    assert below(top) == ["a/1.jpg"]
    assert [folder.problems for folder in top.folders] == [[], [(str(tmp_path / "closed"), "Permission denied")]]
    with pytest.raises(PermissionError):
        walk(tmp_path / "closed")


def test_a_folder_deeper_than_pythons_stack(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    here = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("1.jpg", os.O_CREAT, dir_fd=here))
    os.close(here)
    try:
        assert walk(tmp_path).count == 1
    finally:  # Python's own rmtree, with which pytest cleans up, does not reach the bottom
        subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)
