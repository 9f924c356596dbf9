"""Bad steps in a run: counted, survived, and ended where there are too many of them; what is saved meanwhile."""

from __future__ import annotations

import csv
import io
import re

import pytest
import torch
from rich.console import Console

from falcon_fast.errors import DivergedError, TrainingError
from falcon_fast.training import session, trainer
from falcon_fast.training.bad_steps import batch_images
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.records.metrics_file import COLUMNS

from .tiny import QUIET, assert_same_state, continued, poison, rows, start


def column(directory, name) -> dict[int, str]:
    return {int(row[0]): row[COLUMNS.index(name)] for row in rows(directory)}


def printed() -> Console:
    return Console(file=io.StringIO(), width=500)


def kept(directory) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete(directory / "checkpoints")]


def both_views_in(*steps):
    return lambda step, image: (1, 2) if step in steps else ()


def test_one_bad_image_costs_one_step_an_epoch(tmp_path, monkeypatch):
    directory, console = tmp_path / "run", printed()
    poison(monkeypatch, session, lambda step, image: (2,) if image == 600 else ())
    run = start(directory, log__every_steps=1)
    bad = [step for step in range(1, 23) if 600 in run.clock.at(step - 1).indices]
    assert len(bad) == 2
    trainer.train(run, directory, console)
    counts = column(directory, "bad_steps")
    assert counts == {step: str(sum(each <= step for each in bad)) for step in range(1, 23)}
    losses = column(directory, "loss")
    assert [step for step, loss in losses.items() if loss == "nan"] == bad
    text = console.file.getvalue()
    for step in bad:
        assert f"(the last: step {step};" in text and f"--step {step}`" in text
    assert "2 of 22 steps were skipped" in text
    assert all(torch.isfinite(tensor).all() for tensor in run.network.state_dict().values())


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    poison(monkeypatch, session, both_views_in(*range(7, 23)))
    run = start(directory, training__max_bad_steps=4)
    with pytest.raises(DivergedError, match="not finite at steps 7 to 10") as caught:
        trainer.train(run, directory, QUIET)
    text = str(caught.value)
    assert "\n" not in text and caught.value.everywhere
    assert kept(directory) == [5] and "step-00000005" in text
    first = run.clock.at(6)
    assert f"positions {first.positions[0]} to {first.positions[-1]} of epoch 1" in text
    assert all(f"image {image}" in text for image in first.indices[:3]) and "125 more" in text
    assert f"falcon-fast replay {directory} --step 7" in text


def test_fewer_in_a_row_do_not(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    poison(monkeypatch, session, lambda step, image: (1,) if step % 4 else ())
    trainer.train(start(directory, training__max_bad_steps=4), directory, QUIET)
    assert column(directory, "bad_steps")[22] == "17"


def test_nothing_is_saved_after_a_bad_step(tmp_path, monkeypatch):
    """Checkpoints are due at steps 5, 10, 15 and 20; steps 8 to 10 and 18 to 20 are bad."""
    directory, console = tmp_path / "run", printed()
    poison(monkeypatch, session, both_views_in(8, 9, 10, 18, 19, 20))
    trainer.train(start(directory, checkpoint__keep=9), directory, console)
    assert kept(directory) == [5, 15, 22]
    assert re.search(r"no checkpoint is written at step 10.*last 3 steps.*step-00000005", console.file.getvalue())


def test_the_last_step_is_saved_even_if_it_is_bad(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    poison(monkeypatch, session, both_views_in(21, 22))
    run = start(directory)
    trainer.train(run, directory, QUIET)
    assert kept(directory)[-1] == 22
    assert run.learner.bad_steps.tolist() == [2, 2]


def test_a_stop_among_bad_steps_continues_bit_for_bit(tmp_path, monkeypatch):
    poison(monkeypatch, session, both_views_in(2, 6, 7, 8))
    torch.manual_seed(0)
    whole = start(tmp_path / "whole", training__epochs=1)
    trainer.train(whole, tmp_path / "whole", QUIET)

    torch.manual_seed(0)
    directory = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        take = session.Session.stop_agreed
        patch.setattr(session.Session, "stop_agreed", lambda self, step: step == 7 or take(self, step))
        with pytest.raises(session.RunStopped):
            trainer.train(start(directory, training__epochs=1), directory, QUIET)
    assert kept(directory)[-1] == 7
    run = continued(directory, training__epochs=1)
    assert rows(directory) == rows(tmp_path / "whole")
    assert_same_state(run, whole)
    assert run.learner.bad_steps.tolist() == [4, 0]


def test_bad_steps_before_and_after_a_stop_add_up_to_a_row(tmp_path, monkeypatch):
    poison(monkeypatch, session, both_views_in(*range(6, 23)))
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "stop_agreed", lambda self, step: step == 7)
        with pytest.raises(session.RunStopped):
            trainer.train(start(directory), directory, QUIET)
    with pytest.raises(DivergedError, match="steps 6 to 15"):
        continued(directory)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_that_overflow_are_not_saved(tmp_path, optimizer):
    """The gradient of step 1 is finite, but not the weights after it."""
    directory = tmp_path / "run"
    run = start(directory, optimizer__name=optimizer, optimizer__lr=3e38, checkpoint__every_steps=1)
    run.learner.optimizer.param_groups[0]["weight_decay"] = 10.0
    with pytest.raises(TrainingError, match=r"is not finite after step 1: .*lower learning rate") as caught:
        trainer.train(run, directory, QUIET)
    assert "network." in str(caught.value) and kept(directory) == []


def test_the_images_of_a_batch_are_those_that_stand_in_for_bad_ones(tmp_path):
    run = start(tmp_path / "run")
    plan = run.clock.at(4)
    assert batch_images(run, 5, {}) == plan.indices.tolist()
    gone = int(plan.indices[3])
    candidates = run.clock.candidates(plan.epoch, int(plan.positions[3]))
    next(candidates)
    found = batch_images(run, 5, {gone: "unreadable"})
    assert found[3] == next(candidates) and gone not in found
    assert found[:3] + found[4:] == [*plan.indices[:3], *plan.indices[4:]]


def test_the_column_is_in_metrics_csv(tmp_path):
    trainer.train(start(tmp_path / "run", training__epochs=1), tmp_path / "run", QUIET)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert {row["bad_steps"] for row in csv.DictReader(file)} == {"0"}
