"""Lists of labels that come with ImageNet and tiny-imagenet-200."""

from __future__ import annotations

from pathlib import Path

import pytest

from falcon_fast.data.sources.layout import labels
from falcon_fast.data.sources.layout.labels import Listed, listed_labels

from ....fuzz import COUNTS, MIB, fuzz

VAL = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 50000)]


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
def test_the_development_kit_is_named_and_not_read(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "kit" / inside
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n")
    found = listed_labels(VAL, [str(tmp_path / "kit")])
    assert found is not None and not found.classes and "LOC_val_solution.csv" in found.reason


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
    assert "has 3 bytes, but at most 2 are read" in reason()


LISTS = {
    "val_annotations.txt": "".join(f"{name}\tn{i:08d}\t0\t32\t44\t62\n" for i, name in enumerate(VAL)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"{name[:-5]},n{i:08d} 1 2 3 4\n" for i, name in enumerate(VAL)),
    "imagenet_2012_validation_synset_labels.txt": "n00000001\n" * 100,
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", LISTS)
def test_mutations_give_names_of_classes_or_a_reason(tmp_path: Path, name: str, count: int) -> None:
    path = tmp_path / name
    path.write_text(LISTS[name])

    def read() -> None:
        found = listed_labels(VAL, [str(tmp_path)])
        assert found is not None and set(found.classes) <= set(VAL) and found.reason.isprintable()

    assert fuzz(read, [path], count, name=name, memory=32 * MIB).accepted == count  # the reason is a line for the user
