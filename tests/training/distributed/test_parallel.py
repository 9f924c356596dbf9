"""A run in several gloo processes is the run of one process: losses, parameters, checkpoints, signals."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.views.photometric_stage import photometric_stage
from falcon_fast.errors import UsageError
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.distributed import parallel
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import Run, prepare
from falcon_fast.training.step import training_step

from ...processes import exact_run, in_processes

SETTINGS = {
    "model.width": 4,
    "loss.embedding_dim": 32,
    "loss.num_codes": 64,
    "loss.implementation": "reference",
    "training.epochs": 1,
    "training.batch_size": 128,
    "log.every_steps": 1,
    "checkpoint.every_steps": 5,
    "checkpoint.keep": 10,
}  # 11 steps
QUIET = Console(quiet=True)
TINY = ["--set", "model.width=4", "--embedding-dim", "32", "--num-codes", "64"]


def member(rank: int, world: int) -> Processes:
    control = dist.new_group(backend="gloo")
    return Processes(rank, world, rank, dist.group.WORLD, control, 60)


def trained(directory: Path, processes: Processes | None = None, resume: bool = False, **changes) -> Run:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    run = prepare(validate(override(load_recipe("digits"), settings)), processes)
    step, seconds = restore(run, directory) if resume else (0, 0.0)
    if not resume and run.processes.main:
        create_run_directory(directory, run.config)
    trainer.train(run, directory, QUIET, step, seconds)
    return run


def state(run: Run) -> dict:
    tensors = {f"network.{k}": v for k, v in run.network.state_dict().items()}
    tensors |= {f"probe.{k}": v for k, v in run.probe.state_dict().items()}
    tensors = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}
    return {k: v.numpy() for k, v in tensors.items()}


def rows(directory: Path) -> list[dict[str, float]]:
    columns = ("step", "loss", "prior", "invariance", "codes_used", "probe_train_accuracy")
    with (directory / "metrics.csv").open() as file:
        return [{c: float(row[c]) for c in columns} for row in csv.DictReader(file)]


def only_step_5(directory: Path, copy: Path) -> Path:
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(directory / "config.toml", copy)
    shutil.copytree(directory / "checkpoints" / "step-00000005", copy / "checkpoints" / "step-00000005")
    return copy


def exact_steps(processes: Processes, prior: str, strategy: str = "ddp", steps: int = 5) -> tuple[list[float], dict]:
    """Losses and weights of some steps in float64."""
    run = exact_run(
        SETTINGS | {"loss.prior": prior, "optimizer.name": "sgd", "optimizer.lr": 0.05}, processes, strategy
    )
    photometric = photometric_stage(run.augmentation, "eager", print)
    mean, std = run.source.normalization(run.device)
    losses = []
    share = (processes.rank, processes.world_size)
    for batch in training_batches(run.loader, run.source, run.clock, range(steps), run.device, 0, *share):
        views = photometric(batch.views, batch.parameters, mean, std).double()
        metrics = training_step(run.learner, views, batch.labels, 1.0)
        losses.append(processes.mean(metrics.loss).item())
    if run.sharded:  # parameters in parts, their moments too
        parts = [p.to_local().numel() for p in run.network.parameters()]
        moments = [s["momentum_buffer"] for s in run.learner.optimizer.state.values()]
        assert sum(parts) < 0.6 * sum(p.numel() for p in run.network.parameters())
        assert all(type(m).__name__ == "DTensor" for m in moments)
    return losses, state(run)


def sharded_losses(processes: Processes, param_dtype: str, **settings) -> list[float]:
    """The losses of four steps on the same noise."""
    changes = SETTINGS | {"fsdp.param_dtype": param_dtype} | settings
    run = prepare(validate(override(load_recipe("digits"), changes)), processes)
    views = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(processes.rank))
    return [training_step(run.learner, views, torch.arange(64) % 10, 1.0).loss.item() for _ in range(4)]


def _two_processes(rank, world, folder):
    processes = member(rank, world)
    found = {
        f"{strategy}-{prior}": exact_steps(processes, prior, strategy) for prior in PRIORS for strategy in STRATEGIES
    }
    found["reverse"] = state(trained(folder / "two-reverse", processes))
    found["resumed"] = state(trained(folder / "one-cut", processes, resume=True))
    loose = trained(folder / "loose", processes, loss__prior_scope="local", training__sync_batchnorm=False)
    found["loose"] = state(loose)
    sharding = dataclasses.replace(processes, strategy="fsdp")
    found["sharded"] = state(trained(folder / "sharded", sharding))
    found["resharded"] = state(trained(folder / "whole-cut", sharding, resume=True))
    found["float32"], found["bfloat16"] = (sharded_losses(sharding, dtype) for dtype in ("float32", "bfloat16"))
    compile_ = torch.compile
    torch.compile = functools.partial(compile_, backend="aot_eager")
    counters.clear()
    found["compiled"] = sharded_losses(sharding, "float32", **{"training.compile": True})
    found["graphs"] = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    torch.compile = compile_
    try:
        sharded_losses(sharding, "bfloat16", **{"training.compile": True})
    except UsageError as refused:
        found["refused"] = str(refused)
    return found


PRIORS = ("reverse", "forward")
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(folder):
    """The runs of a single process, and the first half of one to continue."""
    runs = {prior: trained(folder / f"one-{prior}", loss__prior=prior) for prior in PRIORS[:1]}
    only_step_5(folder / "one-reverse", folder / "one-cut")
    only_step_5(folder / "one-reverse", folder / "whole-cut")
    return runs


@pytest.fixture(scope="module")
def two(folder, one):
    return in_processes(_two_processes, 2, folder, folder)


def assert_near(mine: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        a, b = torch.from_numpy(mine[key]).double(), torch.from_numpy(value).double()
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1.0), key


@pytest.mark.parametrize("prior", PRIORS)
def test_two_processes_take_the_steps_of_one_with_the_whole_batch(two, prior):
    losses, weights = exact_steps(Processes(), prior)
    for found in two:
        for strategy in STRATEGIES:
            mine, theirs = found[f"{strategy}-{prior}"]
            assert mine == pytest.approx(losses, rel=1e-9)
            assert_near(theirs, weights, 1e-9)
    assert abs(losses[0] / losses[-1] - 1) > 0.1  # something was learnt


def test_the_loop_in_two_processes_is_that_of_one(folder, one, two):
    mine, theirs = rows(folder / "two-reverse"), rows(folder / "one-reverse")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == list(range(1, 12))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.2)


def test_processes_end_with_the_same_weights(two):
    for key in ("reverse", "resumed", "loose"):
        for name, value in two[0][key].items():
            assert (value == two[1][key][name]).all(), (key, name)


def test_another_number_of_processes_continues_a_run(folder, one, two):
    """The step after the checkpoint has the loss that it had: data, weights and statistics are the same."""
    one_to_two, whole = rows(folder / "one-cut"), rows(folder / "one-reverse")
    assert one_to_two[0] == pytest.approx(whole[5], rel=1e-4) and len(one_to_two) == 6
    trained(only_step_5(folder / "two-reverse", folder / "two-cut"), resume=True)
    two_to_one, whole = rows(folder / "two-cut"), rows(folder / "two-reverse")
    assert two_to_one[0] == pytest.approx(whole[5], rel=1e-4)
    assert [row["step"] for row in two_to_one] == list(range(6, 12))


def test_a_sharded_run_is_that_of_copies(folder, two):
    """Its loop tests, saves and ends as DDP's does; another strategy continues it, and it continues another's."""
    sharded, copied = rows(folder / "sharded"), rows(folder / "two-reverse")
    assert sharded[0] == pytest.approx(copied[0], rel=1e-4) and len(sharded) == len(copied)
    assert abs(sharded[-1]["loss"] / copied[-1]["loss"] - 1) < 0.2
    alone = trained(only_step_5(folder / "sharded", folder / "sharded-cut"), resume=True)
    assert rows(folder / "sharded-cut")[0] == pytest.approx(sharded[5], rel=1e-4)
    assert rows(folder / "whole-cut")[0] == pytest.approx(rows(folder / "one-reverse")[5], rel=1e-4)
    saved = prepare(alone.config)
    restore(saved, folder / "sharded")  # the last checkpoint holds what the processes ended with
    for name, value in state(saved).items():
        assert (value == two[0]["sharded"][name]).all() and (value == two[1]["sharded"][name]).all(), name


def test_sharded_blocks_compute_in_bfloat16_or_compiled(two):
    for found in two:
        assert found["bfloat16"] != found["float32"]
        assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
        assert found["compiled"] == pytest.approx(found["float32"], rel=1e-4)
        assert found["graphs"] == (4, {})  # three blocks and the projector
        assert "drop one of them" in found["refused"]


def test_one_process_alone_writes(folder, two):
    names = [p.name for p in checkpoint.complete(folder / "two-reverse" / "checkpoints")]
    assert names == ["step-00000005", "step-00000010", "step-00000011"]
    left = {p.name for p in (folder / "two-reverse").iterdir()}
    assert left == {"checkpoints", "config.toml", "metrics.csv", "tensorboard"}
    assert len(list((folder / "two-reverse" / "tensorboard").iterdir())) == 1


def test_a_local_prior_and_batchnorm_are_another_run(one, two):
    weight = "network.backbone.stem.0.weight"
    assert abs(two[0]["loose"][weight] - state(one["reverse"])[weight]).max() > 1e-4


# ---- under torchrun ----


def torchrun(*arguments: object, processes: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "falcon_fast", "train", *map(str, arguments)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    end = time.monotonic() + 120
    metrics = directory / "metrics.csv"
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > step:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def test_torchrun_stopped_by_a_signal_saves_and_continues_in_one_process(tmp_path):
    directory = tmp_path / "run"
    options = [
        "--epochs",
        500,
        "--set",
        "log.every_steps=1",
        "--set",
        "log.evaluate_epochs=0",
        "--set",
        "data.workers=1",
    ]
    process = torchrun(*TINY, *options, "--set", "data.loader=workers", "--run-dir", directory, cwd=tmp_path)
    wait_for_step(process, directory, 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out.count(f"stopped; continue with: falcon-fast train --resume {directory}") == 1, (out, err)
    assert "64 images on 2 cpu processes" in out
    (path,) = checkpoint.complete(directory / "checkpoints")
    step = json.loads((path / "run.json").read_text())["step"]
    with (directory / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, step + 1))
    config = prepare(checkpoint_config(directory))
    assert restore(config, directory)[0] == step


def checkpoint_config(directory: Path):
    from falcon_fast.config import load_config

    config = load_config(directory / "config.toml")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, strategy="single"))


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_checkpoint_stays(tmp_path):
    directory = tmp_path / "run"
    options = ["--epochs", 500, "--set", "log.every_steps=1", "--set", "log.evaluate_epochs=0"]
    process = torchrun(*TINY, *options, "--set", "checkpoint.every_steps=5", "--run-dir", directory, cwd=tmp_path)
    wait_for_step(process, directory, 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(
        c for c in children if b"RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes().replace(b"LOCAL_RANK", b"L")
    )
    os.kill(int(victim), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "lost another process" in err and "the last good checkpoint is" in err
    assert restore(prepare(checkpoint_config(directory)), directory)[0] % 5 == 0


@pytest.mark.slow
def test_a_whole_run_under_torchrun(tmp_path):
    process = torchrun(*TINY, "--epochs", 1, "--run-dir", tmp_path / "run", cwd=tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("everything is in") == 1
    assert (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [[], ["--amp", "--compile"]])
def test_one_process_with_a_strategy_is_a_run_alone(tmp_path, strategy, options):
    """On a GPU this tests nccl, and gloo between the hosts, with a single GPU."""
    options = [*TINY, *options, "--epochs", "1", "--set", "log.every_steps=1"]
    process = torchrun(*options, "--strategy", strategy, "--run-dir", "group", processes=1, cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    command = [sys.executable, "-m", "falcon_fast", "train", *options, "--run-dir", "alone"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    found, expected = ([row["loss"] for row in rows(tmp_path / name)] for name in ("group", "alone"))
    assert found[0] == pytest.approx(expected[0], rel=1e-2 if "--amp" in options else 1e-4)
    assert found == pytest.approx(expected, rel=0.1)  # rounding flips ReLUs, and grows: 1e-4 in the second step


def test_average_buffers_alone_leaves_them():
    layer = per_view_batchnorm(nn.BatchNorm1d(3))
    before = layer.running_var.clone()
    parallel.average_buffers(layer, Processes())
    assert torch.equal(layer.running_var, before)


def test_alone_nothing_is_wrapped_or_averaged():
    alone, layer = Processes(), nn.BatchNorm1d(3)
    assert parallel.data_parallel(layer, alone) is layer
    parallel.average_buffers(layer, alone)
