"""Lists of labels that come with ImageNet and tiny-imagenet-200."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from falcon_fast.data.sources.layout import labels
from falcon_fast.data.sources.layout.labels import Listed, listed_labels

VAL = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 50000)]
WNIDS = ("n02128385", "n01440764", "n01443537")


def write_development_kit(folder: Path) -> Path:
    """The development kit in its own format: a MATLAB struct array, and a number a line."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.zeros((len(WNIDS) + 1, 1), kind)
    for i, wnid in enumerate((*WNIDS, "n00001740")):  # the last is a parent of others
        synsets[i, 0] = (i + 1, wnid, "words", "gloss", 0 if i < len(WNIDS) else 3)
    folder.mkdir(parents=True)
    savemat(folder / "meta.mat", {"synsets": synsets})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n")
    return folder


def test_the_list_of_tiny_imagenet(tmp_path: Path) -> None:
    path = tmp_path / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn03444034\t0\t32\t44\t62\nval_1.JPEG\tn04067472\t52\t55\t57\t59\nbroken line\n")
    found = listed_labels(["val_1.JPEG", "val_7.JPEG"], [str(tmp_path / "none"), str(tmp_path)])
    assert found == Listed(str(path), {"val_1.JPEG": "n04067472"}) and found.name == "val_annotations.txt"


def test_the_list_of_kaggle(tmp_path: Path) -> None:
    lines = [
        "ImageId,PredictionString",
        f"{VAL[1][:-5]},n03995372 85 1 499 272 ",
        f"{VAL[0][:-5]},n02128385 1 2 3 4 n1 2",
    ]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    found = listed_labels(VAL, [str(tmp_path)])
    assert found is not None and found.classes == {VAL[0]: "n02128385", VAL[1]: "n03995372"}


@pytest.mark.parametrize("inside", ["", "data", "ILSVRC2012_devkit_t12/data"])
def test_the_development_kit(inside: str, tmp_path: Path) -> None:
    write_development_kit(tmp_path / "kit" / inside)
    found = listed_labels(VAL, [str(tmp_path / "kit")])
    assert found is not None and found.reason == ""
    assert found.classes == {VAL[0]: "n01443537", VAL[1]: "n02128385", VAL[2]: "n01440764"}


def test_the_list_of_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("n01\nn02\n")
    found = listed_labels(VAL, [str(tmp_path)])
    assert found is not None and found.classes == {VAL[0]: "n01", VAL[1]: "n02"}


def test_no_list_and_lists_that_do_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [str(tmp_path)]
    assert listed_labels(VAL, places) is None

    def reason() -> str:
        found = listed_labels(VAL, places)
        assert found is not None and not found.classes
        return found.reason

    path = tmp_path / "val_annotations.txt"
    path.write_text("other.JPEG\tn01440764\n")
    assert reason() == "it names none of the images"
    path.write_bytes(b"\xff\xfe\x00")
    assert reason().startswith("it cannot be read")
    monkeypatch.setattr(labels, "LARGEST", 2)
    assert "3 bytes are more than a list of labels has" in reason()
    monkeypatch.undo()
    path.unlink()
    kit = write_development_kit(tmp_path / "data")
    (kit / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(500))
    assert reason().startswith("it cannot be read")
    (kit / "meta.mat").unlink()
    assert "meta.mat is missing" in reason()
