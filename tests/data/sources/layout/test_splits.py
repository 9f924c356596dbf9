"""Which folders are splits and which are classes: the layouts of data sets as people have them, and what is not guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from falcon_fast.data.sources.layout.splits import find_layout
from falcon_fast.data.sources.layout.tree import walk
from falcon_fast.errors import UsageError

from .made import make

# Of each data set: its files, its training folder, its classes, its test folder, and words of what is left out.
UNDERSTOOD: dict[str, tuple[list[str], str, str, str | None, list[str]]] = {
    "flat": (["*3"], ".", "", None, []),
    "class folders": (["{cat,dog}/*3"], ".", "cat dog", None, []),
    "train and test": (["{train,test}/{a,b}/*2"], "train", "a b", "test", []),
    "train alone": (["train/{a,b}/*2"], "train", "a b", None, []),
    "all in capitals": (["{TRAIN,VAL}/{a,b}/*2"], "TRAIN", "a b", "VAL", []),
    "brain tumour (Kaggle)": (["{Training,Testing}/{glioma,pituitary}/*2"], "Training", "glioma pituitary", "Testing", []),
    "Imagenette": (["{train,val}/{n01440764,n02102040}/*2", "noisy.csv"], "train", "n01440764 n02102040", "val", []),
    "100 sports (Kaggle)": (["{train,valid,test}/{a,b}/*2"], "train", "a b", "test", ["valid/ (4 images; test/ is the"]),
    "Train and test in mixed case": (["{train,Test}/{a,b}/*2"], "train", "a b", "Test", []),
    "Intel scenes (Kaggle)": (
        ["seg_train/seg_train/{sea,street}/*2", "seg_test/seg_test/{sea,street}/*2", "seg_pred/seg_pred/*3"],
        "seg_train/seg_train",
        "sea street",
        "seg_test/seg_test",
        ["seg_pred/ (3 images; not a split)"],
    ),
    "cats and dogs (Kaggle)": (
        ["training_set/training_set/{cats,dogs}/*2", "test_set/test_set/{cats,dogs}/*2"],
        "training_set/training_set",
        "cats dogs",
        "test_set/test_set",
        [],
    ),
    "cats and dogs, filtered": (["{train,validation}/{cats,dogs}/*2"], "train", "cats dogs", "validation", []),
    "dogs against cats (Kaggle)": (["train/*4", "test1/*3"], "train", "", "test1", []),
    "Fruits-360": (["{Training,Test}/{Apple 1,Kiwi}/*2", "test-multiple_fruits/*3"], "Training", "Apple 1 Kiwi", "Test",
                   ["test-multiple_fruits/ (3 images; not a split)"]),
    "chest x-rays (Kaggle)": (
        ["chest_xray/{train,val,test}/{A,B}/*2", "chest_xray/chest_xray/{train,test}/{A,B}/*2", "__MACOSX/x/._1.jpg"],
        "chest_xray/train",
        "A B",
        "chest_xray/test",
        ["chest_xray/val/ (4 images", "chest_xray/chest_xray/ (8 images; not a split)"],
    ),
    "American sign language (Kaggle)": (
        ["asl_alphabet_train/asl_alphabet_train/{A,B}/*2", "asl_alphabet_test/asl_alphabet_test/*2"],
        "asl_alphabet_train/asl_alphabet_train",
        "A B",
        None,
        ["asl_alphabet_test/ (2 images; no class folders, so no labels)"],
    ),
    "GTSRB": (
        ["GTSRB/Final_Training/Images/{00000,00001}/*2", "GTSRB/Final_Test/Images/*2"],
        "GTSRB/Final_Training/Images",
        "00000 00001",
        None,
        ["GTSRB/Final_Test/ (2 images; no class folders"],
    ),
    "Places365": (["places365_standard/{train,val}/{abbey,zoo}/*2"], "places365_standard/train", "abbey zoo",
                  "places365_standard/val", []),
    "Food-101": (["food-101/images/{apple_pie,waffles}/*2", "food-101/meta/{train.txt,test.txt}"], "food-101/images",
                 "apple_pie waffles", None, []),
    "CUB-200": (["images/{001.Albatross,002.Auk}/*2", "images.txt", "segmentations/{001.Albatross,002.Auk}/1.png"], "images",
                "001.Albatross 002.Auk", None, ["segmentations/ (2 images; it describes the images)"]),
    "Oxford pets": (["images/*5", "annotations/trimaps/{1.png,2.png}", "annotations/list.txt"], "images", "", None,
                    ["annotations/ (2 images; it describes the images)"]),
    "EuroSAT": (["2750/{Forest,River}/*2"], "2750", "Forest River", None, []),
    "Caltech-101": (["caltech-101/101_ObjectCategories/{ant,bass}/*2", "caltech-101/Annotations/ant/1.mat"],
                    "caltech-101/101_ObjectCategories", "ant bass", None, []),
    "YOLO": (["images/{train,val}/*2", "labels/{train,val}/1.txt"], "images/train", "", "images/val", []),
    "Roboflow": (["{train,valid,test}/images/*2", "{train,valid,test}/labels/1.txt"], "train/images", "", "test/images",
                 ["valid/ (2 images"]),
    "COCO": (["{train2017,val2017}/*2", "annotations/a.json"], "train2017", "", "val2017", []),
    "Cityscapes": (["leftImg8bit/{train,val,test}/{aachen,bochum}/*1"], "leftImg8bit/train", "aachen bochum", "leftImg8bit/test",
                   ["leftImg8bit/val/"]),
    "plant disease (Kaggle)": (
        ["New (Augmented)/New (Augmented)/{train,valid}/{a,b}/*2", "New (Augmented)/new/x.csv"],
        "New (Augmented)/New (Augmented)/train",
        "a b",
        "New (Augmented)/New (Augmented)/valid",
        [],
    ),
    "PyTorch's hymenoptera": (["hymenoptera_data/{train,val}/{ants,bees}/*2"], "hymenoptera_data/train", "ants bees",
                              "hymenoptera_data/val", []),
    "test without labels": (["{train,val}/{a,b}/*2", "test/*4"], "train", "a b", "val", ["test/ (4 images; no class folders"]),
    "test in one folder that is no class": (["train/{a,b}/*2", "test/unknown/*4"], "train", "a b", None,
                                            ["test/ (4 images; no class folders"]),
    "a test split of one class": (["train/{a,b}/*2", "test/b/*2"], "train", "a b", "test", []),
    "evaluation goes last": (["{train,dev,eval_set,val}/{a,b}/*1"], "train", "a b", "val", ["dev/", "eval_set/"]),
    "masks beside the splits": (["{train,test}/*2", "train_masks/*2"], "train", "", "test", ["train_masks/ (2 images; not a"]),
    "images beside the splits": (["{train,test}/{a,b}/*2", "cover.jpg"], "train", "a b", "test", ["1 image beside train/"]),
    "a cover beside the wrapper": (["data/{train,test}/{a,b}/*2", "cover.jpg"], "data/train", "a b", "data/test",
                                   ["1 image beside data/"]),
    "train inside train": (["train/train/{a,b}/*2", "test/test/{a,b}/*2"], "train/train", "a b", "test/test", []),
    "train with class folders beside loose images": (["train/{a,b}/*2", "sample/*2"], "train", "a b", None,
                                                     ["sample/ (2 images; not a split)"]),
    "vehicles": (["{bullet_train,steam_train,bus}/*2"], ".", "bullet_train bus steam_train", None, []),
    "valid and invalid": (["{valid,invalid}/*2"], ".", "invalid valid", None, []),
    "a class called test among others": (["{test,a,b,c,d}/*2"], ".", "a b c d test", None, []),
    "class folders of folders": (["{a,b}/{x,y}/*2"], ".", "a b", None, []),
    "a single class with folders of its own": (["dogs/{husky,poodle}/*2"], "dogs", "husky poodle", None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_data_sets_as_people_have_them(name: str, tmp_path: Path) -> None:
    files, train, classes, test, left_out = UNDERSTOOD[name]
    layout = find_layout(walk(make(tmp_path, *files)))
    assert os.path.relpath(layout.train.path, tmp_path) == train
    assert " ".join(folder.name for folder in layout.train.folders if folder.count) == classes
    assert (layout.test and os.path.relpath(layout.test.path, tmp_path)) == test
    assert len(layout.left_out) == len(left_out), layout.left_out
    for words in left_out:
        assert any(words in phrase for phrase in layout.left_out), layout.left_out


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "two folders to train on": (["{Train,train,Test,test}/{0,1}/*1"], ["Train/ and train/", "data.train=Train"]),
    "two folders to test on": (["{train,val,valid}/{0,1}/*1"], ["val/ and valid/", "--set data.test=val"]),
    "public and private test": (["{Training,PublicTest,PrivateTest}/{0,1}/*1"], ["PrivateTest/ and PublicTest/"]),
    "train as a class": (["{bus,plane,train}/*3"], ["train/", "a class like bus/", "--set data.train=."]),
    "train and test among many classes": (
        ["{train,test,a,b,c,d,e}/*2"],
        [
            "train/ and test/ could be splits, or classes like a/",
            "--set data.train=train --set data.test=test",
            "data.train=.",
        ],
    ),
    "train beside other folders of classes": (["{train,more}/{a,b}/*2"], ["a class like more/"]),
    "test beside the classes": (
        ["{cat,dog}/*3", "test/{cat,dog}/*1"],
        ["test/ holds folders", "(cat)", "data.test=test"],
    ),
    "test beside a training folder of another name": (["{photos,test}/{a,b}/*1"], ["data.test=test", "data.train=."]),
    "val alone": (["val/{a,b}/*2"], ["val/ but no folder to train on", "/val"]),
    "val and test alone": (["{val,test}/{a,b}/*2"], ["test/ and val/ but no folder to train on"]),
    "two data sets": (
        ["{one,two}/{train,test}/{a,b}/*1"],
        ["one/ and two/ have training and test folders", "--data", "/one"],
    ),
    "MVTec": (
        ["{bottle,cable,pill}/{train,test}/good/*1"],
        ["bottle/ and cable/ (3 folders in all) have", "train/<class>/"],
    ),
    "an empty test folder": (["train/{a,b}/*2", "test/readme.txt"], ["/test: no image in it", "data.test=none"]),
    "a test folder of archives": (["train/{a,b}/*2", "test/1.tar"], ["no image in it, but 1 tar archive", "tar -xf"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_guessed(name: str, tmp_path: Path) -> None:
    files, words = REFUSED[name]
    top = walk(make(tmp_path, *files))
    with pytest.raises(UsageError) as caught:
        find_layout(top)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_class_called_test_is_named(tmp_path: Path) -> None:
    notes = find_layout(walk(make(tmp_path, "{test,a}/*2"))).notes
    assert notes == ("test/ is taken for a class, as no folder beside it is called train",)


def test_labels_out_of_a_list(tmp_path: Path) -> None:
    make(tmp_path, "train/{n1,n2}/images/*2", "val/images/*3", "test/images/*4", "wnids.txt")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.jpg\tn1\t0\t0\n2.jpg\tn2\t0\t0\n")
    layout = find_layout(walk(tmp_path))
    assert layout.test is not None and layout.test.path == str(tmp_path / "val" / "images")
    assert layout.listed is not None and layout.listed.classes == {"0.jpg": "n1", "2.jpg": "n2"}
    assert layout.left_out == ("test/ (4 images; no class folders, so no labels)",)


def test_a_list_above_the_folder_is_found_but_not_any_further_up(tmp_path: Path) -> None:
    root = (
        make(tmp_path, "k/a/b/c/train/{n01440764,n01443537}/*1", "k/a/b/c/val/ILSVRC2012_val_00000001.JPEG") / "k/a/b/c"
    )
    line = "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    (tmp_path / "LOC_val_solution.csv").write_text(line)
    assert find_layout(walk(root)).listed is None
    (tmp_path / "k" / "LOC_val_solution.csv").write_text(line)
    assert find_layout(walk(root)).listed is not None
