"""The step as a CUDA graph. Without a GPU a replay calls the function again, which tests all of it but the graph."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes
from falcon_fast.config import OptimizerConfig, load_recipe, override, validate
from falcon_fast.errors import UsageError
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import FalconNetwork, ResNet8
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import graphed, trainer
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.graphed import WARM_UP, GraphedStep
from falcon_fast.training.optimizer import Rate, build_optimizer
from falcon_fast.training.run import prepare
from falcon_fast.training.step import Learner, training_step

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def learner(device=CPU, optimizer="adam", scaled=False, accumulate=1) -> Learner:
    torch.manual_seed(0)
    network = per_view_batchnorm(FalconNetwork(ResNet8(4), FalconProjector(16, 32))).to(device)
    network.projector.linear.bias.requires_grad_(
        False
    )  # its gradient is rounding alone, of which Adam makes large steps
    probe = nn.Linear(16, 3).to(device)
    scaler = None
    if scaled:
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20, growth_interval=3)
        scaler.scale(torch.zeros((), device=device))
    return Learner(
        network,
        FalconLoss(RademacherCodes(32, 64).to(device), 4.0),
        probe,
        build_optimizer(OptimizerConfig(name=optimizer, lr=1e-2), network, probe, 2e-2),
        scaler=scaler,
        accumulate=accumulate,
        clip_norm=1.0,
        average=WeightAverage(network, 0.9),
    )


def batches(count: int, device=CPU):
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        views, labels = torch.randn(12, 3, 8, 8, generator=generator), torch.arange(6) % 3
        yield {"step": step, "views": views.to(device), "labels": labels.to(device)}


def as_eager(mine: Learner, theirs: Learner, device, count: int) -> None:
    """Compare graphed steps of `mine` with ordinary steps of `theirs`."""
    step = GraphedStep(mine, lambda batch: (batch["views"] * 2, batch["labels"]), device)
    for batch in batches(count, device):
        rate = Rate(1.0 / (1 + batch["step"]), 1e-4 * (batch["step"] % 3))
        found = step(batch, rate)
        expected = training_step(theirs, batch["views"] * 2, batch["labels"], rate, measure_norm=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    ours, reference = ({**x.network.state_dict(), **x.probe.state_dict(), **x.extra_state()} for x in (mine, theirs))
    for name in reference:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.fixture
def recorded(monkeypatch):
    """The captured functions; to replay one is to call it again."""
    found = []

    def capture(function, stream):
        found.append(function)
        return function

    monkeypatch.setattr(graphed, "capture", capture)
    return found


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_steps_are_eagers(recorded, optimizer) -> None:
    mine, theirs = learner(optimizer=optimizer), learner(optimizer=optimizer)
    as_eager(mine, theirs, CPU, WARM_UP + 4)
    assert len(recorded) == 1
    rates = [group["lr"].item() for group in mine.optimizer.param_groups]
    assert rates == pytest.approx([group["lr"] for group in theirs.optimizer.param_groups])


def test_micro_batches_and_scaled_gradients(recorded) -> None:
    as_eager(learner(accumulate=2, scaled=True), learner(accumulate=2, scaled=True), CPU, WARM_UP + 4)


def test_inputs_keep_their_place_and_their_strides(recorded) -> None:
    seen = []

    def views_of(batch):
        seen.append((batch["views"].data_ptr(), batch["views"].stride()))
        return batch["views"], batch["labels"]

    step = GraphedStep(learner(), views_of, CPU)
    for batch in batches(WARM_UP + 2):
        batch["views"] = batch["views"].to(memory_format=torch.channels_last)
        step(batch, 1.0)
    assert len(set(seen)) == 1 and seen[0][1][1] == 1


def test_what_cannot_be_captured_is_said(monkeypatch) -> None:
    def capture(function, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphed, "capture", capture)
    step = GraphedStep(learner(), lambda batch: (batch["views"], batch["labels"]), CPU)
    with pytest.raises(UsageError, match=r"not permitted.*leave out --cuda-graph"):
        for batch in batches(WARM_UP + 1):
            step(batch, 1.0)


def config_of(**changes):
    settings = {
        "model.width": 4,
        "loss.embedding_dim": 32,
        "loss.num_codes": 64,
        "training.epochs": 2,
        "training.batch_size": 128,
        "log.every_steps": 1,
        "checkpoint.every_steps": 5,
    }
    return validate(override(load_recipe("digits"), settings | changes))


@pytest.mark.parametrize(
    ("device", "world", "optimizer", "reason"),
    [("cpu", 1, "adam", "NVIDIA"), ("cuda", 2, "adam", "one process"), ("cuda", 1, "lars", "LARS")],
)
def test_where_it_does_not_go(device, world, optimizer, reason) -> None:
    assert reason in graphed.why_not_graphed(torch.device(device), world, optimizer)
    assert graphed.why_not_graphed(torch.device("cuda"), 1, "adamw") is None


def test_refused_in_a_line_on_a_cpu() -> None:
    with pytest.raises(UsageError, match=r"--cuda-graph.*leave it out"):
        prepare(config_of(**{"training.cuda_graph": True, "training.device": "cpu"}))


def losses(directory: Path) -> list[float]:
    with (directory / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def trained(directory: Path, device: str, cuda_graph: bool, **changes) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = prepare(config_of(**{"training.device": device, "training.cuda_graph": cuda_graph} | changes))
    create_run_directory(directory, run.config)
    trainer.train(run, directory, QUIET)
    return losses(directory), copy.deepcopy(run.network.state_dict())


def test_a_run_of_recorded_steps(recorded, monkeypatch, tmp_path: Path) -> None:
    """The loop with the resident loader and the photometric stage inside the record; resumed, the same losses again."""
    monkeypatch.setattr("falcon_fast.training.run.why_not_graphed", lambda *_: None)
    expected, weights = trained(tmp_path / "eager", "cpu", False)
    found, ours = trained(tmp_path / "graph", "cpu", True)
    # The rate is float32 in one and float64 in the other, a difference that training makes larger.
    assert found[:8] == pytest.approx(expected[:8], rel=1e-4) and found == pytest.approx(expected, rel=2e-2)
    for name in ("backbone.stem.0.weight", "backbone.stages.2.conv2.weight", "projector.linear.weight"):
        assert (ours[name] - weights[name]).norm() < 0.05 * weights[name].norm(), name
    newest = checkpoint.complete(tmp_path / "graph" / "checkpoints")
    for later in newest[1:]:
        later.rename(tmp_path / later.name)  # back to the one before the last
    run = prepare(config_of(**{"training.device": "cpu", "training.cuda_graph": True}))
    step, seconds = restore(run, tmp_path / "graph")
    trainer.train(run, tmp_path / "graph", QUIET, step, seconds)
    assert losses(tmp_path / "graph") == pytest.approx(found, rel=1e-6)


@needs_gpu
@pytest.mark.parametrize(
    ("optimizer", "scaled", "accumulate"), [("adam", False, 1), ("adamw", True, 1), ("sgd", False, 2)]
)
def test_captured(optimizer, scaled, accumulate) -> None:
    device = torch.device("cuda")
    pair = [learner(device, optimizer, scaled, accumulate) for _ in range(2)]
    as_eager(*pair, device, WARM_UP + 5)


@needs_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.precision": "bf16"},
        {"training.precision": "bf16", "training.compile": True},
        {"training.precision": "fp16"},
    ],
    ids=["float32", "bf16", "compiled", "fp16"],
)
def test_a_captured_run(tmp_path: Path, changes) -> None:
    expected, _ = trained(tmp_path / "eager", "cuda", False, **changes)
    found, _ = trained(tmp_path / "graph", "cuda", True, **changes)
    assert found[:8] == pytest.approx(expected[:8], rel=2e-3)
    assert found == pytest.approx(expected, rel=0.1)
