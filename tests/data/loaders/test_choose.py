"""The door: which loader a run gets, what is refused, and that a run does not depend on how far it had come."""

from __future__ import annotations

import csv
import secrets
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from falcon_fast.config import DataConfig, load_recipe, override, validate
from falcon_fast.data.loaders import choose as loader
from falcon_fast.data.loaders import dali
from falcon_fast.data.loaders.choose import choose_loader, training_batches
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.data.sources.open_source import open_source
from falcon_fast.data.views.augmentation import AUGMENTATIONS, augmentation
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import stepper, trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import LATER_FACTS, restore
from falcon_fast.training.run import Run, prepare

from ..images import CPU, damage, joined, same, smooth

CROPS = AUGMENTATIONS["imagenet-asymmetric"]
CUDA = torch.device("cuda")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 JPEGs of 100 x 80 in two classes."""
    for i in range(40):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(100, 80, i).save(path)
    return tmp_path / "photos"


@pytest.fixture
def photos(folder: Path) -> Source:
    return open_source(DataConfig(path=str(folder), size=24))


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConfig(source="digits"))


def chosen(source: Source, device: torch.device = CPU, recipe: str = "imagenet-asymmetric", **config: object) -> str:
    name, notes = choose_loader(DataConfig(**config), source, augmentation(recipe), device)  # type: ignore[arg-type]
    assert notes == ()
    return name


@pytest.mark.parametrize("extension", [True, False])
def test_auto_takes_the_fastest_that_works(
    photos: Source, digits: Source, image_folder: Path, monkeypatch: pytest.MonkeyPatch, extension: bool
) -> None:
    monkeypatch.setattr(loader, "cpu_extension", object() if extension else None)
    assert chosen(photos) == ("resident" if extension else "dali")  # 40 images of 24 KB fit anywhere
    assert chosen(photos, resident_mib=0) == "dali"
    assert chosen(photos, CUDA) == "resident"
    assert chosen(digits, recipe="digits") == "resident"
    assert chosen(digits, recipe="digits", resident_mib=0) == "workers"
    assert chosen(open_source(DataConfig(path=str(image_folder))), resident_mib=0) == "dali"
    large = Source(
        Split(ImageArray(np.zeros((9, 64, 64, 3), np.uint8)), None), photos.test, (), 64, (0.5,) * 3, (0.5,) * 3, "x"
    )
    assert chosen(large) == ("resident" if extension else "workers")
    assert chosen(large, resident_mib=0) == "workers" and chosen(large, CUDA) == "resident"


def test_a_name_is_kept(photos: Source, digits: Source) -> None:
    for name in ("dali", "resident", "workers", "synthetic"):
        assert chosen(photos, loader=name) == name
    for name in ("resident", "workers", "synthetic"):
        assert chosen(digits, recipe="digits", loader=name) == name


def test_what_a_loader_cannot_do_is_refused_in_a_line(photos: Source, digits: Source) -> None:
    with pytest.raises(UsageError, match=r"resident_mib 0: raise it"):
        chosen(photos, loader="resident", resident_mib=0)
    with pytest.raises(UsageError, match="affine maps: use --loader resident"):
        chosen(digits, recipe="digits", loader="dali")
    with pytest.raises(UsageError, match="lie in memory: use --loader resident"):
        chosen(digits, recipe="cifar-asymmetric", loader="dali")
    with pytest.raises(UsageError, match=r"data\.loader 'dalli': did you mean 'dali'"):
        validate(override(load_recipe("folder"), {"data.loader": "dalli"}))


def test_a_dali_that_cannot_start_is_said_and_replaced(photos: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(resident_mib=0)
    if not torch.cuda.is_available():
        name, (note,) = choose_loader(config, photos, CROPS, CUDA)
        assert name == "workers" and "DALI cannot start" in note and "\n" not in note
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    name, (note,) = choose_loader(config, photos, CROPS, CPU)
    assert name == "workers" and "DALI cannot start (" in note and "\n" not in note
    assert "pip install nvidia-dali-cuda130" in note
    with pytest.raises(UsageError, match=r"DALI cannot start: .*; use --loader workers"):
        choose_loader(DataConfig(loader="dali"), photos, CROPS, CPU)
    monkeypatch.undo()
    assert dali.why_not(CPU) is None


@pytest.mark.parametrize("name", ["dali", "resident", "workers", "synthetic"])
def test_any_start_and_any_number_of_ranks(name: str, photos: Source) -> None:
    clock = Clock(3, 36, 8, CROPS)
    whole = list(training_batches(name, photos, clock, range(10), CPU, workers_count=1))
    assert [batch.step for batch in whole] == list(range(10))
    assert all(batch.views.shape == (16, 3, 24, 24) for batch in whole)
    start = secrets.randbelow(9) + 1
    later = list(training_batches(name, photos, clock, range(start, 10), CPU, workers_count=0))
    assert len(later) == 10 - start and all(map(same, whole[start:], later)), start
    for world in (2, 4):
        ranks = [
            training_batches(name, photos, clock, range(2, 5), CPU, workers_count=0, rank=r, world_size=world)
            for r in range(world)
        ]
        for batch, *parts in zip(whole[2:5], *ranks, strict=True):
            together = joined(parts)
            # Synthetic pixels show nothing, so nobody needs them to be the same.
            assert same(together._replace(views=batch.views) if name == "synthetic" else together, batch)


def test_all_loaders_show_the_same(photos: Source) -> None:
    clock = Clock(3, 36, 12, CROPS)
    loaders = [
        training_batches(name, photos, clock, range(4), CPU, workers_count=0)
        for name in ("workers", "dali", "resident")
    ]
    for reference, *others in zip(*loaders, strict=True):
        assert all(same(other, reference) for other in others)


# ---- runs ----

TINY = {
    "model.name": "resnet8",
    "model.width": 4,
    "loss.embedding_dim": 16,
    "loss.num_codes": 32,
    "optimizer.warmup_epochs": 0.0,
    "training.epochs": 2,
    "training.batch_size": 12,
    "log.every_steps": 1,
    "log.evaluate_epochs": 0,
    "checkpoint.every_steps": 2,
    "data.size": 16,
}


def run_of(folder: Path, name: str, **changes: object) -> Run:
    settings = (
        TINY | {"data.path": str(folder), "data.loader": name} | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return prepare(validate(override(load_recipe("folder"), settings)))


def losses(directory: Path) -> list[str]:
    with (directory / "metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["dali", "resident", "workers"])
def test_a_run_with_a_bad_file_resumes_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    victim = Path(open_source(DataConfig(path=str(folder))).train.images.name(0))
    healthy = victim.read_bytes()
    damage(victim, "zeroed")
    lines: list[str] = []

    class Listening(Console):
        def print(self, *objects: object, **_: object) -> None:
            lines.append(str(objects[0]))

    def train(directory: Path, stop_after: int | None) -> None:
        torch.manual_seed(0)
        run = run_of(folder, name)
        if directory.exists():
            step, seconds = restore(run, directory)
        else:
            create_run_directory(directory, run.config)
            step, seconds = 0, 0.0
        original, count = stepper.training_step, 0

        def counted(*arguments: object):
            nonlocal count
            count += 1
            if stop_after is not None and count > stop_after:
                raise InterruptedError
            return original(*arguments)  # type: ignore[arg-type]

        stepper.training_step = counted  # type: ignore[assignment]
        try:
            trainer.train(run, directory, Listening(quiet=True), step, seconds)
        except InterruptedError:
            pass
        finally:
            stepper.training_step = original

    train(tmp_path / "whole", None)
    assert sum("set aside" in line and str(victim) in line for line in lines) == 1
    listed = (tmp_path / "whole" / "quarantine.csv").read_text()
    assert str(victim) in listed and len(listed.splitlines()) == 2
    train(tmp_path / "broken", 5)  # past the checkpoint of step 4: the whole first epoch has been seen
    victim.write_bytes(healthy)  # mended in between: it stays aside until the next run
    train(tmp_path / "broken", None)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    assert (tmp_path / "broken" / "quarantine.csv").read_text() == listed


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"training__seed": 1}, "seed"),
        ({"training__batch_size": 9}, "global batch"),
        ({"data__augmentation": "symmetric"}, "augmentation"),
        ({"data__size": 12}, "view size"),
    ],
)
def test_resuming_something_else_is_refused_by_its_name(changes: dict, what: str, folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, "workers", training__epochs=0)
    create_run_directory(tmp_path / "run", run.config)
    trainer.train(run, tmp_path / "run", Console(quiet=True))
    assert restore(run_of(folder, "resident", training__epochs=0), tmp_path / "run") == (
        0,
        pytest.approx(0, abs=60),
    )
    with pytest.raises(UsageError, match=f"its {what} was"):
        restore(run_of(folder, "workers", training__epochs=0, **changes), tmp_path / "run")
    # Other files.
    smooth(50, 50).save(folder / "a" / "new.jpg")
    with pytest.raises(UsageError, match="its data was"):
        restore(run_of(folder, "workers", training__epochs=0), tmp_path / "run")


def test_checkpoints_from_before_these_facts_still_resume(folder: Path, tmp_path: Path, monkeypatch) -> None:
    run = run_of(folder, "workers", training__epochs=0)
    create_run_directory(tmp_path / "run", run.config)
    trainer.train(run, tmp_path / "run", Console(quiet=True))
    facts = checkpoint.read_facts(checkpoint.latest(tmp_path / "run"))
    old = {k: v for k, v in facts.items() if k not in LATER_FACTS}
    monkeypatch.setattr(checkpoint, "read_facts", lambda path: old)
    assert restore(run, tmp_path / "run")[0] == 0
