"""The loop, on the digits with a tiny network: what it writes and when, stopping, and exact resume."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import signal
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_fast.errors import RunStopped
from falcon_fast.hardware import precision
from falcon_fast.training import stepper, trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.records.metrics_file import COLUMNS

from .tiny import QUIET, assert_same_state, continued, prepared, rows, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("whole") / "run"
    run = start(directory)
    trainer.train(run, directory, QUIET)
    return run, directory


def test_rows_are_where_they_should_be(whole):
    _, directory = whole
    found = rows(directory)
    assert [int(row[0]) for row in found] == [3, 6, 9, 11, 12, 15, 18, 21, 22]
    tested = [row for row in found if row[COLUMNS.index("probe_accuracy")]]
    assert [int(row[0]) for row in tested] == [11, 22]
    kept = [p.name for p in checkpoint.complete(directory / "checkpoints")]
    assert kept == ["step-00000020", "step-00000022"]


def test_the_seed_alone_decides_the_run(whole, tmp_path):
    torch.manual_seed(99)  # the caller's random state does not
    torch.randn(5)
    run = start(tmp_path / "run")
    trainer.train(run, tmp_path / "run", QUIET)
    assert rows(tmp_path / "run") == rows(whole[1])
    other = prepared(training__seed=1)
    assert not torch.equal(other.codes.words, run.codes.words)
    assert other.clock.at(0).indices.tolist() != run.clock.at(0).indices.tolist()
    # The random states differ by the caller's seed; everything else is equal.
    ours, theirs = whole[0].network.state_dict(), run.network.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_clock_that_is_set_back_changes_nothing(whole, tmp_path, monkeypatch):
    """Each look at the clock is an hour before the last: durations, rows and checkpoints do not depend on it."""
    now = itertools.count(2e9, -3600.0)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda name=name: next(now) if name == "time" else int(next(now) * 1e9))
    directory = tmp_path / "run"
    run = start(directory, training__epochs=2)
    seconds = trainer.train(run, directory, QUIET)
    assert rows(directory) == rows(whole[1]) and 0 < seconds < 3600
    with (directory / "metrics.csv").open() as file:
        times = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert times == sorted(times) and times[0] > 0
    assert checkpoint.latest(directory).name == "step-00000022"
    assert_same_state(run, whole[0])


class Reads(TorchDispatchMode):
    """Notes the steps after which a number was read from a tensor: on a GPU, the host would wait there."""

    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls, self.after = calls, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.after.add(len(self.calls))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer__clip_norm": 1.0, "optimizer__ema_decay": 0.9, "training__accumulate": 2}]
)
def test_numbers_are_read_where_a_row_is_written_and_nowhere_else(tmp_path, monkeypatch, changes):
    step_function, calls, run = stepper.training_step, [], start(tmp_path / "run", **changes)

    def counted(*arguments):
        calls.append(None)
        return step_function(*arguments)

    monkeypatch.setattr(stepper, "training_step", counted)
    with Reads(calls) as reads:
        trainer.train(run, tmp_path / "run", QUIET)
    # Rows at every third step, tests at the epochs' ends, the finiteness that a checkpoint asks for at every fifth.
    expected = {step for step in range(1, 23) if step % 3 == 0 or step % 5 == 0 or step % 11 == 0}
    assert reads.after - {0} == expected


def test_a_run_stopped_by_a_signal_continues_bit_for_bit(whole, tmp_path, monkeypatch, capfd):
    directory, step_function, calls = tmp_path / "run", stepper.training_step, []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return step_function(*arguments)

    torch.manual_seed(0)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "training_step", stopping)
        with pytest.raises(RunStopped) as stopped:
            trainer.train(start(directory), directory, QUIET)
    assert stopped.value.everywhere
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert len(calls) == 8 and checkpoint.latest(directory).name == "step-00000008"
    assert capfd.readouterr().err.count("stopping after this step") == 1
    run = continued(directory)
    assert rows(directory) == rows(whole[1])
    assert_same_state(run, whole[0])


def test_a_run_that_died_continues_from_its_checkpoint_bit_for_bit(whole, tmp_path, monkeypatch):
    directory, step_function, calls = tmp_path / "run", stepper.training_step, []

    def dying(*arguments):
        calls.append(None)
        if len(calls) == 14:
            raise InterruptedError
        return step_function(*arguments)

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "training_step", dying)
        with pytest.raises(InterruptedError):
            trainer.train(start(directory), directory, QUIET)
    assert checkpoint.latest(directory).name == "step-00000010"
    assert rows(directory)[-1][0] == "12"  # past the checkpoint: replaced on resume
    run = continued(directory)
    assert rows(directory) == rows(whole[1])
    assert_same_state(run, whole[0])


def test_learning_and_temperature_are_the_runs_own(whole):
    run, directory = whole
    assert run.criterion.tau == run.config.tau
    rates = [float(row[COLUMNS.index("lr")]) for row in rows(directory)]
    assert rates == sorted(rates, reverse=True) and rates[0] < run.config.optimizer.lr


EVERYTHING = {
    "training__precision": "fp16",
    "training__accumulate": 2,
    "optimizer__name": "lars",
    "optimizer__clip_norm": 1.0,
    "optimizer__ema_decay": 0.8,
    "training__epochs": 1,
    "checkpoint__keep": 10,
}


def test_scale_average_and_micro_batches_continue_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "native_float16", lambda: True)  # slow elsewhere, but the same numbers
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, growth_interval=4))
    torch.manual_seed(0)
    whole = start(tmp_path / "whole", **EVERYTHING)
    trainer.train(whole, tmp_path / "whole", QUIET)
    assert (
        whole.learner.scaler.get_scale() != 2.0**16
    )  # it began too high: some steps were skipped, which stopped nothing
    for step in (10, 11):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / f"step-{step:08d}")
    assert checkpoint.latest(tmp_path / "whole").name == "step-00000005"
    before = rows(tmp_path / "whole")
    run = continued(tmp_path / "whole", **EVERYTHING)
    assert_same_state(run, whole)
    assert rows(tmp_path / "whole") == before
    assert rows(tmp_path / "whole")[-1][COLUMNS.index("grad_norm")]


def test_an_average_changes_nothing_of_what_is_learnt(whole, tmp_path):
    torch.manual_seed(0)
    run = start(tmp_path / "run", optimizer__ema_decay=0.8)
    trainer.train(run, tmp_path / "run", QUIET)
    ours, theirs = whole[0].network.state_dict(), run.network.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
