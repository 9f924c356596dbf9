"""The list of a run's images: a resumed run has the same images, whatever has become of their files."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from falcon_fast.data.sources.images import Source
from falcon_fast.data.sources.listing import NAME, resumed_source, write_listing
from falcon_fast.errors import TemporaryError, UsageError

from ...fuzz import COUNTS, MIB, fuzz
from ..images import damage, smooth
from .opened import folder, names


@pytest.fixture
def listed(image_folder: Path, tmp_path: Path) -> tuple[Source, Path]:
    """The images of `image_folder`, one unreadable file among them, and their list."""
    (image_folder / "light" / "zero.png").write_bytes(b"")
    source = folder(image_folder)
    write_listing(tmp_path / NAME, source, image_folder)
    return source, tmp_path / NAME


def again(path: Path, root: Path) -> Source:
    return resumed_source(lambda: folder(root), path, root)


def check_same(found: Source, source: Source, root: Path) -> None:
    for mine, theirs in ((found.train, source.train), (found.test, source.test)):
        assert names(mine, root) == names(theirs, root)
        assert mine.images.sizes == theirs.images.sizes  # type: ignore[attr-defined]
        assert mine.labels is not None and np.array_equal(mine.labels, theirs.labels)
    assert (found.fingerprint, found.classes, found.size) == (source.fingerprint, source.classes, source.size)


def test_files_that_are_gone_damaged_or_repaired_keep_their_numbers(listed, image_folder: Path) -> None:
    source, path = listed
    check_same(again(path, image_folder), source, image_folder)
    Path(source.train.images.name(3)).unlink()
    Path(source.test.images.name(1)).unlink()
    damage(Path(source.train.images.name(5)), "html")
    smooth(24, 20).save(image_folder / "light" / "zero.png")
    (image_folder / "light" / "new-but-damaged.png").write_bytes(b"half")
    assert folder(image_folder).fingerprint != source.fingerprint
    found = again(path, image_folder)
    check_same(found, source, image_folder)
    assert [index for index, _ in found.known_bad] == [5]  # the loaders find out about those that are gone
    assert sum("3 images of this run are gone or cannot be decoded" in note for note in found.notes) == 1


def test_a_class_whose_only_readable_file_is_gone_remains_a_class(image_folder: Path, tmp_path: Path) -> None:
    smooth(24, 20).save(image_folder / "dark" / "x.png")
    (image_folder / "alone").mkdir()
    for i in range(2):
        smooth(24, 20, i).save(image_folder / "alone" / f"{i}.png")
    source = folder(image_folder)
    write_listing(tmp_path / NAME, source, image_folder)
    for path in (image_folder / "alone").iterdir():
        path.unlink()
    check_same(again(tmp_path / NAME, image_folder), source, image_folder)


def test_an_unreadable_file_that_is_deleted_keeps_its_number(listed, image_folder: Path) -> None:
    source, path = listed
    (image_folder / "light" / "zero.png").unlink()
    check_same(again(path, image_folder), source, image_folder)


def test_the_folder_may_have_moved(listed, image_folder: Path, tmp_path: Path) -> None:
    source, path = listed
    Path(source.train.images.name(3)).unlink()
    shutil.move(image_folder, tmp_path / "moved")
    found = again(path, tmp_path / "moved")
    assert names(found.train, tmp_path / "moved") == names(source.train, image_folder)


@pytest.mark.parametrize("change", ["new", "resized"])
def test_other_data_stay_other_data(change: str, listed, image_folder: Path) -> None:
    source, path = listed
    Path(source.train.images.name(3)).unlink()
    smooth(24 if change == "new" else 25, 20).save(
        image_folder / "dark" / "new.png" if change == "new" else source.train.images.name(4)
    )
    assert again(path, image_folder).fingerprint != source.fingerprint


@pytest.mark.parametrize("away", ["folder", "contents", "links"])
def test_a_disk_that_is_away_is_waited_for(away: str, listed, image_folder: Path, tmp_path: Path) -> None:
    _, path = listed
    shutil.move(image_folder, tmp_path / "away")
    if away == "contents":
        image_folder.mkdir()
    elif away == "links":
        for name in ("dark", "light"):
            (image_folder / name).mkdir(parents=True)
            for file in (tmp_path / "away" / name).iterdir():
                (image_folder / name / file.name).symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(TemporaryError, match="is the disk still there"):
        again(path, image_folder)


def test_without_a_list_the_folder_counts(image_folder: Path, tmp_path: Path) -> None:
    check_same(again(tmp_path / NAME, image_folder), folder(image_folder), image_folder)


def test_images_in_memory_have_no_list(tmp_path: Path) -> None:
    from falcon_fast.config import DataConfig
    from falcon_fast.data.sources.opening import open_source

    write_listing(tmp_path / NAME, open_source(DataConfig(source="digits")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_list_is_not_written_again(listed, image_folder: Path) -> None:
    source, path = listed
    before = path.stat().st_mtime_ns
    write_listing(path, source, image_folder)
    assert path.stat().st_mtime_ns == before
    Path(source.train.images.name(3)).unlink()
    write_listing(path, folder(image_folder), image_folder)
    assert path.stat().st_mtime_ns > before and [p.name for p in path.parent.glob(".*")] == []


@pytest.mark.parametrize("kind", ["no gzip", "cut", "row", "escape", "facts", "label"])
def test_a_damaged_list_is_named(kind: str, listed, image_folder: Path) -> None:
    source, path = listed
    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    if kind == "row":
        text[3] = '["train", "a"]'
    elif kind == "escape":
        text[3] = json.dumps(["train", "../../x.png", 24, 20, 0])
    elif kind == "facts":
        text[0] = "[1]"
    elif kind == "label":
        text[3] = json.dumps(["train", "dark/01.png", 24, 20, "a"])
    packed = gzip.compress("\n".join(text).encode())
    path.write_bytes(b"hello" if kind == "no gzip" else packed[:-20] if kind == "cut" else packed)
    Path(source.train.images.name(3)).unlink()
    with pytest.raises(UsageError, match=rf"{NAME} is damaged \(.+\): delete it") as caught:
        again(path, image_folder)
    assert "\n" not in str(caught.value)


def unpacked(path: Path) -> Callable[[], None]:
    """Return a function that packs the plain text at `path` to the list, as it is after a mutation."""
    return lambda: (path.with_name(NAME)).write_bytes(gzip.compress(path.read_bytes(), 1))  # type: ignore[func-returns-value]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", ["packed", "text"])
def test_mutations_are_read_or_refused_in_one_line(
    listed: tuple[Source, Path], image_folder: Path, count: int, what: str
) -> None:
    """The list as it lies there, and its text, changed before it is packed, so that what is behind the packing is reached."""
    source, path = listed
    Path(source.train.images.name(3)).unlink()  # otherwise the list is only compared
    text = path.with_name("text")
    text.write_bytes(gzip.decompress(path.read_bytes()))
    now = folder(image_folder)

    def read() -> None:
        with suppress(TemporaryError):  # no file of the list is there
            found = resumed_source(lambda: now, path, image_folder)
            assert all(
                Path(found.train.images.name(i)).is_relative_to(image_folder) for i in range(len(found.train.images))
            )

    outcome = fuzz(
        read,
        [path if what == "packed" else text],
        count,
        name=f"images.jsonl.gz, {what}",
        memory=96 * MIB,
        then=(lambda: None) if what == "packed" else unpacked(text),
    )
    assert outcome.refused > count // 10
