"""CIFAR-100, SVHN and ImageNet-100: their original files and folders of their images."""

from __future__ import annotations

import pickle
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from falcon_fast.config import DataConfig, load_recipe, recipe_names, validate
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.errors import UsageError


def opened(kind: str, path: Path) -> Source:
    return open_source(DataConfig(source=kind, path=str(path)))


def refusal(kind: str, path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        opened(kind, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(split: Split) -> np.ndarray:
    return np.stack([np.asarray(split.images.image(i)) for i in range(len(split.images))])


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n noisy images (n, 32, 32, 3) and labels, of every class at least one."""
    random = np.random.RandomState(seed)
    labels = np.concatenate([np.arange(classes), random.randint(0, classes, n - classes)])
    return random.randint(0, 256, (n, 32, 32, 3)).astype(np.uint8), labels


def write_folders(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], name) -> Path:
    for split, (images, labels) in splits.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / name(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


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
    folders = opened("cifar100", write_folders(tmp_path / "f", CIFAR, lambda label: f"c{label:02d}"))
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
    assert "is not a readable CIFAR-100 batch" in refusal("cifar100", root)
    root2 = write_cifar100(tmp_path / "meta", "python")
    (root2 / "cifar-100-python" / "meta").write_bytes(pickle.dumps({b"fine_label_names": Evil()}))
    assert opened("cifar100", root2).classes[3] == "3"
    assert not (tmp_path / "ran").exists()


def test_what_is_not_cifar100_is_named(tmp_path: Path, image_folder: Path) -> None:
    assert "is not CIFAR-100" in refusal("cifar100", image_folder)
    assert "a hundred classes" in refusal("cifar100", image_folder)
    root = write_cifar100(tmp_path / "a", "binary")
    with (root / "cifar-100-binary" / "test.bin").open("ab") as file:
        file.write(b"x")
    assert "test.bin is not a readable CIFAR-100 batch" in refusal("cifar100", root)


SVHN = {"train": drawn(40, 10, 2), "test": drawn(20, 10, 3)}


def write_svhn(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in SVHN.items():
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        savemat(root / f"{split}_32x32.mat", content)
    return root


def test_svhn_in_its_original_files_and_in_folders(tmp_path: Path) -> None:
    source = opened("svhn", write_svhn(tmp_path / "mat"))
    for split, (images, labels) in ((source.train, SVHN["train"]), (source.test, SVHN["test"])):
        assert np.array_equal(pixels(split), images)
        assert split.labels is not None and split.labels.dtype == np.int64
        assert np.array_equal(split.labels, labels)  # 10 is the digit 0
    assert source.classes == tuple("0123456789") and source.size == 32
    folders = opened("svhn", write_folders(tmp_path / "f", SVHN, str))
    assert folders.classes == source.classes
    assert folders.train.labels is not None and sorted(folders.train.labels) == sorted(SVHN["train"][1])


def test_a_damaged_or_missing_svhn_file_is_named(tmp_path: Path, image_folder: Path) -> None:
    root = write_svhn(tmp_path / "mat")
    content = (root / "test_32x32.mat").read_bytes()
    (root / "test_32x32.mat").write_bytes(content[:500])
    assert "test_32x32.mat is not a readable SVHN file" in refusal("svhn", root)
    (root / "test_32x32.mat").unlink()
    assert "test_32x32.mat is not a readable SVHN file" in refusal("svhn", root)
    assert "needs train_32x32.mat and test_32x32.mat" in refusal("svhn", image_folder)


def imagenet100_names() -> list[str]:
    return (resources.files("falcon_fast.data.sources") / "imagenet100.txt").read_text().split()


def test_imagenet100_takes_its_hundred_classes_out_of_a_thousand(tmp_path: Path) -> None:
    names = imagenet100_names()
    assert len(set(names)) == 100 and all(name[0] == "n" and name[1:].isdigit() for name in names)
    others = ["n00000001", "n99999999"]
    for split, each in (("train", 2), ("val", 1)):
        for name in (*names, *others):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (9, 8), (int(name[-2:]), i, 0)).save(tmp_path / split / name / f"{i}.jpg")
    source = opened("imagenet100", tmp_path)
    assert source.classes == tuple(sorted(names))
    assert (len(source.train.images), len(source.test.images)) == (200, 100)
    assert source.train.labels is not None and sorted(source.train.labels) == sorted(list(range(100)) * 2)
    (tmp_path / "val" / names[5]).rename(tmp_path / "elsewhere")
    assert f"no class folder {names[5]}, one of 1 of ImageNet-100" in refusal("imagenet100", tmp_path)


def test_the_sample_has_one_of_each_class(shared: Path) -> None:
    source = opened("imagenet100", shared / "data" / "imagenet-sample")
    assert len(source.classes) == 100 and len(source.train.images) + len(source.test.images) >= 100


@pytest.mark.parametrize("name", ["cifar100", "svhn", "imagenet100"])
def test_their_recipes_are_valid(name: str) -> None:
    assert name in recipe_names()
    config = validate(load_recipe(name))
    assert config.data.source == name and augmentation(config.data.augmentation).crop is not None
