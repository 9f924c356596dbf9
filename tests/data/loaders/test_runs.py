"""Runs over each loader: a bad file is set aside, and a run resumes bit for bit, on the same data only."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from falcon_fast.config import DataConfig, load_recipe, override, validate
from falcon_fast.data.sources.listing import NAME as LISTING
from falcon_fast.data.sources.opening import open_source
from falcon_fast.errors import UsageError
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import stepper, trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import LATER_FACTS, restore
from falcon_fast.training.run import Run, prepare

from ..dali import DALI
from ..images import damage, smooth

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


def run_of(folder: Path, name: str, listing: Path | None = None, **changes: object) -> Run:
    settings = (
        TINY | {"data.path": str(folder), "data.loader": name} | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return prepare(validate(override(load_recipe("folder"), settings)), listing=listing)


def losses(directory: Path) -> list[str]:
    with (directory / "metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", [DALI, "resident", "workers"])
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
        run = run_of(folder, name, directory / LISTING if directory.exists() else None)
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
    shutil.copytree(tmp_path / "broken", tmp_path / "mended")
    shutil.copytree(tmp_path / "broken", tmp_path / "gone")
    train(tmp_path / "broken", None)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    assert (tmp_path / "broken" / "quarantine.csv").read_text() == listed
    # Deleted while the run was stopped: it is as bad as before.
    victim.unlink()
    train(tmp_path / "gone", None)
    assert losses(tmp_path / "gone") == losses(tmp_path / "whole")
    assert (tmp_path / "gone" / "quarantine.csv").read_text().endswith("no such file\n")
    # Mended while the run was stopped: it comes back.
    victim.write_bytes(healthy)
    lines.clear()
    train(tmp_path / "mended", None)
    assert sum("can be decoded again" in line and str(victim) in line for line in lines) == 1
    assert losses(tmp_path / "mended")[:4] == losses(tmp_path / "whole")[:4] and len(losses(tmp_path / "mended")) == 6
    assert not (tmp_path / "mended" / "quarantine.csv").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"training__seed": 1}, "training.seed: 0 -> 1"),
        ({"training__batch_size": 9}, "training.batch_size: 12 -> 9"),
        ({"data__augmentation": "symmetric"}, 'data.augmentation: "imagenet-asymmetric" -> "symmetric"'),
        ({"data__size": 12}, "data.size: 16 -> 12"),
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
    with pytest.raises(UsageError, match=re.escape(what)):
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
