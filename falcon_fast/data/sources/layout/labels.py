"""Labels of a flat folder of images out of the lists that come with ImageNet and tiny-imagenet-200.

- `val_annotations.txt` (tiny-imagenet-200): a line per image, `val_0.JPEG<TAB>n03444034<TAB>...`
- `LOC_val_solution.csv` (ImageNet from Kaggle): `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`
- `ILSVRC2012_validation_ground_truth.txt` and `meta.mat` (ImageNet's development kit): a number for each image, in the order
  of the images' own numbers, and the class that each number stands for.
- `imagenet_2012_validation_synset_labels.txt` (TensorFlow): a class for each image, in the same order.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LARGEST = 16 * 2**20  # bytes of a list; those of ImageNet's 50,000 validation images have at most 3 MB
_NUMBER = re.compile(r"_val_(\d{8})\.")
_CLASS = re.compile(r"n\d{8}")


class Listed(NamedTuple):
    """The labels that a list gives.

    Attributes:
        path: the list.
        classes: name of the class of each image, by the image's file name; images that the list does not name are missing.
        reason: why the list cannot be used; else empty.
    """

    path: str
    classes: dict[str, str]
    reason: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).name


def listed_labels(names: Iterable[str], places: Iterable[str]) -> Listed | None:
    """Return the labels of images out of the first list that is found.

    Args:
        names: the file names of the images.
        places: the folders in which a list is looked for, in this order.

    Returns:
        The labels, with a reason where the list cannot be read or names none of the images; None if there is no list.
    """
    names = list(names)
    for place in places:
        for name, read in _LISTS.items():
            path = Path(place, name)
            if not path.is_file():
                continue
            try:
                classes = read(path, names)
            except Exception as error:  # a damaged list; scipy may raise anything
                return Listed(
                    str(path), {}, f"it cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
                )
            return Listed(str(path), classes, "" if classes else "it names none of the images")
    return None


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{size} bytes are more than a list of labels has")
    return path.read_text(encoding="utf-8")


def _tiny_imagenet(path: Path, names: list[str]) -> dict[str, str]:
    rows = (line.split("\t") for line in _text(path).splitlines())
    found = {row[0]: row[1] for row in rows if len(row) >= 2 and row[1]}
    return {name: found[name] for name in names if name in found}


def _kaggle(path: Path, names: list[str]) -> dict[str, str]:
    rows = csv.reader(_text(path).splitlines())
    found = {row[0]: row[1].split()[0] for row in rows if len(row) >= 2 and _CLASS.match(row[1])}
    stems = {name: name.rpartition(".")[0] for name in names}
    return {name: found[stem] for name, stem in stems.items() if stem in found}


def _by_number(names: list[str], classes: list[str]) -> dict[str, str]:
    """Return the class of each image whose name holds its number, from 1 on, among as many classes."""
    numbers = {name: int(match[1]) for name in names if (match := _NUMBER.search(name))}
    return {name: classes[number - 1] for name, number in numbers.items() if 1 <= number <= len(classes)}


def _tensorflow(path: Path, names: list[str]) -> dict[str, str]:
    return _by_number(names, _text(path).split())


def _development_kit(path: Path, names: list[str]) -> dict[str, str]:
    from scipy.io import loadmat

    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise ValueError("meta.mat is missing, which says what its numbers stand for")
    if meta.stat().st_size > LARGEST:
        raise ValueError("meta.mat is larger than that of the development kit")
    synsets = loadmat(meta, squeeze_me=True, variable_names=("synsets",))["synsets"]
    classes = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    return _by_number(names, [classes[int(number)] for number in _text(path).split()])


_KIT = "ILSVRC2012_validation_ground_truth.txt"
_LISTS = {
    "val_annotations.txt": _tiny_imagenet,
    "LOC_val_solution.csv": _kaggle,
    _KIT: _development_kit,
    f"data/{_KIT}": _development_kit,
    f"ILSVRC2012_devkit_t12/data/{_KIT}": _development_kit,
    "imagenet_2012_validation_synset_labels.txt": _tensorflow,
}
