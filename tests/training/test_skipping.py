"""Steps whose loss or gradient is not finite: they leave everything as if their batch had not been there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes
from falcon_fast.config import OptimizerConfig
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import FalconNetwork, ResNet8
from falcon_fast.training import graphed
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.graphed import WARM_UP, GraphedStep
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.skipping import Before, any_non_finite
from falcon_fast.training.step import Learner, forward_and_loss, training_step

CPU = torch.device("cpu")
OPTIMIZERS = ("adam", "adamw", "sgd", "lars")


def learner(optimizer="adamw", scale: float | None = None, **options) -> Learner:
    torch.manual_seed(0)
    network = per_view_batchnorm(FalconNetwork(ResNet8(4), FalconProjector(16, 32)))
    probe = nn.Linear(16, 3)
    scaler = None
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        scaler.scale(torch.zeros(()))
    config = OptimizerConfig(name=optimizer, lr=1e-2, weight_decay=1e-2)
    criterion = FalconLoss(RademacherCodes(32, 64), 4.0)
    average = WeightAverage(network, 0.9)
    built = build_optimizer(config, network, probe, 2e-2)
    return Learner(network, criterion, probe, built, scaler=scaler, clip_norm=1.0, average=average, **options)


def batch(seed: int, poison: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    views = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    if poison is not None:
        views[4, 1, 2, 3] = poison
    return views, torch.arange(6) % 3


def state(mine: Learner) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in [*mine.network.named_parameters(), *mine.probe.named_parameters()]}
    moments = {f"{names[id(p)]}.{k}": v for p, values in mine.optimizer.state.items() for k, v in values.items()}
    tensors = {**mine.network.state_dict(), **{f"probe.{k}": v for k, v in mine.probe.state_dict().items()}, **moments}
    return {k: v.clone() for k, v in (tensors | mine.extra_state()).items() if k != "bad_steps"}


def assert_equal(mine: Learner, theirs: Learner) -> None:
    ours, reference = state(mine), state(theirs)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, reference[name]), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first_bad", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_leaves_no_trace(optimizer, first_bad, accumulate):
    mine, theirs = (learner(optimizer, accumulate=accumulate) for _ in range(2))
    for seed in range(5):
        bad = seed in (first_bad, first_bad + 1)
        poison = (math.nan if seed == first_bad else math.inf) if bad else None
        rate = 1 / (1 + seed)
        metrics = training_step(mine, *batch(seed, poison), rate)
        assert metrics.bad.item() == bad == (not metrics.loss.isfinite())
        if not bad:
            training_step(theirs, *batch(seed), rate)
    assert_equal(mine, theirs)
    assert mine.bad_steps.tolist() == [2, 0] and theirs.bad_steps.tolist() == [0, 0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["network", "probe"])
def test_a_gradient_alone_is_enough(optimizer, where):
    mine = learner(optimizer)
    training_step(mine, *batch(0), 1.0)
    before = state(mine)
    module = mine.probe if where == "probe" else mine.network.projector
    hook = module.register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * math.inf), o)[1])
    metrics = training_step(mine, *batch(1), 1.0)
    hook.remove()
    assert metrics.bad and metrics.loss.isfinite()
    assert mine.bad_steps.tolist() == [1, 1]
    for name, tensor in state(mine).items():
        assert torch.equal(tensor, before[name]), name


def test_the_loss_of_the_probe_counts_too():
    mine = learner()
    with torch.no_grad():
        mine.probe.weight.fill_(math.nan)
    before = state(mine)
    metrics = training_step(mine, *batch(0), 1.0)
    assert metrics.bad and metrics.loss.isfinite()
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in state(mine).items()
        if name in before and "probe" not in name
    )


def test_compiled():
    mine, theirs = learner(), learner()
    for each in (mine, theirs):
        each.compiled = torch.compile(forward_and_loss, backend="aot_eager", fullgraph=True)
    for seed, poison in enumerate((None, math.inf, None)):
        assert training_step(mine, *batch(seed, poison), 1.0).bad.item() == (poison is not None)
        if poison is None:
            training_step(theirs, *batch(seed), 1.0)
    assert_equal(mine, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_in_a_recorded_step(optimizer, monkeypatch):
    """Without a GPU a replay calls the function again."""
    monkeypatch.setattr(graphed, "capture", lambda function, stream: function)
    mine, theirs = learner(optimizer), learner(optimizer)
    steps = [GraphedStep(each, lambda given: given, CPU) for each in (mine, theirs)]
    for seed in range(WARM_UP + 4):
        bad = seed in (1, WARM_UP + 1, WARM_UP + 2)
        assert steps[0](batch(seed, math.nan if bad else None), 1.0).bad.item() == bad
        if not bad:
            steps[1](batch(seed), 1.0)
    assert_equal(mine, theirs)
    assert mine.bad_steps.tolist() == [3, 0]


# ---- scaled gradients ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_of_scaled_gradients_is_no_bad_step(optimizer):
    mine = learner(optimizer, scale=1024.0)
    training_step(mine, *batch(0), 1.0)
    before = state(mine)
    # About 1e-3 without the scale, times 1e39 in two parts; float32 ends at 3e38.
    mine.network.projector.register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * 1e20 * 1e19), o)[1])
    metrics = training_step(mine, *batch(0), 1.0)
    assert not metrics.bad and metrics.loss.isfinite() and mine.bad_steps.tolist() == [0, 0]
    after = state(mine)
    assert (after.pop("scaler.scale"), after.pop("scaler.growth")) == (512.0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_it_is_one_at_the_smallest_scale():
    mine = learner(scale=2.0)
    mine.network.projector.register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * math.inf), o)[1])
    found = [(training_step(mine, *batch(0), 1.0).bad.item(), mine.scaler.get_scale()) for _ in range(3)]
    assert found == [(False, 1.0), (True, 1.0), (True, 1.0)]


def test_a_bad_loss_does_not_move_the_scale():
    mine, theirs = learner(scale=256.0), learner(scale=256.0)
    for seed in range(4):
        bad = seed == 1
        assert training_step(mine, *batch(seed, math.nan if bad else None), 1.0).bad.item() == bad
        if not bad:
            training_step(theirs, *batch(seed), 1.0)
    assert_equal(mine, theirs)
    assert mine.scaler.get_scale() == 512.0  # it grew after three good steps


# ---- the parts ----


def test_before_puts_back_every_kind_of_tensor_or_nothing():
    tensors = [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(5, dtype=torch.float64),
        torch.tensor(7),
        torch.randn(0),
        torch.randn(4, 6)[:, ::2],
    ]
    kept = copy.deepcopy(tensors)
    before = Before(tensors)
    changed = [tensor * 2 + 1 for tensor in kept]
    for tensor, value in zip(tensors, changed, strict=True):
        tensor.copy_(value)
    strides = [tensor.stride() for tensor in tensors]
    before.put_back_if(torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(tensors, changed, strict=True))
    tensors[0].fill_(math.nan)
    before.put_back_if(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert strides == [tensor.stride() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_found(dtype):
    tensors = [torch.randn(50).to(dtype), torch.arange(3), torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)]
    kept = copy.deepcopy(tensors)
    assert any_non_finite(tensors, CPU) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    for value in (math.nan, math.inf, -math.inf):
        tensors[0][17] = value
        assert any_non_finite(tensors, CPU) == 1.0
