"""`falcon-fast data pack` and `falcon-fast data preview`, and what each command of `falcon-fast data` refuses."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.sources import manifest
from falcon_fast.data.sources.decoding import header, read_image
from falcon_fast.data.sources.folders import image_paths
from falcon_fast.data.tools import packed_names
from falcon_fast.training.run import prepare

from .dali import DALI
from .images import damage, smooth, write_every_kind


def test_pack_keeps_folders_names_and_proportions(photo_folder: Path, tmp_path: Path, data) -> None:
    assert data("pack", photo_folder, tmp_path / "out", "--short-side", 20) == (0, [], "")
    assert {p.relative_to(tmp_path / "out") for p in image_paths(tmp_path / "out")} == {
        p.relative_to(photo_folder) for p in image_paths(photo_folder)
    }
    for path in image_paths(photo_folder):
        packed, original = read_image(str(tmp_path / "out" / path.relative_to(photo_folder))), read_image(str(path))
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
    assert code == 74 and "No space left" in err and not list((tmp_path / "full").iterdir())


@pytest.mark.parametrize("loader", ["workers", DALI, "resident"])
def test_a_preview_shows_what_a_run_sees_first(photo_folder: Path, tmp_path: Path, data, loader: str) -> None:
    out = tmp_path / "sheet.png"
    code, lines, err = data(
        "preview", photo_folder, "-o", out, "--loader", loader, "--count", 10, "--size", 24, "--seed", 3
    )
    assert code == 0, err
    assert str(out) in lines[0]
    sheet = np.asarray(Image.open(out)).astype(int)
    assert sheet.shape == (8 * 28, 2 * (3 * 28 + 4), 3)
    settings = {"data.path": str(photo_folder), "data.size": 24, "training.seed": 3, "training.batch_size": 10}
    run = prepare(validate(override(load_recipe("folder"), settings | {"model.name": "resnet8"})))
    index = int(run.clock.at(0).indices[9])
    original = read_image(run.source.train.images.name(index)).copy()
    original.thumbnail((24, 24))
    seen = sheet[28 : 28 + original.height, 88 : 88 + original.width]  # the second of the second column
    assert np.abs(seen - np.asarray(original)).mean() < 12
    assert (sheet[28:52, 88 + 28 : 88 + 52] != 255).any() and (sheet[28:52, 88 + 56 : 88 + 80] != 255).any()
    again = tmp_path / "again.png"
    data("preview", photo_folder, "-o", again, "--loader", loader, "--count", 10, "--size", 24, "--seed", 3)
    assert again.read_bytes() == out.read_bytes()


def test_a_preview_of_the_digits_and_around_a_bad_file(photo_folder: Path, tmp_path: Path, data) -> None:
    assert data("preview", "-o", tmp_path / "digits.png")[0] == 0
    assert Image.open(tmp_path / "digits.png").size == (3 * 20 + 4, 8 * 20)
    damage(photo_folder / "a" / "02.jpg", "truncated")
    code, lines, _ = data("preview", photo_folder, "-o", tmp_path / "all.png", "--count", 64, "--size", 16)
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
        (["preview", "photos", "-o", "x.png", "--size", "1000000"], "data.size must be at most 4096"),
        (["preview", "photos", "-o", "x.png", "--loader", "synthetic"], "shows no images"),
        (["preview", "photos", "-o", "no/such/x.png"], "No such file"),
        (["preview", "photos", "-o", "x.png", "--loader", "dalli"], "did you mean 'dali'"),
        (["preview", "-o", "x.png", "--recipe", "folder"], "needs --data PATH"),
        (["preview", "photos", "-o", "x.png", "--recipe", "digitz"], "did you mean 'digits'"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, photo_folder: Path, data, monkeypatch) -> None:
    monkeypatch.chdir(photo_folder.parent)
    Path("empty").mkdir()
    Path("file").write_text("")
    code, _, err = data(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not Path("x.png").exists()


def test_no_two_files_get_the_same_packed_name(tmp_path: Path) -> None:
    """Names that collide in every way that is known, and all of them at random: unique also without regard to case."""
    random = np.random.RandomState(0)
    some = [
        "a",
        "A",
        "a.png",
        "a.jpg",
        "a.png.jpg",
        "\u00e9",
        "e\u0301",
        "x" * 250,
        "x" * 251,
        "two\nlines",
        "a,b",
        "\udce9",
    ]
    every = [
        f"{folder}{stem}{end}"
        for folder in ("", "c/", "C/")
        for stem in some
        for end in (".png", ".jpg", ".JPG", ".jpeg")
    ]
    every = [name for name in every if len(name.rpartition("/")[2].encode("utf-8", "surrogateescape")) <= 255]
    for _ in range(50):
        chosen = [tmp_path / name for name in random.choice(every, 40, replace=False)]
        names = packed_names(tmp_path, chosen)
        alike = [
            unicodedata.normalize("NFC", unicodedata.normalize("NFD", str(name)).casefold()) for name in names.values()
        ]
        assert len(set(alike)) == len(chosen) == len(names)
        assert all(len(os.fsencode(name.name)) <= 255 and name.suffix == ".jpg" for name in names.values())
        assert packed_names(tmp_path, reversed(chosen)) == names  # whatever the order


def test_three_images_of_almost_one_name_stay_three(tmp_path: Path, data) -> None:
    colours = {"a.png": (255, 0, 0), "a.jpg": (0, 128, 0), "a.png.jpg": (0, 0, 255)}
    (tmp_path / "in").mkdir()
    for name, colour in colours.items():
        Image.new("RGB", (40, 40), colour).save(tmp_path / "in" / name)
    seen = set()
    for run in range(5):
        assert data("pack", tmp_path / "in", tmp_path / f"out{run}") == (0, [], "")
        packed = sorted((tmp_path / f"out{run}").iterdir())
        found = {tuple(round(v / 128) * 128 for v in np.asarray(Image.open(path))[20, 20].tolist()) for path in packed}
        assert found == {(256, 0, 0), (0, 128, 0), (0, 0, 256)}
        seen.add(tuple(path.name for path in packed))
    assert len(seen) == 1 and "a.jpg.jpg" in min(seen)


def test_names_of_every_kind_are_packed_and_verified(tmp_path: Path, data) -> None:
    names = ["x" * 251 + ".png", "x" * 251 + ".jpg", "two\nlines.png", "a,b\".png", "Case.png", "case.png", "\u00e9.png",
             "e\u0301.png", "\udce9.png", "  .png", "-r.png", "d.png/1.png", "\u4e00" * 83 + ".png"]  # fmt: skip
    root = tmp_path / "in"
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            smooth(20, 16, i).save(file, "PNG" if name.endswith("png") else "JPEG")
    (root / "notes.txt").write_text("x")
    (root / "more.tar").write_bytes(b"")
    code, lines, err = data("pack", root, tmp_path / "out")
    assert (code, lines) == (0, [])
    assert err.splitlines() == [
        "1 file left out by extension (.txt)",
        "not read: 1 tar archive; the images beside them are used",
    ]
    assert len(image_paths(tmp_path / "out")) == len(names)
    assert data("verify", root)[:2] == (0, [])
    entries = manifest.read_manifest(root)
    assert set(entries) == set(names) and all(entry.decoded for entry in entries.values())
    (root / "two\nlines.png").write_bytes(b"")
    code, lines, _ = data("verify", root)
    assert code == 1 and len(lines) == 1 and "two\\nlines.png" in lines[0]
