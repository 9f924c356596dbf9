"""What the name of a folder says: that it is a split, that it holds the images, or that it only describes them.

The names are those of data sets as people have them: `train`, `Training`, `TRAIN`, `training_set`, `seg_train` (Intel),
`Final_Test` (GTSRB), `PublicTest` (FER2013), `train2017` (COCO), `test1` (dogs and cats), `valid` (Kaggle, Roboflow).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# Of several folders to test on, the first of these kinds is used.
KINDS = ("test", "val", "held out")
_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation", "validate", "validating"),
    "held out": ("dev", "devel", "eval", "evaluation", "evaluate", "holdout", "heldout"),
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words}
# Words beside them that change nothing.
_NEUTRAL = {
    *("set", "data", "dataset", "split", "folder", "final", "public", "private", "jpg", "jpeg", "png"),
    *("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"),
}
_ENDING = re.compile(r"(?<=.)(set|data|dataset|images|imgs|split)$")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")

_HOLDS_IMAGES = {
    "image",
    "images",
    "img",
    "imgs",
    "jpg",
    "jpgs",
    "jpeg",
    "jpegs",
    "jpegimages",
    "photos",
    "pictures",
    "pics",
}
_DESCRIBES = {
    *(
        "annotation",
        "annotations",
        "annot",
        "annots",
        "label",
        "labels",
        "bbox",
        "bboxes",
        "boxes",
        "groundtruth",
        "gt",
    ),
    *("mask", "masks", "trimap", "trimaps", "segmentation", "segmentations", "segmentationclass", "segmentationobject"),
    *("meta", "metadata", "devkit", "doc", "docs", "thumbnails", "thumbs", "imagesets", "parts", "attributes"),
    *("pred", "prediction", "predictions"),
}


class Role(NamedTuple):
    """A folder's part as a split: its kind (`train` or one of KINDS), and the other words of its name, which a pair shares."""

    kind: str
    rest: tuple[str, ...]


def role_of(name: str) -> Role | None:
    """Return what split a folder's name stands for, without regard to case; None if it holds no such word, or several."""
    words = [part.lower() for part in _PART.findall(name)]
    whole = "".join(words)
    if whole in _KIND_OF:
        return Role(_KIND_OF[whole], ())
    words = [word if word in _KIND_OF or word in _NEUTRAL else _ENDING.sub("", word) for word in words]
    kinds = [_KIND_OF[word] for word in words if word in _KIND_OF]
    if len(kinds) != 1:
        return None
    rest = (word for word in words if word not in _KIND_OF and word not in _NEUTRAL and not word.isdigit())
    return Role(kinds[0], tuple(rest))


def folded(name: str) -> str:
    """Return a name without regard to case and to how Unicode composes its letters, to compare it with others."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def holds_images(name: str) -> bool:
    """Check whether a folder's name says no more than that images are in it."""
    return name.lower() in _HOLDS_IMAGES


def describes_images(name: str) -> bool:
    """Check whether a folder's name says that it holds annotations, masks or the like, not the images themselves."""
    return re.sub(r"[\W_]", "", name.lower()) in _DESCRIBES
