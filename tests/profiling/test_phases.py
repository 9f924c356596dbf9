"""The phases of steps: by a fake clock, and of real steps on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.profiling import phases
from falcon_fast.training.inputs import feed_of, photometric_of, quarantine_of
from falcon_fast.training.run import Run, prepare

from ..processes import in_processes

TINY = {"model.width": 4, "loss.embedding_dim": 32, "loss.num_codes": 64, "training.batch_size": 16}


def prepared(processes=None, **changes) -> Run:
    settings = TINY | {k.replace("__", "."): v for k, v in changes.items()}
    return prepare(validate(override(load_recipe("digits"), settings)), processes)


def steps_of(run: Run, count: int) -> phases.Steps:
    said = print
    needed = range(phases.needed(run, count))
    return phases.Steps(run, feed_of(run, needed, quarantine_of(run, said), photometric_of(run, said)))


def test_stamps_make_phases(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 13.5, 14.0, 20.0, 21.0, 24.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))
    watch = phases.Watch(torch.device("cpu"))
    watch.step()  # 10
    watch.enter("forward")  # 11
    watch.enter("loss")  # 13
    watch.enter("forward")  # 13.5: a second micro-batch
    watch.enter("backward")  # 14
    watch.step()  # 20
    watch.enter("forward")  # 21
    watch.step()  # 24
    assert watch.seconds() == [
        {"data": 1.0, "forward": 2.5, "loss": 0.5, "backward": 6.0},
        {"data": 1.0, "forward": 3.0},
    ]


def test_on_a_gpu_stamps_are_events_of_the_runs_stream(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"
            Event.clock += 2.0
            self.at = Event.clock

        def elapsed_time(self, other):  # milliseconds
            return other.at - self.at

    capturing = [False]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    watch = phases.Watch(torch.device("cuda", 1))
    watch.step()
    watch.enter("forward")
    capturing[0] = True
    watch.enter("loss")  # inside a graph: no event there
    capturing[0] = False
    watch.step()
    assert watch.seconds() == [{"data": 0.002, "forward": 0.002}]


def test_phases_of_real_steps_are_all_of_them():
    run = prepared(optimizer__ema_decay=0.5)
    found = phases.measure(run, steps_of(run, 10), 10)
    assert list(found.phases) == ["data", "photometric", "forward", "loss", "backward", "optimizer"]
    assert all(seconds > 0 for seconds in found.phases.values())
    assert sum(found.phases.values()) == pytest.approx(found.step)
    assert len(found.steps) == 10 and min(found.steps) <= found.step <= max(found.steps)
    assert found.host is None and found.memory > 2**20
    modules = (run.learner.network, run.learner.criterion)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not run.learner.optimizer._optimizer_step_pre_hooks


def test_the_steps_are_those_of_training():
    """Watched and plain, the same steps of the same seed give the same weights."""
    plain, watched = prepared(training__accumulate=2), prepared(training__accumulate=2)
    steps = steps_of(plain, 0)
    for _ in range(phases.WARM_UP + 3):
        steps.take()
    phases.measure(watched, steps_of(watched, 3), 3)
    ours, theirs = plain.network.state_dict(), watched.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_be_told_apart_is_one_phase(monkeypatch):
    run = prepared()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: hooked[0])
    hooked = [False]
    take = phases.training_step

    def compiled(*arguments):
        hooked[0] = True  # as if all of the step were one graph
        result = take(*arguments)
        hooked[0] = False
        return result

    monkeypatch.setattr(phases, "training_step", compiled)
    found = phases.measure(run, steps_of(run, 3), 3)
    assert list(found.phases) == ["data", "photometric", "forward, loss, backward, optimizer"]
    assert phases._told_apart({"forward": 1.0, "optimizer": 2.0}) == {"forward, loss, backward": 1.0, "optimizer": 2.0}


class Scripted:
    """Steps of given lengths by a fake clock; each of four phases takes a quarter of a step."""

    def __init__(self, monkeypatch, seconds: list[float]) -> None:
        self._now, self._seconds = 0.0, iter(seconds)
        monkeypatch.setattr(phases.time, "perf_counter", lambda: self._now)

    def take(self, watch=None, synchronised=True) -> float:
        quarter = next(self._seconds) / 4
        for phase in ("data", "forward", "loss", "backward"):
            if watch:
                watch.step() if phase == "data" else watch.enter(phase)
            self._now += quarter
        return 3 * quarter


def test_only_steps_after_the_warm_up_are_timed(monkeypatch):
    """Warm-up steps take 1000 s. The means leave out the steps below the 20th and above the 80th percentile."""
    timed = [4.0, 1.0, 8.0, 100.0, 2.0, 6.0, 3.0, 9.0, 7.0, 5.0]
    run = prepared()
    found = phases.measure(run, Scripted(monkeypatch, [1000.0] * phases.WARM_UP + timed), len(timed))
    assert found.steps == pytest.approx(timed)
    middle = sum(x for x in timed if 2.0 <= x <= 9.0) / 8
    assert found.step == pytest.approx(middle)
    assert found.phases == pytest.approx(dict.fromkeys(("data", "forward", "loss", "backward"), middle / 4))


def test_percentiles_are_of_the_values():
    assert phases.spread([5.0]) == (5.0, 5.0)
    assert phases.spread([float(x) for x in range(11)]) == (2.0, 8.0)


def _ddp(rank, world):
    import torch.distributed as dist

    from falcon_fast.training.distributed.processes import Processes

    control = dist.new_group(backend="gloo")
    run = prepared(Processes(rank, world, rank, dist.group.WORLD, control, 60, "ddp"))
    found = phases.measure(run, steps_of(run, 4), 4)
    return found.phases, found.step


def test_communication_is_a_part_of_the_backward_pass(tmp_path: Path):
    for found, step in in_processes(_ddp, 2, tmp_path):
        assert list(found) == list(phases.PHASES)
        assert all(seconds >= 0 for seconds in found.values())
        assert sum(found.values()) == pytest.approx(step)
