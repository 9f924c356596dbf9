"""The quarantine: its list, its limit, and a resumed run that knows it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.loaders.quarantine import Quarantine, load_share
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import ImageArray
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import TemporaryError, UsageError
from falcon_fast.training.run import prepare

from ...fuzz import COUNTS, MIB, fuzz
from ..images import smooth

IMAGES = ImageArray(np.zeros((200, 2, 2, 3), np.uint8))


class Flickering:
    """200 images, of which some cannot be decoded at the moment."""

    def __init__(self, broken: set[int]) -> None:
        self.broken, self.away = broken, False
        self.looked_at: list[int] = []

    def __len__(self) -> int:
        return 200

    def image(self, index: int) -> Image.Image:
        self.looked_at.append(index)
        if self.away:
            raise TemporaryError("the disk is away")
        if index in self.broken:
            raise BadImage("broken, at 5")
        return Image.new("RGB", (2, 2))

    def name(self, index: int) -> str:
        return f"image {index}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_is_listed_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.csv"
    images = Flickering({3, 7})
    first = Quarantine(images, 0.02, path, known={7: "verified"})
    first.add(3, "broken, at 5")
    first.add(3, "again")
    expected = [
        {"image": "7", "file": "image 7", "reason": "verified"},
        {"image": "3", "file": "image 3", "reason": "broken, at 5"},
    ]
    assert rows(path) == expected
    lines: list[str] = []
    again = Quarantine(images, 0.02, path, known={7: "verified"}, say=lines.append)
    assert again.bad == {7: "verified", 3: "broken, at 5"}
    assert rows(path) == expected and lines == [] and images.looked_at == [3]


def test_what_can_be_decoded_again_comes_back_and_leaves_the_list(tmp_path: Path) -> None:
    path, images, lines = tmp_path / "quarantine.csv", Flickering({3, 7, 9}), []
    first = Quarantine(images, 0.02, path)
    for index in (9, 3, 7):
        first.add(index, "broken, at 5")
    images.broken = {7}
    again = Quarantine(images, 0.02, path, say=lines.append)
    assert again.bad == {7: "broken, at 5"} and rows(path) == [
        {"image": "7", "file": "image 7", "reason": "broken, at 5"}
    ]
    assert lines == ["can be decoded again and come back from here on: image 9 and 1 more"]
    images.broken = set()
    assert Quarantine(images, 0.02, path, say=lines.append).bad == {} and not path.exists()
    assert lines[1:] == ["can be decoded again and comes back from here on: image 7"]


def test_a_list_beyond_the_limit_is_no_obstacle_when_the_files_are_good_again(tmp_path: Path) -> None:
    path, images = tmp_path / "quarantine.csv", Flickering(set(range(5)))
    first = Quarantine(images, 0.01, path)
    with pytest.raises(UsageError, match="3 of 200"):
        for index in range(5):
            first.add(index, "broken")
    with pytest.raises(UsageError, match="3 of 200"):
        Quarantine(images, 0.01, path)
    images.broken = set()
    assert Quarantine(images, 0.01, path).bad == {}


def test_a_disk_that_is_away_at_the_second_look_leaves_the_list_alone(tmp_path: Path) -> None:
    path, images = tmp_path / "quarantine.csv", Flickering({3})
    Quarantine(images, 0.01, path).add(3, "broken")
    before, images.away = path.read_bytes(), True
    with pytest.raises(TemporaryError):
        Quarantine(images, 0.01, path)
    assert path.read_bytes() == before


def test_nothing_bad_leaves_no_file(tmp_path: Path) -> None:
    Quarantine(IMAGES, 0.01, tmp_path / "quarantine.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.001, 1), (0.01, 2), (0.02, 4)])
def test_the_limit(fraction: float, allowed: int) -> None:
    quarantine = Quarantine(IMAGES, fraction)
    for index in range(allowed):
        quarantine.add(index, "broken")
    with pytest.raises(UsageError, match=rf"{allowed + 1} of 200 images cannot be decoded.*image {allowed} \(broken\)"):
        quarantine.add(allowed, "broken")


def test_all_bad_is_too_many_whatever_is_allowed() -> None:
    with pytest.raises(UsageError, match="200 of 200"):
        Quarantine(IMAGES, 1.0, known=dict.fromkeys(range(200), "broken"))


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.csv"
    path.write_text("image,file,reason\nseven,x,y\n")
    with pytest.raises(UsageError, match=r"quarantine\.csv is damaged"):
        Quarantine(IMAGES, 0.01, path)


@pytest.mark.parametrize(
    "text",
    [
        b"image,file,reason\n" + b"9" * 5000 + b",x,y\n",
        b"image,file,reason\n\xff,x,y\n",
        b'image,file,reason\n1,"' + b"x" * 200_000 + b'",y\n',
        b"image,file,reason\n" + b'"\n",' * 100_000,
        b"name,file,reason\n1,x,y\n",
    ],
    ids=["a long number", "not UTF-8", "a long cell", "a row without end", "another header"],
)
def test_a_hostile_list_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "quarantine.csv").write_bytes(text)
    with pytest.raises(UsageError, match=r"quarantine\.csv is damaged") as caught:
        Quarantine(IMAGES, 0.5, tmp_path / "quarantine.csv")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.fixture
def still_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a list names cannot be decoded when it is tried again."""
    monkeypatch.setattr(Quarantine, "_decoded_again", lambda self, listed, known: dict(listed))


@pytest.mark.usefixtures("still_bad")
def test_numbers_beyond_the_images_are_ignored_and_reasons_stay_on_a_line(tmp_path: Path) -> None:
    (tmp_path / "quarantine.csv").write_text('image,file,reason\n-1,x,y\n200,x,y\n7,x,"two\nlines \x1b[31m"\n8,cut\n')
    assert Quarantine(IMAGES, 0.5, tmp_path / "quarantine.csv").bad == {7: repr("two\nlines \x1b[31m")}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """The run directory of a stranger may hold a link to any file of the user."""
    (tmp_path / "precious").write_text("image,file,reason\n")
    (tmp_path / "quarantine.csv").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"quarantine\.csv"):
        Quarantine(IMAGES, 0.5, tmp_path / "quarantine.csv").add(3, "broken")
    assert (tmp_path / "precious").read_text() == "image,file,reason\n"


@pytest.mark.usefixtures("still_bad")
@pytest.mark.parametrize("count", COUNTS)
def test_mutations_are_read_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "quarantine.csv"
    quarantine = Quarantine(IMAGES, 0.5, path)
    for index in range(20):
        quarantine.add(index, f"broken at byte {index * 1000}, it says")

    def read() -> None:
        bad = Quarantine(IMAGES, 1.0, path).bad
        assert all(0 <= index < 200 and reason.isprintable() for index, reason in bad.items())

    outcome = fuzz(read, [path], count, name="quarantine.csv", memory=16 * MIB, writes=True)
    assert outcome.refused > count // 10 and outcome.accepted > count // 10


def test_a_share_stops_when_all_is_bad() -> None:
    clock, bad = Clock(0, 200, 50, AUGMENTATIONS["cifar-asymmetric"]), {}

    def load(index: int) -> int:
        raise BadImage("broken")

    found = load_share(clock, clock.at(1), load, bad, 5)
    assert isinstance(found, dict) and len(found) == 6 and found == bad


def test_a_share_names_all_bad_images_that_it_passes_over() -> None:
    clock = Clock(0, 200, 50, AUGMENTATIONS["cifar-asymmetric"])
    plan = clock.at(1)
    first, second, other = plan.indices[[3, 4, 20]].tolist()
    bad = {first: "known", 999: "elsewhere"}

    def load(index: int) -> int:
        if index in (second, other):
            raise BadImage("found")
        return index

    share = load_share(clock, plan, load, bad, 10)
    assert not isinstance(share, dict)
    assert share.met == {first: "known", second: "found", other: "found"} and share.images == share.indices.tolist()
    again = load_share(clock, plan, load, bad, 10)
    assert not isinstance(again, dict) and again.met == share.met


def test_too_many_known_beforehand_are_said_before_a_run_directory_is_made(tmp_path: Path) -> None:
    for i in range(12):
        smooth(20, 20, i).save(tmp_path / f"{i}.png")
    for i in range(2):
        (tmp_path / f"garbage-{i}.jpg").write_bytes(b"garbage")
    settings = {"data.path": str(tmp_path), "training.batch_size": 4, "model.name": "resnet8", "loss.num_codes": 64}
    with pytest.raises(UsageError, match=r"2 of 13 images .*garbage-1\.jpg .*`falcon-fast data verify` names them all"):
        prepare(validate(override(load_recipe("folder"), settings)))
