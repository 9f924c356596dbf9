"""`falcon-fast data verify` and the manifest that it leaves for training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.sources import manifest
from falcon_fast.data.sources.decoding import header, read_image
from falcon_fast.data.sources.folders import image_paths
from falcon_fast.data.sources.opening import open_source

from ...fuzz import COUNTS, MIB, fuzz
from ..images import damage, smooth


def test_verify_prints_the_bad_ones_and_nothing_else(photo_folder: Path, data) -> None:
    before = {path: path.read_bytes() for path in photo_folder.rglob("*") if path.is_file()}
    assert data("verify", photo_folder) == (0, [], "")
    assert {
        path: path.read_bytes() for path in photo_folder.rglob("*") if path.is_file()
    } == before  # nothing was written into the data folder
    victims = {
        photo_folder / "a/02.jpg": "truncated",
        photo_folder / "b/03.jpg": "empty",
        photo_folder / "b/05.jpg": "gif",
    }
    for victim, kind in victims.items():
        damage(victim, kind)
    for _ in range(2):
        code, lines, err = data("verify", photo_folder)
        assert code == 1 and err == "" and len(lines) == 3
        assert [line.split(": ")[0] for line in lines] == sorted(map(str, victims))
        assert all(line.split(": ", 1)[1] for line in lines)


def test_the_manifest_holds_sizes_and_orientations(photo_folder: Path, data) -> None:
    data("verify", photo_folder)
    entries = manifest.read_manifest(photo_folder)
    assert len(entries) == 40 and all(entry.decoded and not entry.reason for entry in entries.values())
    for name, entry in entries.items():
        assert (entry.width, entry.height) == read_image(str(photo_folder / name)).size
        assert entry.orientation == (6 if int(Path(name).stem) % 8 == 0 else 1)
        assert entry.bytes == (photo_folder / name).stat().st_size


def test_verify_goes_on_where_it_was(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, seen = image_paths(photo_folder), []
    examine = manifest.examine

    def counted(path: Path, *options: Any) -> manifest.Entry:
        seen.append(path)
        return examine(path, *options)

    monkeypatch.setattr(manifest, "examine", counted)
    done = 0

    def stopping() -> None:
        nonlocal done
        done += 1
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manifest.verify(photo_folder, paths, lambda *_: None, stopping)
    with manifest.manifest_path(photo_folder).open("a") as file:
        file.write("b/39.jpg,12")  # killed in the middle of a row
    kept = len(manifest.read_manifest(photo_folder))
    assert kept >= 15
    seen.clear()
    assert manifest.verify(photo_folder, paths, lambda *_: None, lambda: None) == 0
    assert len(seen) == 40 - kept and len(manifest.read_manifest(photo_folder)) == 40


def test_training_starts_with_what_verify_found(photo_folder: Path, data, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_source(DataConfig(path=str(photo_folder)))
    victim = Path(plain.train.images.name(4))
    damage(victim, "truncated")
    unverified = open_source(DataConfig(path=str(photo_folder)))
    assert unverified.known_bad == ()
    data("verify", photo_folder)
    opened = []
    monkeypatch.setattr(manifest, "header", lambda *given: opened.append(given) or header(*given))
    source = open_source(DataConfig(path=str(photo_folder)))
    assert opened == []
    assert len(source.known_bad) == 1 and source.known_bad[0][0] == 4 and "truncated" in source.known_bad[0][1]
    assert source.train.images == plain.train.images  # the numbers have not shifted
    # So a run that began before the verification goes on after it.
    assert source.fingerprint == unverified.fingerprint == plain.fingerprint
    assert source.notes == plain.notes


def test_a_manifest_that_does_not_match_is_rebuilt_with_a_line(photo_folder: Path, data) -> None:
    data("verify", photo_folder)
    smooth(90, 30).save(photo_folder / "a" / "00.jpg")
    (photo_folder / "b" / "01.jpg").unlink()
    smooth(33, 30).save(photo_folder / "a" / "new.jpg")
    source = open_source(DataConfig(path=str(photo_folder)))
    assert sum("manifest" in note and "3 files" in note and "rebuilt" in note for note in source.notes) == 1
    sizes = dict(zip(source.train.images.paths, source.train.images.sizes, strict=True))  # type: ignore[attr-defined]
    assert sizes.get(str(photo_folder / "a" / "00.jpg"), (90, 30)) == (90, 30)
    assert not any("manifest" in note for note in open_source(DataConfig(path=str(photo_folder))).notes)
    assert not manifest.read_manifest(photo_folder)["a/new.jpg"].decoded


def test_only_the_splits_in_use_are_compared(photo_folder: Path, tmp_path: Path, data) -> None:
    root = tmp_path / "root"
    for split in ("train", "test", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(4):
            smooth(30, 30, i).save(root / split / "a" / f"{i}.png")
    data("verify", root)
    (root / "val" / "a" / "0.png").unlink()
    assert not any("manifest" in note for note in open_source(DataConfig(path=str(root))).notes)
    assert len(manifest.read_manifest(root)) == 12


def test_a_cache_that_cannot_be_written_is_named(photo_folder: Path, data, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, lines, err = data("verify", photo_folder)
    assert (
        code == 74 and lines == [] and err.startswith("error: ") and "cannot be written" in err and err.count("\n") == 1
    )
    assert open_source(DataConfig(path=str(photo_folder))).known_bad == ()


def test_a_large_image_is_no_warning(tmp_path: Path) -> None:
    Image.new("1", (10000, 9000)).save(tmp_path / "large.png")
    command = [sys.executable, "-m", "falcon_fast", "data", "verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("count", COUNTS)
def test_rows_that_are_mutated_are_rows_or_left_out(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest only saves time: what is damaged in it is found out again, so nothing is ever refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = {f"a/{i:02d}.jpg": manifest.Entry(1000 + i, 10**18 + i, 60, 40, 1, "", True, "") for i in range(30)}
    entries["a/bad, \udcff.jpg"] = manifest.Entry(3, 10**18, 0, 0, 1, "", True, "not an image")
    path = manifest.write_manifest(tmp_path, entries)
    assert manifest.read_manifest(tmp_path) == entries

    def read() -> None:
        for entry in manifest.read_manifest(tmp_path).values():
            assert all(0 <= number < 2**63 for number in entry[:5]) and 1 <= entry.orientation <= 8

    outcome = fuzz(read, [path], count, name="manifest", memory=16 * MIB)
    assert outcome.accepted == count
