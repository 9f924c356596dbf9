"""`falcon-fast data`: verify and its manifest, pack, preview."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.cli import main as cli
from falcon_fast.config import DataConfig, load_recipe, override, validate
from falcon_fast.data.sources import manifest
from falcon_fast.data.sources.folders import image_paths
from falcon_fast.data.sources.images import header, read_image
from falcon_fast.data.sources.opening import open_source
from falcon_fast.training.run import prepare

from .images import damage, smooth, write_every_kind


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs `falcon-fast data ...` in this process: (exit code, lines of stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["falcon-fast", "data", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return int(code), out.out.splitlines(), out.err  # type: ignore[call-overload]

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 JPEGs in two classes, of which every eighth lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(40):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(60, 40, i).save(path, **({"exif": exif} if i % 8 == 0 else {}))
    return tmp_path / "photos"


# ---- verify and the manifest ----


def test_verify_prints_the_bad_ones_and_nothing_else(photos: Path, data) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    assert data("verify", photos) == (0, [], "")
    assert {
        path: path.read_bytes() for path in photos.rglob("*") if path.is_file()
    } == before  # nothing beside the data
    victims = {photos / "a/02.jpg": "truncated", photos / "b/03.jpg": "empty", photos / "b/05.jpg": "gif"}
    for victim, kind in victims.items():
        damage(victim, kind)
    for _ in range(2):
        code, lines, err = data("verify", photos)
        assert code == 1 and err == "" and len(lines) == 3
        assert [line.split(": ")[0] for line in lines] == sorted(map(str, victims))
        assert all(line.split(": ", 1)[1] for line in lines)


def test_the_manifest_holds_sizes_and_orientations(photos: Path, data) -> None:
    data("verify", photos)
    entries = manifest.read_manifest(photos)
    assert len(entries) == 40 and all(entry.decoded and not entry.reason for entry in entries.values())
    for name, entry in entries.items():
        assert (entry.width, entry.height) == read_image(str(photos / name)).size
        assert entry.orientation == (6 if int(Path(name).stem) % 8 == 0 else 1)
        assert entry.bytes == (photos / name).stat().st_size


def test_verify_goes_on_where_it_was(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, seen = image_paths(photos), []
    examine = manifest.examine

    def counted(path: Path, whole: bool) -> manifest.Entry:
        seen.append(path)
        return examine(path, whole)

    monkeypatch.setattr(manifest, "examine", counted)
    done = 0

    def stopping() -> None:
        nonlocal done
        done += 1
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manifest.verify(photos, paths, lambda *_: None, stopping)
    with manifest.manifest_path(photos).open("a") as file:
        file.write("b/39.jpg,12")  # killed in the middle of a row
    kept = len(manifest.read_manifest(photos))
    assert kept >= 15
    seen.clear()
    assert manifest.verify(photos, paths, lambda *_: None, lambda: None) == 0
    assert len(seen) == 40 - kept and len(manifest.read_manifest(photos)) == 40


def test_training_starts_with_what_verify_found(photos: Path, data, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_source(DataConfig(path=str(photos)))
    victim = Path(plain.train.images.name(4))
    damage(victim, "truncated")
    unverified = open_source(DataConfig(path=str(photos)))
    assert unverified.known_bad == ()
    data("verify", photos)
    opened = []
    monkeypatch.setattr(manifest, "header", lambda path: opened.append(path) or header(path))
    source = open_source(DataConfig(path=str(photos)))
    assert opened == []
    assert len(source.known_bad) == 1 and source.known_bad[0][0] == 4 and "truncated" in source.known_bad[0][1]
    assert source.train.images == plain.train.images  # the numbers have not shifted
    # So a run that began before the verification goes on after it.
    assert source.fingerprint == unverified.fingerprint == plain.fingerprint
    assert source.notes == plain.notes


def test_a_manifest_that_does_not_match_is_rebuilt_with_a_line(photos: Path, data) -> None:
    data("verify", photos)
    smooth(90, 30).save(photos / "a" / "00.jpg")
    (photos / "b" / "01.jpg").unlink()
    smooth(33, 30).save(photos / "a" / "new.jpg")
    source = open_source(DataConfig(path=str(photos)))
    assert sum("manifest" in note and "3 files" in note and "rebuilt" in note for note in source.notes) == 1
    sizes = dict(zip(source.train.images.paths, source.train.images.sizes, strict=True))  # type: ignore[attr-defined]
    assert sizes.get(str(photos / "a" / "00.jpg"), (90, 30)) == (90, 30)
    assert not any("manifest" in note for note in open_source(DataConfig(path=str(photos))).notes)
    assert not manifest.read_manifest(photos)["a/new.jpg"].decoded


def test_only_the_splits_in_use_are_compared(photos: Path, tmp_path: Path, data) -> None:
    root = tmp_path / "root"
    for split in ("train", "test", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(4):
            smooth(30, 30, i).save(root / split / "a" / f"{i}.png")
    data("verify", root)
    (root / "val" / "a" / "0.png").unlink()
    assert not any("manifest" in note for note in open_source(DataConfig(path=str(root))).notes)
    assert len(manifest.read_manifest(root)) == 12


def test_a_cache_that_cannot_be_written_is_named(photos: Path, data, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, lines, err = data("verify", photos)
    assert code == 1 and lines == [] and err.startswith("error: ") and err.count("\n") == 1
    assert open_source(DataConfig(path=str(photos))).known_bad == ()


# ---- pack ----


def test_pack_keeps_folders_names_and_proportions(photos: Path, tmp_path: Path, data) -> None:
    assert data("pack", photos, tmp_path / "out", "--short-side", 20) == (0, [], "")
    assert {p.relative_to(tmp_path / "out") for p in image_paths(tmp_path / "out")} == {
        p.relative_to(photos) for p in image_paths(photos)
    }
    for path in image_paths(photos):
        packed, original = read_image(str(tmp_path / "out" / path.relative_to(photos))), read_image(str(path))
        assert packed.size == tuple(side // 2 for side in original.size)
        expected = original.resize(packed.size, Image.Resampling.LANCZOS)
        luma = (np.asarray(each.convert("L")).astype(int) for each in (packed, expected))
        assert np.abs(np.subtract(*luma)).mean() < 3
    assert header(tmp_path / "out" / "a" / "00.jpg")[2] == 1  # upright already


def test_pack_takes_every_kind_and_loses_none(tmp_path: Path, data) -> None:
    paths = write_every_kind(tmp_path / "kinds")
    damage(tmp_path / "kinds" / "444.jpg", "truncated")
    code, lines, _ = data("pack", tmp_path / "kinds", tmp_path / "out", "--quality", 50)
    assert code == 1 and len(lines) == 1 and "444.jpg" in lines[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == len(paths) - 1 and {"rgb.png.jpg", "rgb.bmp.jpg", "gray-alpha.jpg"} <= names
    assert read_image(str(tmp_path / "out" / "rgb.png.jpg")).size == (61, 45)  # not enlarged
    # What is there stays, what is missing is made.
    (tmp_path / "out" / "rgb.png.jpg").write_bytes(b"mine")
    (tmp_path / "out" / "rgb.bmp.jpg").unlink()
    data("pack", tmp_path / "kinds", tmp_path / "out")
    assert (tmp_path / "out" / "rgb.png.jpg").read_bytes() == b"mine" and (tmp_path / "out" / "rgb.bmp.jpg").exists()


def test_what_no_jpeg_holds_is_named_and_nothing_half_written_stays(tmp_path: Path, data, monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    smooth(30, 20).save(tmp_path / "in" / "good.png")
    Image.new("RGB", (66000, 2)).save(tmp_path / "in" / "wide.png")
    code, lines, err = data("pack", tmp_path / "in", tmp_path / "out")
    assert code == 1 and len(lines) == 1 and "wide.png: 66000 x 2 pixels do not fit into a JPEG" in lines[0] and not err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.jpg"]

    def full(self: Image.Image, file: Path, *_: object, **__: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, lines, err = data("pack", tmp_path / "in", tmp_path / "full")
    assert code == 1 and "No space left" in err and not list((tmp_path / "full").iterdir())


def test_a_large_image_is_no_warning(tmp_path: Path) -> None:
    Image.new("1", (10000, 9000)).save(tmp_path / "large.png")
    command = [sys.executable, "-m", "falcon_fast", "data", "verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""


# ---- preview ----


@pytest.mark.parametrize("loader", ["workers", "dali", "resident"])
def test_a_preview_shows_what_a_run_sees_first(photos: Path, tmp_path: Path, data, loader: str) -> None:
    out = tmp_path / "sheet.png"
    code, lines, err = data("preview", photos, "-o", out, "--loader", loader, "--count", 10, "--size", 24, "--seed", 3)
    assert code == 0, err
    assert str(out) in lines[0]
    sheet = np.asarray(Image.open(out)).astype(int)
    assert sheet.shape == (8 * 28, 2 * (3 * 28 + 4), 3)
    settings = {"data.path": str(photos), "data.size": 24, "training.seed": 3, "training.batch_size": 10}
    run = prepare(validate(override(load_recipe("folder"), settings | {"model.name": "resnet8"})))
    index = int(run.clock.at(0).indices[9])
    original = read_image(run.source.train.images.name(index)).copy()
    original.thumbnail((24, 24))
    seen = sheet[28 : 28 + original.height, 88 : 88 + original.width]  # the second of the second column
    assert np.abs(seen - np.asarray(original)).mean() < 12
    assert (sheet[28:52, 88 + 28 : 88 + 52] != 255).any() and (sheet[28:52, 88 + 56 : 88 + 80] != 255).any()
    again = tmp_path / "again.png"
    data("preview", photos, "-o", again, "--loader", loader, "--count", 10, "--size", 24, "--seed", 3)
    assert again.read_bytes() == out.read_bytes()


def test_a_preview_of_the_digits_and_around_a_bad_file(photos: Path, tmp_path: Path, data) -> None:
    assert data("preview", "-o", tmp_path / "digits.png")[0] == 0
    assert Image.open(tmp_path / "digits.png").size == (3 * 20 + 4, 8 * 20)
    damage(photos / "a" / "02.jpg", "truncated")
    code, lines, _ = data("preview", photos, "-o", tmp_path / "all.png", "--count", 64, "--size", 16)
    assert code == 0 and "35 images" in lines[0]  # all that are trained on


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "missing"], "no such path"),
        (["verify", "empty"], "no image in it"),
        (["verify", "file"], "not a folder"),
        (["pack", "photos", "photos/a/out"], "lies inside"),
        (["pack", "photos", "file"], "file cannot be created: File exists"),
        (["preview", "photos", "-o", "x.jpg"], "ends in .png"),
        (["preview", "photos", "-o", "x.png", "--size", "1000000"], "give a smaller --size"),
        (["preview", "photos", "-o", "x.png", "--loader", "synthetic"], "shows no images"),
        (["preview", "photos", "-o", "no/such/x.png"], "No such file"),
        (["preview", "photos", "-o", "x.png", "--loader", "dalli"], "did you mean 'dali'"),
        (["preview", "-o", "x.png", "--recipe", "folder"], "needs --data PATH"),
        (["preview", "photos", "-o", "x.png", "--recipe", "digitz"], "did you mean 'digits'"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, photos: Path, data, monkeypatch) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("file").write_text("")
    code, _, err = data(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not Path("x.png").exists()
