"""Runs that are killed and started again: whatever happens to their processes, they continue."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from falcon_fast.training.checkpoints import checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--set", "model.width=4", "--embedding-dim", "32", "--num-codes", "64", "--batch-size", "96", "--seed", "1"]
OFTEN = ["--set", "log.every_steps=1", "--set", "log.evaluate_epochs=0", "--set", "checkpoint.every_steps=2"]
COLUMNS = ("step", "loss", "prior", "invariance", "codes_used", "lr", "probe_train_accuracy")


def rows(directory: Path) -> list[tuple[str, ...]]:
    """metrics.csv without tests and timings."""
    with (directory / "metrics.csv").open() as file:
        return [tuple(row[c] for c in COLUMNS) for row in csv.DictReader(file)]


def torchrun(
    *arguments: object, options: tuple[str, ...] = (), script: Path | None = None, **named
) -> subprocess.Popen:
    """`torchrun falcon-fast train ...` in two processes; `script` in its place."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += ["-m", "falcon_fast"] if script is None else [str(script)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **named,
    )


def wait_for_steps(process: subprocess.Popen, directory: Path, steps: int) -> None:
    end, metrics = time.monotonic() + 120, directory / "metrics.csv"
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > steps:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


# ---- thirty moments ----

EPOCHS = 5  # of 14 steps
MOMENTS = 30


def _member(rank: int, world: int, port: int, arguments: list[str], log: str) -> None:
    """One process as torchrun would start it, in a process group of its own, but with everything imported."""
    os.setpgid(0, 0)
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    from falcon_fast.cli import main as cli
    from falcon_fast.runs import results
    from falcon_fast.runs.directory import write_json

    # The evaluation at the end is not what is tested, and takes longer than the run.
    results.finish = lambda run, network, directory, seconds, say: write_json(directory / "result.json", {}) or {}  # type: ignore
    import falcon_fast.evaluation.report as report

    report.result_tables = lambda result: []
    sys.argv = ["falcon-fast", "train", *arguments]
    cli.main()


def launch(world: int, directory: Path, log: Path) -> list:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.test_restart", "falcon_fast.training.trainer", "falcon_fast.cli.main"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*TINY, *OFTEN, "--epochs", str(EPOCHS), "--continue", "--run-dir", str(directory), "--set"]
    arguments += ["training.timeout=30"]
    members = [context.Process(target=_member, args=(r, world, port, arguments, str(log))) for r in range(world)]
    for each in members:
        each.start()
    return members


def finish(members: list, log: Path, seconds: float = 90) -> list[int]:
    end = time.monotonic() + seconds
    for each in members:
        each.join(max(0.1, end - time.monotonic()))
        if each.is_alive():
            for other in members:
                other.kill()
            raise AssertionError(f"still running after {seconds} s: {log.read_text()}")
    return [each.exitcode for each in members]


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    """SIGKILL to both or to one, or SIGTERM to both or to one, at a random moment of a run of two processes, from their start
    to the end of training; then the same command with 1, 2 or 3 processes until it is finished.
    """
    reference, log = tmp_path / "undisturbed", tmp_path / "log"
    started = time.monotonic()
    assert finish(launch(2, reference, log), log) == [0, 0], log.read_text()
    launch_seconds = time.monotonic() - started
    started = time.monotonic()
    assert finish(launch(2, tmp_path / "again", log), log) == [0, 0], log.read_text()
    duration = time.monotonic() - started
    expected = rows(reference)
    assert rows(tmp_path / "again") == expected and len(expected) == EPOCHS * 14
    counts = {"begun": 0, "saving": 0, "bitwise": 0, "SIGKILL": 0, "SIGTERM": 0}
    draw = random.Random(0)
    started = time.monotonic()
    for moment in range(MOMENTS):
        directory, log = tmp_path / f"run-{moment}", tmp_path / f"log-{moment}"
        number = (signal.SIGKILL, signal.SIGTERM)[moment % 2]
        victims = (slice(0, 2), slice(0, 1), slice(1, 2))[moment % 3]
        members = launch(2, directory, log)
        time.sleep(draw.uniform(0.1, 1.0) * duration)
        for each in members[victims]:
            if each.is_alive():
                os.killpg(each.pid, number)
        counts[number.name] += 1
        finish(members, log)
        counts["begun"] += bool(checkpoint.complete(directory / "checkpoints"))
        counts["saving"] += bool(list(directory.rglob(".step-*.partial")))
        kept = checkpoint.complete(directory / "checkpoints")
        world = 1 + moment // 2 % 3
        assert finish(launch(world, directory, log), log) == [0] * world, log.read_text()
        text = log.read_text()
        assert "Traceback" not in text.rpartition("recipe digits")[2], text
        if kept and f"{directory} is finished" not in text:  # it went on from there
            assert f"from step {int(kept[-1].name.removeprefix('step-'))} of" in text, text
        found = rows(directory)
        assert [row[0] for row in found] == [row[0] for row in expected], (moment, world)
        if world == 2:
            assert found == expected, moment
            counts["bitwise"] += 1
        assert (directory / "result.json").exists()
        assert not list(directory.rglob(".*"))
        names = [p.name for p in sorted((directory / "checkpoints").iterdir())]
        assert names == [f"step-{EPOCHS * 14 - 2:08d}", f"step-{EPOCHS * 14:08d}"]
    print(
        f"\n{MOMENTS} moments in {time.monotonic() - started:.0f} s (a run: {duration:.1f} s, {launch_seconds:.1f}): {counts}"
    )
    assert counts["begun"] >= MOMENTS // 3  # the moments were not all before the first checkpoint


# ---- torchrun ----


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_continues(tmp_path):
    """The command of examples/torchrun.sh, on one machine, with a worker killed."""
    directory = tmp_path / "run"
    arguments = [*TINY, *OFTEN, "--epochs", 10, "--continue", "--run-dir", directory]
    options = ("--rdzv-backend=c10d", "--max-restarts=1")
    process = torchrun(*arguments, options=options, cwd=tmp_path)
    wait_for_steps(process, directory, 20)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (step,) = map(int, re.findall(r"from step (\d+) of 140", out))
    assert step >= 10 and (directory / "result.json").exists()
    assert [int(row[0]) for row in rows(directory)] == list(range(1, 141))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_torchrun_reaches_the_run(tmp_path, number):
    """SIGTERM by itself; SIGUSR1, which torchrun ignores, when it is told to pass it on."""
    directory, options = tmp_path / "run", ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",)
    process = torchrun(*TINY, *OFTEN, "--epochs", 500, "--run-dir", directory, cwd=tmp_path, options=options)
    try:
        wait_for_steps(process, directory, 5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert out.count("stopped; continue with") == 1, (out, err)
    assert rows(directory)[-1][0] == str(checkpoint.read_facts(checkpoint.latest(directory))["step"])


RAISING = """
import os, sys
from falcon_fast.cli import main as cli
from falcon_fast.training import stepper
step, calls = stepper.training_step, []
def failing(*arguments):
    calls.append(None)
    if len(calls) == 12 and os.environ["RANK"] == "1":
        raise ZeroDivisionError("only here")
    return step(*arguments)
stepper.training_step = failing
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_raises_stops_the_others_and_says_why(tmp_path):
    script, directory = tmp_path / "raising.py", tmp_path / "run"
    script.write_text(RAISING)
    process = torchrun(*TINY, *OFTEN, "--epochs", 500, "--run-dir", directory, cwd=tmp_path, script=script)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("ZeroDivisionError: only here") == 1, err
    assert err.count("process 0 lost another process") == 1, err
    kept = checkpoint.latest(directory)
    assert kept.name == "step-00000010" and f"the last good checkpoint is {kept}" in err
    assert not list(directory.rglob(".*"))


# ---- Slurm, acted by three small scripts ----

SRUN = """#!/bin/bash
# As srun: one process for each of $SLURM_NTASKS, their highest exit code.
while [[ $1 == -* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
printf '%s\\n' "${pids[@]}" > "$ACTED/pids"
code=0
for pid in "${pids[@]}"; do wait "$pid"; c=$?; ((c > code)) && code=$c; done
exit "$code"
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$ACTED/calls"
while read -r pid; do kill -TERM "$pid"; done < "$ACTED/pids"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "scontrol $*" >> "$ACTED/calls"; fi
"""


@pytest.mark.slow
def test_the_slurm_script_saves_is_queued_again_and_continues(tmp_path):
    acted = tmp_path / "acted"
    acted.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (acted / name).write_text(text)
        (acted / name).chmod(0o755)
    (acted / "falcon-fast").write_text(f'#!/bin/bash\nexec {sys.executable} -m falcon_fast "$@"\n')
    (acted / "falcon-fast").chmod(0o755)
    (acted / "calls").touch()
    environment = os.environ | {
        "PATH": f"{acted}:{os.environ['PATH']}",
        "ACTED": str(acted),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
    }
    directory = tmp_path / "run"
    arguments = [*TINY, *OFTEN, "--epochs", "15", "--run-dir", str(directory)]
    command = ["bash", str(EXAMPLES / "slurm.sh"), *arguments]

    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(process, directory, 10)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0 and "stopped; continue with" in out, (out, err)
    calls = (acted / "calls").read_text().splitlines()
    assert calls == ["scancel --signal=TERM 4711", "scontrol requeue 4711"]
    step = checkpoint.read_facts(checkpoint.latest(directory))["step"]

    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and f"from step {step} of 210" in done.stdout, (done.stdout, done.stderr)
    assert [int(row[0]) for row in rows(directory)] == list(range(1, 211))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "is finished" in done.stdout
    assert (acted / "calls").read_text().splitlines() == calls  # what is finished or fails is not queued again
    bad = subprocess.run(
        [*command, "--seed", "7"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert bad.returncode == 2 and "training.seed" in bad.stderr
    assert (acted / "calls").read_text().splitlines() == calls


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [
        *((code, 0, False) for code in (0, 1, 2, 74)),
        *((code, restarts, restarts < 20) for code in (75, 137) for restarts in (0, 19, 20)),
        (130, 500, True),
    ],
)
def test_the_slurm_script_queues_a_job_again_by_its_exit_code(tmp_path, code, restarts, queued):
    for name, text in (
        ("srun", f"#!/bin/bash\nexit {code}\n"),
        ("scontrol", f'#!/bin/bash\n[[ $1 == show ]] && echo localhost || echo "$*" >> {tmp_path}/calls\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["bash", str(EXAMPLES / "slurm.sh")], env=environment, timeout=60)
    assert (tmp_path / "calls").read_text().splitlines() == ["requeue 4711"] * queued
    assert done.returncode == (0 if queued else code)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_shellcheck_finds_nothing(name):
    done = subprocess.run(["shellcheck", str(EXAMPLES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
