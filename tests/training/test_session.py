"""What surrounds the steps: tests of the test split, and the switches of precision."""

from __future__ import annotations

import copy
import csv
import signal

import pytest
import torch

from falcon_fast.hardware import threads
from falcon_fast.runs.results import load_trained
from falcon_fast.training import session, stepper, trainer
from falcon_fast.training.distributed import signals

from .tiny import QUIET, start


def test_the_loop_follows_the_load_and_records_the_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_threads", lambda: 2)
    busy = iter([2.0, 2.0, 2.0, *[0.0] * 1000])
    # What other programs keep busy, after each step; tests/hardware measures it.
    monkeypatch.setattr(threads.AdaptiveThreads, "check", lambda self: self._follow(next(busy)))
    before, directory = torch.get_num_threads(), tmp_path / "run"
    torch.set_num_threads(2)
    try:
        with threads.following_load(torch.device("cpu"), 0, False, lambda _: None):
            trainer.train(start(directory, log__every_steps=1), directory, QUIET)
    finally:
        torch.set_num_threads(before)
    with (directory / "metrics.csv").open(newline="") as file:
        assert [row["threads"] for row in csv.DictReader(file)][:6] == ["2", "1", "1", "1", "1", "2"]


def test_what_is_tested_and_kept_is_the_average(tmp_path, monkeypatch):
    judged = []
    test = session.measure_on_test_split
    monkeypatch.setattr(
        session, "measure_on_test_split", lambda *a: judged.append(copy.deepcopy(a[1].state_dict())) or test(*a)
    )
    directory = tmp_path / "run"
    run = start(directory, training__epochs=1, optimizer__ema_decay=0.8)
    trainer.train(run, directory, QUIET)
    average = run.learner.average.state()
    (seen,) = judged
    kept = load_trained(directory, "cpu").network.state_dict()
    for name, tensor in average.items():
        assert torch.equal(seen[name], tensor) and torch.equal(kept[name], tensor), name
    weight = "projector.linear.weight"
    assert not torch.equal(average[weight], run.network.state_dict()[weight])


def test_switches_of_precision_are_the_runs_alone(tmp_path, monkeypatch):
    seen, step_function = [], stepper.training_step

    def watching(*arguments):
        seen.append(torch.backends.cudnn.allow_tf32)
        return step_function(*arguments)

    monkeypatch.setattr(stepper, "training_step", watching)
    before = torch.backends.cudnn.allow_tf32
    run = start(tmp_path / "run", training__epochs=1, training__precision="float32")
    trainer.train(run, tmp_path / "run", QUIET)
    assert set(seen) == {False} and torch.backends.cudnn.allow_tf32 == before


def test_what_is_open_is_closed_if_the_rest_cannot_be_opened(tmp_path, monkeypatch):
    def failing(self):
        raise OSError(5, "Input/output error")

    run, before = start(tmp_path / "run"), [signal.getsignal(number) for number in signals.REQUESTS]
    monkeypatch.setattr(session.TrainingDisplay, "__enter__", failing)
    with pytest.raises(OSError, match="Input/output"):
        trainer.train(run, tmp_path / "run", QUIET)
    assert [signal.getsignal(number) for number in signals.REQUESTS] == before
