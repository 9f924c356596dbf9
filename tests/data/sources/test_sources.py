"""Sources: digits, CIFAR-10 in its three forms, and folders of every layout and every kind of file."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.cifar import CIFAR10_CLASSES
from falcon_fast.data.sources.images import Source, Split, held_out, read_image
from falcon_fast.data.sources.opening import open_source
from falcon_fast.errors import UsageError


def folder(path: Path | str, size: int = 0) -> Source:
    return open_source(DataConfig(source="folder", path=str(path), size=size))


def cifar(path: Path | str) -> Source:
    return open_source(DataConfig(source="cifar10", path=str(path)))


def refusal(config: DataConfig) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(config)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


def save(path: Path, level: int = 0, size: tuple[int, int] = (10, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def names(split: Split, root: Path) -> list[str]:
    return [str(Path(split.images.name(i)).relative_to(root)) for i in range(len(split.images))]


def pixels(split: Split) -> np.ndarray:
    return np.stack([np.asarray(split.images.image(i)) for i in range(len(split.images))])


# ---- digits ----


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConfig(source="digits"))


def test_digits_are_all_there_once_and_upsampled_bilinearly(digits: Source) -> None:
    from scipy.spatial.distance import cdist
    from sklearn.datasets import load_digits

    theirs = load_digits()
    expected = torch.nn.functional.interpolate(
        torch.tensor(theirs.images * 255 / 16)[:, None], (16, 16), mode="bilinear", align_corners=False
    ).numpy()[:, 0]
    ours = np.concatenate([pixels(digits.train), pixels(digits.test)])
    assert ours.shape == (1797, 16, 16, 3) and ours.dtype == np.uint8
    assert ours.min() == 0 and ours.max() == 255
    assert (ours[..., 0] == ours[..., 1]).all() and (ours[..., 0] == ours[..., 2]).all()
    assert digits.train.labels is not None and digits.test.labels is not None
    labels = np.concatenate([digits.train.labels, digits.test.labels])

    # Each of ours is one of theirs, rounded (in float32, so half a level may fall on either side).
    distance = cdist(ours[..., 0].reshape(1797, -1).astype(float), expected.reshape(1797, -1), "chebyshev")
    match = distance.argmin(1)
    assert distance.min(1).max() <= 0.501
    assert sorted(match.tolist()) == list(range(1797))
    assert np.array_equal(labels, theirs.target[match])


def test_digits_at_their_own_size_are_exactly_theirs() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    source = open_source(DataConfig(source="digits", size=8))
    ours = np.concatenate([pixels(source.train), pixels(source.test)])[..., 0]
    expected = np.rint(theirs.images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in ours) == sorted(x.tobytes() for x in expected)  # disjoint and complete
    assert source.size == 8


def test_the_split_of_the_digits_is_stratified_and_fixed(digits: Source) -> None:
    assert digits.train.labels is not None and digits.test.labels is not None
    assert (len(digits.train.images), len(digits.test.images)) == (1437, 360)
    assert digits.train.labels.dtype == digits.test.labels.dtype == np.int64
    everything = Counter(digits.train.labels.tolist()) + Counter(digits.test.labels.tolist())
    for label, held in Counter(digits.test.labels.tolist()).items():
        assert abs(held - 0.2 * everything[label]) < 1
    again = open_source(DataConfig(source="digits"))
    assert np.array_equal(pixels(again.test), pixels(digits.test))
    assert again.fingerprint == digits.fingerprint


def test_digits_are_normalised_by_their_training_split(digits: Source) -> None:
    ours = pixels(digits.train).astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, ours.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(digits.std, ours.std((0, 1, 2)), rtol=1e-9)
    mean, std = digits.normalization(torch.device("cpu"))
    assert mean.shape == std.shape == (3,) and mean.dtype == torch.float32
    assert digits.classes == tuple("0123456789") and digits.size == 16 and digits.notes == ()


def test_digits_take_no_path() -> None:
    assert "--recipe folder" in refusal(DataConfig(source="digits", path="/tmp"))


# ---- the held-out tenth ----


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.booleans())
def test_a_tenth_is_held_out_and_every_label_gives_its_share(values: list[int], labelled: bool) -> None:
    labels = np.array(values, np.int64) if labelled else None
    n = len(values)
    kept, out = held_out(labels, n, 0.1)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(n))
    assert kept.tolist() == sorted(kept.tolist()) and out.tolist() == sorted(out.tolist())
    assert len(out) == max(1, round(n / 10)) and len(kept) >= 1
    if labels is not None:
        for label, size in Counter(values).items():
            given_up = int((labels[out] == label).sum())
            assert size // 10 <= given_up <= size // 10 + 1
    again = held_out(labels, n, 0.1)
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], out)


def test_the_larger_remainders_give_first_and_lonely_images_last() -> None:
    labels = np.repeat(np.arange(4), [9, 5, 5, 1])
    _, out = held_out(labels, 20, 0.1)  # two of: .9, .5, .5, .1
    assert sorted(labels[out].tolist()) in ([0, 1], [0, 2])
    labels = np.repeat(np.arange(6), [10, 1, 1, 1, 1, 1])
    _, out = held_out(labels, 15, 0.1)
    assert labels[out].tolist() == [0, 0]


def test_the_held_out_images_are_drawn_not_the_last() -> None:
    _, out = held_out(None, 1000, 0.1)
    assert out[0] < 100 < 900 < out[-1] and 400 < out.mean() < 600


# ---- folders: layouts ----


def test_train_and_test(tmp_path: Path) -> None:
    for split, n in (("train", 3), ("test", 2), ("val", 1)):
        for name in ("b", "a"):
            for i in range(n):
                save(tmp_path / split / name / f"{i}.png")
    source = folder(tmp_path)
    assert names(source.train, tmp_path) == [f"train/{c}/{i}.png" for c in "ab" for i in range(3)]
    assert names(source.test, tmp_path) == [f"test/{c}/{i}.png" for c in "ab" for i in range(2)]
    assert source.classes == ("a", "b")
    assert source.train.labels is not None and source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.labels is not None and source.test.labels.tolist() == [0, 0, 1, 1]
    assert source.test.labels.dtype == np.int64
    assert source.notes == ("not used, because there is a folder train/: val",)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_train_and_val(name: str, tmp_path: Path) -> None:
    for split in ("train", name):
        for c in "ab":
            save(tmp_path / split / c / "x.png")
    source = folder(tmp_path)
    assert names(source.test, tmp_path) == [f"{name}/a/x.png", f"{name}/b/x.png"]
    assert source.notes == ()


def test_train_alone_gives_up_a_tenth(tmp_path: Path) -> None:
    for c in "ab":
        for i in range(10):
            save(tmp_path / "train" / c / f"{i}.png")
    source = folder(tmp_path)
    assert (len(source.train.images), len(source.test.images)) == (18, 2)
    assert source.test.labels is not None and source.test.labels.tolist() == [0, 1]
    assert source.classes == ("a", "b")


def test_test_without_train_is_a_class(tmp_path: Path) -> None:
    for c in ("test", "other"):
        for i in range(5):
            save(tmp_path / c / f"{i}.png")
    assert folder(tmp_path).classes == ("other", "test")


def test_a_folder_that_happens_to_be_called_train_does_not_hide_the_others_in_silence(tmp_path: Path) -> None:
    for c in ("train", "bus", "plane"):
        for i in range(5):
            save(tmp_path / c / f"{i}.png")
    assert "not used, because there is a folder train/: bus, plane" in folder(tmp_path).notes


def test_no_split_holds_out_a_tenth_of_each_class(image_folder: Path) -> None:
    source = folder(image_folder)
    train, test = names(source.train, image_folder), names(source.test, image_folder)
    assert len(train) == 36 and len(test) == 4 and not set(train) & set(test)
    assert Counter(name.split("/")[0] for name in test) == {"dark": 2, "light": 2}
    for split in (source.train, source.test):
        assert split.labels is not None
        expected = [source.classes.index(name.split("/")[0]) for name in names(split, image_folder)]
        assert split.labels.tolist() == expected
    again = folder(image_folder)
    assert names(again.test, image_folder) == test and again.fingerprint == source.fingerprint
    assert any("4 images" in note for note in source.notes)


def test_the_order_of_the_file_system_plays_no_part(image_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in sorted(image_folder.rglob("*.png"), reverse=True):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(image_folder)).write_bytes(path.read_bytes())
    a, b = folder(image_folder), folder(other)
    assert names(a.test, image_folder) == names(b.test, other) and a.fingerprint == b.fingerprint


@pytest.mark.parametrize("parent", ["", "only"])
def test_without_two_classes_there_are_no_labels(parent: str, tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / parent / f"{i:02d}.png")
    source = folder(tmp_path)
    assert source.train.labels is None and source.test.labels is None and source.classes == ()
    assert (len(source.train.images), len(source.test.images)) == (18, 2)
    assert any(note.startswith("no class folders") for note in source.notes)


def test_images_outside_the_class_folders_cost_the_labels_and_are_named_as_the_reason(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "cover.png"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert source.classes == () and len(source.train.images) == 3
    assert any(note.startswith("images outside the class folders") for note in source.notes)


def test_nested_folders_belong_to_the_first(tmp_path: Path) -> None:
    for name in ("a/x/1.png", "a/y/z/2.png", "b/3.png", "b/x/4.png"):
        save(tmp_path / "train" / name)
        save(tmp_path / "test" / name)
    source = folder(tmp_path)
    assert source.train.labels is not None and source.train.labels.tolist() == [0, 0, 1, 1]
    assert source.classes == ("a", "b")


def test_hidden_files_and_other_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.PNG", "b/1.JpEg", "b/2.tif"):
        save(tmp_path / name)
    for name in ("a/.hidden.png", ".cache/1.png", "a/.thumbs/1.png", "__MACOSX/._1.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    source = folder(tmp_path)
    every = sorted(names(source.train, tmp_path) + names(source.test, tmp_path))
    assert every == ["a/1.png", "a/2.PNG", "b/1.JpEg", "b/2.tif"]
    assert source.classes == ("a", "b")


def test_links_are_followed_but_not_in_circles(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    (root / "real").mkdir(parents=True)
    save(root / "real" / "1.png")
    (root / "linked").symlink_to(image_folder / "dark")
    (root / "real" / "up").symlink_to(root)
    (root / "real" / "self").symlink_to(root / "real")
    (root / "far").mkdir()
    (root / "far" / "around").symlink_to(tmp_path)  # a folder above the root
    source = folder(root)
    every = names(source.train, root) + names(source.test, root)
    assert len(every) == len(set(every)) == 21
    assert Counter(name.split("/")[0] for name in every) == {"linked": 20, "real": 1}


# ---- folders: what is refused, what is left out ----


def test_unreadable_files_are_left_out_and_counted(image_folder: Path) -> None:
    (image_folder / "dark" / "text.png").write_text("not an image")
    (image_folder / "dark" / "zero.jpg").write_bytes(b"")
    (image_folder / "light" / "link.png").symlink_to("nowhere.png")
    source = folder(image_folder)
    assert len(source.train.images) + len(source.test.images) == 40
    assert any(note.startswith("3 files") and "dark/text.png" in note for note in source.notes)
    (image_folder / "dark" / "zero.jpg").unlink()
    (image_folder / "light" / "link.png").unlink()
    assert any(note.startswith("1 file ") for note in folder(image_folder).notes)


def test_what_is_passed_over_is_said(image_folder: Path) -> None:
    for name in ("list.csv", "notes.TXT", "more.txt", "README"):
        (image_folder / "dark" / name).write_text("x")
    (image_folder / "dark" / ".hidden").write_text("x")
    Image.new("RGB", (20, 20)).save(image_folder / "light" / "moving.gif")
    notes = folder(image_folder).notes
    assert "4 files left out by extension (.txt .csv none)" in notes
    assert any(note.startswith("1 file is not a readable image") and "moving.gif" in note for note in notes)


def test_a_folder_that_cannot_be_listed_is_counted(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir
    (image_folder / "closed").mkdir()

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert any(note.startswith("1 file ") and "closed" in note for note in folder(image_folder).notes)


def test_names_that_would_break_a_line_are_quoted(image_folder: Path) -> None:
    for name in (b"two\nlines.png", b"latin-\xe9.png"):
        (image_folder / os.fsdecode(name)).write_bytes(b"")
        notes = folder(image_folder).notes
        assert all(note.isprintable() for note in notes) and any("1 file" in note for note in notes)
        (image_folder / os.fsdecode(name)).unlink()
    assert "no such path" in refusal(DataConfig(source="folder", path="/no\nwhere"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/such/place", ["/no/such/place", "no such path"]),
        ("~nosuchuser/images", ["~nosuchuser", "no such path"]),
        ("/" + "a" * 5000, ["too long"]),
        ("/a\0b", ["no such path"]),
        ("", ["--data PATH"]),
    ],
)
@pytest.mark.parametrize("source", ["folder", "cifar10"])
def test_a_path_that_is_not_there(source: str, path: str, words: list[str]) -> None:
    message = refusal(DataConfig(source=source, path=path))
    assert all(word in message for word in words), message


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    assert "not a folder" in refusal(DataConfig(path=str(save(tmp_path / "image.png"))))


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert "no image in it" in refusal(DataConfig(path=str(tmp_path)))
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_text("no image")
    assert "none of its 3 image files can be read" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test").mkdir()
    assert f"{tmp_path}/test: no image in it" in refusal(DataConfig(path=str(tmp_path)))


def test_one_image_is_not_enough_and_two_are(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    assert "one image" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "2.png")
    source = folder(tmp_path)
    assert (len(source.train.images), len(source.test.images)) == (1, 1)


def test_a_test_split_with_classes_of_its_own(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"):
        save(tmp_path / name)
    assert "'c'" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "test" / "1.png")
    assert "outside class folders" in refusal(DataConfig(path=str(tmp_path)))


def test_a_test_split_may_lack_a_class(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/b/1.png"):
        save(tmp_path / name)
    labels = folder(tmp_path).test.labels
    assert labels is not None and labels.tolist() == [1]


# ---- folders: size, fingerprint ----


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(300, 500), (400, 400)], 224),
        ([(10, 8)] * 3, 8),
        ([(223, 900)] * 3, 223),
        ([(50, 90), (90, 60), (300, 300)], 60),
    ],
)
def test_views_have_224_pixels_unless_the_images_have_less(
    sizes: list[tuple[int, int]], expected: int, tmp_path: Path
) -> None:
    for i, size in enumerate(sizes):
        save(tmp_path / "train" / f"{i}.png", size=size)
    save(tmp_path / "test" / "1.png", size=(5, 5))  # the test split has no say
    assert folder(tmp_path).size == expected
    assert folder(tmp_path, size=48).size == 48


def test_the_fingerprint_changes_with_the_data(image_folder: Path, tmp_path: Path) -> None:
    seen = [folder(image_folder).fingerprint]
    assert folder(image_folder).fingerprint == seen[0]

    def changed() -> None:
        seen.append(folder(image_folder).fingerprint)
        assert len(set(seen)) == len(seen)

    save(image_folder / "dark" / "new.png")
    changed()
    save(image_folder / "dark" / "new.png", size=(11, 8))
    changed()
    (image_folder / "dark" / "new.png").rename(image_folder / "light" / "new.png")
    changed()
    (image_folder / "light" / "new.png").rename(image_folder / "light" / "news.png")
    changed()
    (image_folder / "light").rename(image_folder / "bright")
    changed()
    moved = tmp_path / "moved"
    image_folder.rename(moved)  # the same data elsewhere is the same data
    assert folder(moved).fingerprint == seen[-1]


# ---- decoding ----


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, (6, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int, rgb: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "x.png", exif=exif)
    upright = {  # what the EXIF standard says the first row and the first column are
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb, 1),
    }[orientation]
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "x.png"))), upright)


def test_every_kind_of_image_becomes_rgb(rgb: np.ndarray, tmp_path: Path) -> None:
    gray = rgb[..., 0]
    as_gray = np.repeat(gray[..., None], 3, 2)
    deep = np.random.RandomState(2).randint(0, 65536, gray.shape).astype(np.uint16)
    palette = Image.fromarray(rgb).quantize(64)
    opacity = bytes(range(64))
    kinds: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
        "rgb.png": (Image.fromarray(rgb), {}, rgb),
        "rgb.bmp": (Image.fromarray(rgb), {}, rgb),
        "rgb.ppm": (Image.fromarray(rgb), {}, rgb),
        "rgb.webp": (Image.fromarray(rgb), {"lossless": True}, rgb),
        "gray.png": (Image.fromarray(gray), {}, as_gray),
        "gray.pgm": (Image.fromarray(gray), {}, as_gray),
        "gray-alpha.png": (Image.merge("LA", [Image.fromarray(gray)] * 2), {}, as_gray),
        "rgba.png": (Image.fromarray(np.dstack([rgb, np.full_like(gray, 200)])), {}, rgb),
        "palette.png": (palette, {}, np.asarray(palette.convert("RGB"))),
        "palette-alpha.png": (palette, {"transparency": opacity}, np.asarray(palette.convert("RGB"))),
        "bits.png": (Image.fromarray(gray > 127), {}, np.where(as_gray > 127, 255, 0)),
        "deep.png": (Image.fromarray(deep), {}, np.repeat((deep // 256)[..., None], 3, 2)),
        "deep.tif": (Image.fromarray(deep), {}, np.repeat((deep // 256)[..., None], 3, 2)),
        "deeper.tif": (Image.fromarray(np.full((4, 4), 10**6, np.int32)), {}, np.full((4, 4, 3), 255)),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {}, np.full((4, 4, 3), (0, 255, 255))),
    }
    for name, (image, options, expected) in kinds.items():
        image.save(tmp_path / name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = read_image(str(tmp_path / name))
        assert read.mode == "RGB", name
        assert np.array_equal(np.asarray(read), expected), name
    source = folder(tmp_path)
    assert len(source.train.images) + len(source.test.images) == len(kinds)


def test_real_photographs(shared: Path) -> None:
    source = folder(shared / "data" / "imagenet-sample")
    assert (len(source.train.images), len(source.test.images)) == (115, 13)  # a tenth of 128 classes of one image each
    assert len(source.classes) == 128 and source.size == 224
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    assert source.train.labels is not None and len(set(source.train.labels.tolist())) == 115
    for i in range(0, 115, 23):
        assert source.train.images.image(i).mode == "RGB"
        assert source.classes[source.train.labels[i]] == Path(source.train.images.name(i)).parent.name


# ---- CIFAR-10 ----

PER_BATCH = 20


@pytest.fixture(scope="module")
def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Six batches of 20 images, uint8 (20, 32, 32, 3), each class twice in an order of its own."""
    random = np.random.RandomState(4)
    return {
        name: (
            random.randint(0, 256, (PER_BATCH, 32, 32, 3)).astype(np.uint8),
            random.permutation(np.arange(PER_BATCH) % 10).astype(np.uint8),
        )
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    }


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def write_binary(root: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    root.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        (root / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], planes(images)], 1).tobytes())
    return root


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The opcodes that Python 2 and its numpy wrote, by hand: str is bytes, and no `_codecs` appears."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + (b"K\x00\x85" + text(b"b") + b"\x87R(K\x01" + number(len(images)) + number(3072) + b"\x86")
        + (b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN")
        + (number(-1) + number(-1) + b"K\x00tb\x89" + text(planes(images).tobytes()) + b"tb")
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(b"a batch") + text(b"labels") + listed + text(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def write_python(root: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]], original: bool = True) -> Path:
    root.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        again = {b"labels": labels.tolist(), b"data": planes(images), b"filenames": [b"x.png"]}
        content = python2_pickle(images, labels) if original else pickle.dumps(again, protocol=2)
        (root / name).write_bytes(content)
    return root


def write_folders(root: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    for name, (images, labels) in batches.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            split = "test" if name == "test_batch" else "train"
            path = root / split / CIFAR10_CLASSES[label] / f"{name}-{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("form", ["binary", "python", "python3"])
def test_cifar10_in_its_original_files(
    form: str, inner: bool, batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = tmp_path / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    if form == "binary":
        write_binary(root, batches)
    else:
        write_python(root, batches, original=form == "python")
    source = cifar(tmp_path if inner else root)
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    assert np.array_equal(pixels(source.train), np.concatenate([images for images, _ in train]))
    assert np.array_equal(pixels(source.test), batches["test_batch"][0])
    assert source.train.labels is not None and source.test.labels is not None
    assert np.array_equal(source.train.labels, np.concatenate([labels for _, labels in train]))
    assert np.array_equal(source.test.labels, batches["test_batch"][1])
    assert source.train.labels.dtype == np.int64 and source.size == 32 and source.classes == CIFAR10_CLASSES


def test_the_forms_of_cifar10_are_one_data_set(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    binary = cifar(write_binary(tmp_path / "a", batches))
    python = cifar(write_python(tmp_path / "b", batches))
    folders = cifar(write_folders(tmp_path / "c", batches))
    assert binary.fingerprint == python.fingerprint
    assert folders.classes == CIFAR10_CLASSES and folders.size == 32
    assert (folders.mean, folders.std) == (binary.mean, binary.std)

    def content(split: Split) -> list[tuple[int, bytes]]:
        assert split.labels is not None
        return sorted((int(label), image.tobytes()) for label, image in zip(split.labels, pixels(split), strict=True))

    assert content(folders.train) == content(binary.train)
    assert content(folders.test) == content(binary.test)


def test_the_published_normalisation_of_cifar10(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    source = cifar(write_binary(tmp_path / "a", batches))
    assert source.mean == pytest.approx((0.4914, 0.4822, 0.4465)) and source.std == pytest.approx(
        (0.247, 0.2435, 0.2616)
    )


def test_the_fingerprint_of_cifar10_is_of_pixels_and_labels(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = write_binary(tmp_path / "a", batches)
    seen = {cifar(root).fingerprint}
    for place in (0, 3073 * PER_BATCH - 1):  # a label, a pixel
        content = bytearray((root / "data_batch_3.bin").read_bytes())
        content[place] = (content[place] + 1) % 10
        (root / "data_batch_3.bin").write_bytes(content)
        seen.add(cifar(root).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("attack", ["system", "eval", "getattr", "load"])
def test_a_malicious_pickle_runs_nothing(
    attack: str, protocol: int, batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "system": (os.system, (f"touch {mark}",)),
        "eval": (eval, (f"open({str(mark)!r}, 'w')",)),
        "getattr": (getattr, (str, "mro")),
        "load": (np.load, (str(mark),)),
    }

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return calls[attack]

    root = write_python(tmp_path / "a", batches)
    content = pickle.dumps({b"labels": [0] * 20, b"data": Attack()}, protocol=protocol)
    (root / "data_batch_1").write_bytes(content)
    message = refusal(DataConfig(source="cifar10", path=str(root)))
    assert "data_batch_1 is not a readable CIFAR-10 batch" in message and "has no place" in message
    assert not mark.exists()


GOOD = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"not a pickle at all",
        b"\x80\x02].",
        b"\x80\x02}.",
        b"\x80\x02N.",
        b"\x80\x02K\x01K\x02\x86R.",
        b"(lp0\n0.",
        b"c_codecs\nencode\n(K\x01K\x02tR.",
        pickle.dumps({"labels": [0] * 4, "data": GOOD}, protocol=2),
        pickle.dumps({b"labels": [0] * 3, b"data": GOOD}, protocol=2),
        pickle.dumps({b"labels": [10] * 4, b"data": GOOD}, protocol=2),
        pickle.dumps({b"labels": [-1] * 4, b"data": GOOD}, protocol=2),
        pickle.dumps({b"labels": [0.5] * 4, b"data": GOOD}, protocol=2),
        pickle.dumps({b"labels": [], b"data": GOOD[:0]}, protocol=2),
        pickle.dumps({b"labels": [0] * 4, b"data": GOOD[:, :-1]}, protocol=2),
        pickle.dumps({b"labels": [0] * 4, b"data": [1, 2]}, protocol=2),
        pickle.dumps({b"labels": 0, b"data": GOOD}, protocol=2),
    ],
)
def test_a_damaged_pickle_is_one_line(
    content: bytes, batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = write_python(tmp_path / "a", batches)
    (root / "data_batch_4").write_bytes(content)
    assert f"{root}/data_batch_4 is not a readable" in refusal(DataConfig(source="cifar10", path=str(root)))


@pytest.mark.parametrize("size", [0, 1, 3073 * 20 - 1, 3072])
def test_a_truncated_binary_batch_is_one_line(
    size: int, batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = write_binary(tmp_path / "a", batches)
    with (root / "test_batch.bin").open("r+b") as file:
        file.truncate(size)
    assert f"{root}/test_batch.bin is not a readable" in refusal(DataConfig(source="cifar10", path=str(root)))
    (root / "test_batch.bin").unlink()
    assert "No such file" in refusal(DataConfig(source="cifar10", path=str(root)))


def test_what_is_not_cifar10(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], image_folder: Path, tmp_path: Path
) -> None:
    assert "data_batch_1" in refusal(DataConfig(source="cifar10", path=str(image_folder)))
    root = write_folders(tmp_path / "c", batches)
    save(root / "train" / "cat" / "large.png", size=(32, 33))
    assert "32 x 32" in refusal(DataConfig(source="cifar10", path=str(root)))


def test_what_a_cifar10_folder_leaves_out_is_said(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = write_folders(tmp_path / "c", batches)
    assert cifar(root).notes == ()
    (root / "train" / "cat" / "broken.png").write_bytes(b"no")
    assert any("broken.png" in note for note in cifar(root).notes)
    assert any("held out" in note for note in cifar(root / "train").notes)


def test_an_image_of_a_cifar10_folder_that_ends_too_early_is_named(
    batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    root = write_folders(tmp_path / "c", batches)
    victim = next((root / "test" / "dog").iterdir())
    victim.write_bytes(victim.read_bytes()[:1500])  # the header is whole: it opens, and does not decode
    assert f"{victim} cannot be decoded" in refusal(DataConfig(source="cifar10", path=str(root)))
