"""CIFAR-10 and CIFAR-100: their original files in each form, folders of their images, and damaged or malicious files."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.sources import cifar as cifar_module
from falcon_fast.data.sources.cifar import CIFAR10_CLASSES
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.data.sources.opening import open_source

from ...fuzz import COUNTS, MIB, fuzz
from .opened import drawn, opened, pixels, refusal, refused, save, write_class_folders


def cifar(path: Path | str) -> Source:
    return open_source(DataConfig(source="cifar10", path=str(path)))


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
    assert len(cifar(root).notes) == 1 and "left out" not in cifar(root).notes[0]
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


# ---- CIFAR-100 ----


CIFAR = {"train": drawn(230, 100, 0), "test": drawn(110, 100, 1)}


def write_cifar100(root: Path, form: str) -> Path:
    place = root / f"cifar-100-{form}"
    place.mkdir(parents=True)
    names = [f"class {i}".replace(" ", "_") for i in range(100)]
    for split, (images, labels) in CIFAR.items():
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        if form == "binary":
            content = np.concatenate([(labels // 5)[:, None], labels[:, None], rows], 1).astype(np.uint8)
            content.tofile(place / f"{split}.bin")
        else:
            batch = {b"data": rows, b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
            (place / split).write_bytes(pickle.dumps(batch, protocol=2))
    if form == "binary":
        (place / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    else:
        (place / "meta").write_bytes(pickle.dumps({b"fine_label_names": [n.encode() for n in names]}, protocol=2))
    return root


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100_in_its_original_files(form: str, tmp_path: Path) -> None:
    root = write_cifar100(tmp_path, form)
    for place in (root, root / f"cifar-100-{form}"):
        source = opened("cifar100", place)
        for split, (images, labels) in ((source.train, CIFAR["train"]), (source.test, CIFAR["test"])):
            assert np.array_equal(pixels(split), images)
            assert split.labels is not None and split.labels.dtype == np.int64
            assert np.array_equal(split.labels, labels)
        assert source.size == 32 and len(source.classes) == 100 and source.classes[7] == "class_7"
    assert source.mean == (0.5071, 0.4865, 0.4409)  # not CIFAR-10's


def test_cifar100_in_folders_and_without_names(tmp_path: Path) -> None:
    folders = opened("cifar100", write_class_folders(tmp_path / "f", CIFAR, lambda label: f"c{label:02d}"))
    python = write_cifar100(tmp_path / "p", "python")
    (python / "cifar-100-python" / "meta").unlink()
    source = opened("cifar100", python)
    assert source.classes == tuple(map(str, range(100)))
    for a, b in ((folders.train, source.train), (folders.test, source.test)):
        assert a.labels is not None and b.labels is not None
        ours = sorted((int(k), x.tobytes()) for k, x in zip(a.labels, pixels(a), strict=True))
        assert ours == sorted((int(k), x.tobytes()) for k, x in zip(b.labels, pixels(b), strict=True))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "x"))

    root = write_cifar100(tmp_path, "python")
    (root / "cifar-100-python" / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    assert "is not a readable CIFAR-100 batch" in refused("cifar100", root)
    root2 = write_cifar100(tmp_path / "meta", "python")
    (root2 / "cifar-100-python" / "meta").write_bytes(pickle.dumps({b"fine_label_names": Evil()}))
    assert opened("cifar100", root2).classes[3] == "3"
    assert not (tmp_path / "ran").exists()


def test_what_is_not_cifar100_is_named(tmp_path: Path, image_folder: Path) -> None:
    assert "is not CIFAR-100" in refused("cifar100", image_folder)
    assert "a hundred classes" in refused("cifar100", image_folder)
    root = write_cifar100(tmp_path / "a", "binary")
    with (root / "cifar-100-binary" / "test.bin").open("ab") as file:
        file.write(b"x")
    assert "test.bin is not a readable CIFAR-100 batch" in refused("cifar100", root)


def cifar100(path: Path) -> Source:
    return open_source(DataConfig(source="cifar100", path=str(path)))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", ["binary", "python", "python3"])
def test_mutations_are_read_or_refused_in_one_line(
    form: str, batches: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path, count: int
) -> None:
    if form == "binary":
        root = write_binary(tmp_path / "data", batches)
    else:
        root = write_python(tmp_path / "data", batches, original=form == "python")
    outcome = fuzz(lambda: cifar(root), sorted(root.iterdir()), count, name=f"cifar10, {form}", memory=32 * MIB)
    assert outcome.refused > count // 8 and outcome.accepted > count // 16


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", ["meta", "fine_label_names.txt"])
def test_mutated_names_of_classes_are_names_or_numbers(tmp_path: Path, form: str, count: int) -> None:
    """The names are for display: a file that holds none is no error, and what is shown is printable."""
    root, names = tmp_path / "data", [f"class-{i}" for i in range(100)]
    root.mkdir()
    for name in ("train", "test"):
        batch = {b"fine_labels": [1, 2], b"coarse_labels": [1, 2], b"data": np.zeros((2, 3072), np.uint8)}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = pickle.dumps({b"fine_label_names": [name.encode() for name in names]}, protocol=2)
    (root / form).write_bytes(meta if form == "meta" else "\n".join(names).encode())

    def read() -> None:
        classes = cifar100(root).classes
        assert len(set(classes)) == 100 and all(name.isprintable() and len(name) <= 80 for name in classes)

    outcome = fuzz(read, [root / form], count, name=f"cifar100, {form}")
    assert outcome.accepted == count


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "too large"])
@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_a_batch_that_is_no_regular_file_is_refused(
    name: str,
    kind: str,
    batches: dict[str, tuple[np.ndarray, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = write_binary(tmp_path / "data", batches)
    if kind != "too large":
        (root / name).unlink()
    if kind == "fifo":
        os.mkfifo(root / name)
    elif kind == "directory":
        (root / name).mkdir()
    elif kind == "device":
        (root / name).symlink_to("/dev/zero")
    else:
        monkeypatch.setattr(cifar_module, "LARGEST_BATCH", 1000)
        name = "data_batch_1.bin"
    assert f"{name} is not a readable CIFAR-10 batch" in refused("cifar10", root)
