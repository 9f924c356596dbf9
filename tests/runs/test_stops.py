"""Runs that are stopped at random moments, in every way, and continued until they are finished: nothing is lost."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file

from falcon_fast.runs.lock import NAME as LOCK
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.records.metrics_file import COLUMNS, TIMINGS

from ..host import Host, children, torchrun_variables

# 16 steps in 8 epochs of 36 images.
SETTINGS = {
    "model.name": "resnet8",
    "model.width": 4,
    "loss.num_codes": 64,
    "loss.embedding_dim": 32,
    "training.epochs": 8,
    "training.batch_size": 18,
    "training.device": "cpu",
    "training.seed": 1,
    "training.precision": "float32",
    "training.timeout": 60,
    "data.size": 16,
    "log.every_steps": 1,
    "log.evaluate_epochs": 4,
    "log.tensorboard": "false",
    "checkpoint.every_steps": 2,
}
TINY = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
STEPS = 16


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("host")) as running:
        yield running


def launch(host: Host, world: int, images: Path, run: Path, log: Path, *arguments: object) -> list[int]:
    """Start a run, or continue it, in `world` processes."""
    command = ["train", "--data", images, *TINY, "--continue", "--run-dir", run, *arguments]
    if world == 1:
        return [host.start(command, log)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [host.start(command, log, environment=torchrun_variables(rank, world, port)) for rank in range(world)]


def ended(host: Host, processes: list[int], log: Path, seconds: float = 120) -> list[int | None]:
    codes = [host.wait(each, seconds) for each in processes]
    if None in codes:
        for each in processes:
            subprocess.run(["kill", "-KILL", f"-{each}"], stderr=subprocess.DEVNULL)
        raise AssertionError(f"{codes}: still running after {seconds} s: {log.read_text()}")
    return codes


class Figures(NamedTuple):
    """What a finished run is judged by."""

    rows: list[tuple[str, ...]]  # metrics.csv without the timings
    result: dict[str, Any]  # result.json without the timings
    backbone: dict[str, bytes]
    checkpoints: dict[str, dict[str, bytes]]  # the newest


def figures(run: Path) -> Figures:
    with (run / "metrics.csv").open() as file:
        rows = [tuple(row[c] for c in COLUMNS[: -len(TIMINGS)]) for row in csv.DictReader(file)]
    result = json.loads((run / "result.json").read_text())
    # The newest alone: the one before it may be that of a stop, at another step.
    # By the names of the tensors: which process writes which of those that all hold is not part of the result.
    shards = {
        path.name: {
            name: array.tobytes()
            for shard in sorted(path.glob("*.safetensors"))
            for name, array in load_file(shard).items()
        }
        for path in sorted((run / "checkpoints").iterdir())[-1:]
    }
    backbone = {name: array.tobytes() for name, array in load_file(run / "backbone.safetensors").items()}
    return Figures(
        rows, {k: v for k, v in result.items() if k not in ("seconds", "images_per_second")}, backbone, shards
    )


def wait_for(path: Path, text: str, processes: list[int], seconds: float = 60) -> None:
    """Wait until a file contains `text`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"no {text!r}: {path.read_text() if path.exists() else ''}")


# ---- a handful, always ----


@pytest.mark.parametrize(
    ("moment", "number", "line"),
    [
        ("recipe folder", signal.SIGTERM, "stopped"),
        ("evaluating raw pixels", signal.SIGINT, "stopped; continue with: falcon-fast train --resume"),
        ("evaluating the trained network", signal.SIGUSR1, "stopped; continue with: falcon-fast train --resume"),
    ],
    ids=["first step", "final evaluation", "its end"],
)
def test_a_stop_ends_with_130_and_one_line_and_the_run_goes_on(host, images, tmp_path, moment, number, line):
    run, log = tmp_path / "run", tmp_path / "log"
    (process,) = launch(host, 1, images, run, log)
    wait_for(log, moment, [process])
    os.kill(process, number)
    assert ended(host, [process], log) == [130]
    last = log.read_text().splitlines()[-1]
    assert last.startswith(line) and "Traceback" not in log.read_text()
    assert not list(run.rglob(".*")) and not (run / "result.json").exists() and host.orphans() == []
    assert ended(host, launch(host, 1, images, run, log), log) == [0], log.read_text()
    assert [row[0] for row in figures(run).rows] == [str(step) for step in range(1, STEPS + 1)]


def test_a_killed_worker_is_one_line_and_exit_code_75(host, images, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ("--loader", "workers", "--set", "data.workers=1", "--set", "training.epochs=5000")
    (process,) = launch(host, 1, images, run, log, *arguments)
    wait_for(run / "checkpoints" / "step-00000002" / "run.json", "step", [process])
    (worker,) = children(process)
    os.kill(worker, signal.SIGKILL)
    assert ended(host, [process], log) == [75]
    last = log.read_text().splitlines()[-1]
    # torch notices it by a signal or, if it waits for a batch just then, by looking.
    assert f"worker with process number {worker} " in last and "memory ran out" in last
    assert "Traceback" not in log.read_text()
    assert str(checkpoint.latest(run)) in last and host.orphans() == []


def test_workers_end_with_a_killed_trainer_and_leave_no_shared_memory(host, images, tmp_path):
    run, log, before = tmp_path / "run", tmp_path / "log", set(os.listdir("/dev/shm"))  # noqa: PTH208
    arguments = ("--loader", "workers", "--set", "data.workers=2", "--set", "training.epochs=5000")
    (process,) = launch(host, 1, images, run, log, *arguments)
    wait_for(run / "metrics.csv", "\n3,", [process])
    assert len(children(process)) == 2
    os.kill(process, signal.SIGKILL)
    assert ended(host, [process], log) == [-9] and host.orphans() == []
    assert set(os.listdir("/dev/shm")) <= before  # noqa: PTH208


def test_a_run_whose_directory_is_taken_away_ends_with_a_line(host, images, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    (process,) = launch(host, 1, images, run, log, "--set", "training.epochs=5000")
    wait_for(run / "metrics.csv", "\n7,", [process])
    run.rename(tmp_path / "elsewhere")
    assert ended(host, [process], log) == [74]
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: ") and str(run) in last and "put it back" in last
    assert not run.exists()  # nothing makes a second one that has a part of the run
    (tmp_path / "elsewhere").rename(run)
    (process,) = launch(host, 1, images, run, log, "--set", "training.epochs=5000")
    wait_for(log, "from step", [process])
    os.kill(process, signal.SIGTERM)
    assert ended(host, [process], log) == [130]


@pytest.mark.slow
def test_a_run_goes_on_after_a_minute_without_time(host, images, tmp_path):
    """SIGSTOP for a minute to one of two processes, to the data worker of another run, and to a third run as a whole."""
    workers = ("--loader", "workers", "--set", "data.workers=1", "--set", "training.timeout=600")
    runs = {name: (tmp_path / name, tmp_path / f"log-{name}") for name in ("two", "worker", "whole")}
    processes = {name: launch(host, 1 + (name == "two"), images, *runs[name], *workers) for name in runs}
    paused = {}
    for name, (run, _) in runs.items():
        wait_for(run / "metrics.csv", "\n3,", processes[name])
        paused[name] = children(processes[name][0])[:1] if name == "worker" else processes[name][-1:]
        for each in paused[name]:
            os.kill(each, signal.SIGSTOP)
    assert all(paused.values()), "a run was over before it could be stopped"
    time.sleep(60)
    for name, (run, _) in runs.items():
        assert not (run / "result.json").exists(), f"{name} was not stopped"
        for each in paused[name]:
            os.kill(each, signal.SIGCONT)
    for name, (_, log) in runs.items():
        assert ended(host, processes[name], log) == [0] * len(processes[name]), log.read_text()
    assert figures(runs["worker"][0]) == figures(runs["whole"][0])


# ---- a hundred, behind `slow` ----

STOPS = 100
KINDS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGINT twice", "SIGKILL", "SIGSTOP", "worker SIGKILL")
PER_RUN = 5  # stops of one run; then it may finish


def stop(kind: str, victims: list[int]) -> bool:
    """Stop these processes. Returns whether a signal was sent."""
    sent = False
    for process in victims:
        try:
            if kind == "worker SIGKILL":
                workers = [each for each in children(process) if "falcon" not in Path(f"/proc/{each}/comm").read_text()]
                for worker in workers[:1]:
                    os.kill(worker, signal.SIGKILL)
                    sent = True
                continue
            name = kind.split()[0]
            os.kill(process, getattr(signal, name))
            sent = True
            if kind == "SIGINT twice":
                time.sleep(0.02)
                os.kill(process, signal.SIGINT)
        except (ProcessLookupError, FileNotFoundError):
            pass
    if kind == "SIGSTOP":
        time.sleep(1.0)
        for process in victims:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
    return sent


def reach_a_moment(draw: random.Random, run: Path, log: Path, before: int) -> None:
    """Wait for a random moment of a run: while it starts, after some more steps, while it saves, or while it evaluates.

    before: the length of the log when the run was started.
    """

    def rows() -> int:
        return len((run / "metrics.csv").read_text().splitlines()) if (run / "metrics.csv").exists() else 0

    where = draw.choices(("starting", "training", "saving", "evaluating"), (2, 4, 2, 2))[0]
    pause, target = draw.uniform(0.0, 0.5), rows() + draw.randint(1, 6)
    end = time.monotonic() + (pause if where == "starting" else 30)
    while time.monotonic() < end and not (run / "result.json").exists():
        if where == "training" and rows() >= target:
            return
        if where == "saving" and rows() > 1 and list(run.glob("checkpoints/.step-*.partial")):
            return
        if where == "evaluating" and log.exists() and "evaluating" in log.read_text()[before:]:
            time.sleep(pause / 2)
            return
        time.sleep(0.002)


def moment_of(run: Path, log: str) -> str:
    """Where a run was when it was stopped, from what it had written by then."""
    if (run / "result.json").exists():
        return "end"
    if "evaluating" in log:
        return "evaluating"
    if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > 1:
        return "saving" if list(run.rglob(".step-*.partial")) else "training"
    return "first step" if "recipe folder" in log else "starting"


@pytest.mark.slow
def test_a_hundred_stops_lose_nothing(host, images, tmp_path):
    """Every kind of stop at random moments of runs of one and two processes; each run is continued until it is finished."""
    expected, duration = {}, {}
    for world in (1, 2):
        for name in ("warm", f"undisturbed-{world}"):
            log, started = tmp_path / f"log-{name}-{world}", time.monotonic()
            run = tmp_path / f"{name}-{world}"
            assert ended(host, launch(host, world, images, run, log), log) == [0] * world, log.read_text()
            duration[world] = time.monotonic() - started
        expected[world] = figures(run)
        assert figures(tmp_path / f"warm-{world}") == expected[world]
    draw, table, stops, number = random.Random(14), Counter(), 0, 0
    while stops < STOPS:
        world = 1 + number % 2
        run, log = tmp_path / f"run-{number}", tmp_path / f"log-{number}"
        workers = ("--loader", "workers", "--set", "data.workers=1") if number % 4 >= 2 else ()
        for _ in range(PER_RUN):
            kind = draw.choice(KINDS if workers else KINDS[:-1])
            before = len(log.read_text()) if log.exists() else 0
            kept = checkpoint.complete(run / "checkpoints")
            processes = launch(host, world, images, run, log, *workers)
            reach_a_moment(draw, run, log, before)
            victims = processes if draw.random() < 0.5 else [draw.choice(processes)]
            moment = moment_of(run, log.read_text()[before:])
            sent = stop(kind, victims)
            codes = ended(host, processes, log)
            text = log.read_text()[before:]
            assert "Traceback" not in text, (kind, moment, world, text)
            assert host.orphans() == [], (kind, moment, world)
            assert len(checkpoint.complete(run / "checkpoints")) >= len(kept)
            finished = (run / "result.json").exists()
            if sent and moment != "end":
                stops += 1
                code = "/".join(map(str, sorted({c for c in codes if c is not None})))
                table[(kind, moment, world, code)] += 1
                print(f"{stops:3} {kind:15} {moment:11} {world} {len(victims)} {code}", flush=True)
                allowed = {0} if finished or kind == "SIGSTOP" else set()
                if (world, moment) == (2, "evaluating"):  # process 0 evaluates, and the other one may be done
                    allowed |= {0}
                allowed |= {
                    "SIGKILL": {-9, 1, 0},
                    "worker SIGKILL": {75, 1, 0},
                    "SIGSTOP": {0},
                }.get(kind, {130, 1, 0} if len(victims) < world or (world, kind) == (2, "SIGINT twice") else {130})
                assert set(codes) <= allowed, (kind, moment, world, codes, text)
                if kind not in ("SIGKILL", "SIGSTOP", "worker SIGKILL") and not finished:
                    assert 130 in codes, (kind, moment, world, codes, text)
            at_once = finished and kind in ("SIGKILL", "SIGINT twice")
            if finished:
                break
        while not (run / "result.json").exists():
            assert ended(host, launch(host, world, images, run, log, *workers), log) == [0] * world, log.read_text()
        assert figures(run) == expected[world], (number, world)
        # What ends a process at once, after its run is finished, leaves the file of the lock, which nobody holds.
        left = [path for path in run.rglob(".*") if not (at_once and path.name == LOCK)]
        assert not left, (kind, moment, left)
        number += 1
    print(f"\n{stops} stops in {number} runs (an undisturbed one: {duration[1]:.1f} s and {duration[2]:.1f} s)")
    for (kind, moment, world, code), count in sorted(table.items()):
        print(f"{kind:15} {moment:11} {world} process{'es' if world > 1 else '  '}  exit {code:8} {count:3}")
