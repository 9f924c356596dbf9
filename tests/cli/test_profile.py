"""`falcon-fast profile` from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from falcon_fast.errors import TrainingError
from falcon_fast.profiling import phases

TINY = ["--set", "model.width=4", "--embedding-dim", "32", "--num-codes", "64", "--batch-size", "16", "--steps", "4"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_json_alone_is_on_stdout_and_nothing_is_written(falcon_fast, tmp_path):
    code, out, err = falcon_fast("profile", *TINY, "--json", "--loader", "synthetic", "--optimizer", "sgd")
    assert code == 0, err
    found = json.loads(out)
    assert "loader synthetic" in err and found["strategy"] == "single"
    phases = found["phase_seconds"]
    assert list(phases) == ["data", "photometric", "forward", "loss", "backward", "optimizer"]
    assert sum(phases.values()) == pytest.approx(found["step_seconds"])
    speed = found["images_per_second"]
    assert speed["p20"] <= speed["median"] <= speed["p80"]
    assert found["batch_size"] == found["images_per_step"] == 16 and found["steps"] == 4
    rate = found["flop_per_step"]["total"] * speed["median"] / 16
    assert found["mfu"] == pytest.approx(rate / found["peak_flop_per_second"]["measured"])
    assert found["flop_per_step"]["loss"] == 8 * 16 * 32 * 64
    assert found["diagnosis"].startswith(found["limit"])
    assert not list(tmp_path.iterdir())


def test_a_table_for_people_and_a_trace_for_browsers(falcon_fast, tmp_path):
    code, out, err = falcon_fast("profile", *TINY, "--trace", "trace.json")
    assert code == 0, err
    for piece in ("photometric", "backward", "images/s (median of 4 steps", "MFU", "limited by", "trace.json"):
        assert piece in out
    assert "\x1b" not in out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in ("data", "photometric", "loss", "backward", "optimizer"):
        assert named.count(phase) == 3, phase
    assert any("convolution" in event.get("name", "") for event in events)


def test_a_prediction_needs_neither_gpu_nor_data(falcon_fast, tmp_path):
    code, out, err = falcon_fast("profile", "--recipe", "cifar10", "--amp", "--predict", "a100")
    assert code == 0, err
    assert "predicted for A100" in out and "images/s" in out and "limited by" in out and "of 80 GB" in out
    code, out, _ = falcon_fast("profile", "--predict", "h200", "--gpus", 2, "--json")
    found = json.loads(out)
    assert code == 0 and found["gpus"] == 2 and sum(found["phases"].values()) == pytest.approx(found["step_seconds"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--predict", "a10"], "did you mean 'a100'"),
        (["--gpus", "2"], "--gpus needs --predict"),
        (["--predict", "a100", "--gpus", "0"], "--gpus must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--predict", "a100", "--trace", "x.json"], "leave out --predict"),
        (["--trace", "nowhere/x.json"], "cannot be written"),
        (["--recipe", "cifar10"], "needs --data"),
        (["--strategy", "ddp"], "--no-python falcon-fast profile"),
    ],
)
def test_what_cannot_be_done_is_one_line(falcon_fast, arguments, said):
    code, _, err = falcon_fast("profile", *arguments)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_a_trace_is_there_whole_or_not_at_all(falcon_fast, tmp_path, monkeypatch):
    def failing(*arguments):
        raise TrainingError("stopped")

    monkeypatch.setattr(phases, "measure", failing)
    code, _, err = falcon_fast("profile", *TINY, "--trace", "trace.json")
    assert code == 1 and "stopped" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_under_torchrun_one_process_speaks(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "falcon_fast",
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "profile", *TINY, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["processes"], found["strategy"]) == (2, "ddp")
    assert found["phase_seconds"]["communication"] >= 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_forward_and_loss_is_one_phase(falcon_fast):
    code, out, err = falcon_fast("profile", *TINY, "--compile", "--json")
    assert code == 0, err
    phases = json.loads(out)["phase_seconds"]
    assert list(phases) == ["data", "photometric", "forward, loss, backward", "optimizer"]
