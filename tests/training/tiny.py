"""A tiny run on the digits, for tests of the loop and of what surrounds it."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from rich.console import Console

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.records.metrics_file import COLUMNS, TIMINGS
from falcon_fast.training.run import Run, prepare

TINY = {
    "model.width": 4,
    "loss.embedding_dim": 32,
    "loss.num_codes": 64,
    "training.epochs": 2,
    "training.batch_size": 128,
    "log.every_steps": 3,
    "log.evaluate_epochs": 1,
    "checkpoint.every_steps": 5,
}  # 11 steps an epoch

QUIET = Console(quiet=True)


def prepared(**changes):
    settings = TINY | {k.replace("__", "."): v for k, v in changes.items()}
    return prepare(validate(override(load_recipe("digits"), settings)))


def start(directory: Path, **changes):
    run = prepared(**changes)
    create_run_directory(directory, run.config)
    return run


def continued(directory: Path, **changes) -> Run:
    run = prepared(**changes)
    step, seconds = restore(run, directory)
    trainer.train(run, directory, QUIET, step, seconds)
    return run


def rows(directory: Path) -> list[tuple[str, ...]]:
    """metrics.csv without the timings."""
    with (directory / "metrics.csv").open() as file:
        return [tuple(row[c] for c in COLUMNS[: -len(TIMINGS)]) for row in csv.DictReader(file)]


def assert_same_state(a: Run, b: Run) -> None:
    ours, theirs = (
        checkpoint.collect(r.network, r.probe, r.learner.optimizer, r.learner.extra_state()) for r in (a, b)
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def poison(monkeypatch, module, which) -> None:
    """Let `module` (which has `feed_of`) see infinite pixels: `which(step, image)`, the step from 1, says in which views.

    The views are those that a batch of resident images is cut to, so that only this image is not finite.
    """
    original = module.feed_of

    def poisoned(*arguments):
        feed = original(*arguments)

        def views_of(given):
            views, labels = feed.views_of(given)
            images = given.indices.tolist()
            rows = [
                i + (view - 1) * len(images) for i, image in enumerate(images) for view in which(given.step + 1, image)
            ]
            views = views.clone()
            views[rows, :, 3, 3] = torch.inf
            return views, labels

        return feed._replace(views_of=views_of)

    monkeypatch.setattr(module, "feed_of", poisoned)
