"""The rival of the whole-run benchmark takes the published step, eagerly and in the form that a CUDA graph records."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from falcon_fast.training import graphed

CPU = torch.device("cpu")
F_, C, TAU = 16, 32, 2.0


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import published

    return published


def batches(count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, count, 4, 3, 32, 32, generator=generator)
    return [[views[0, i], views[1, i], torch.arange(4) % 3] for i in range(count)]


def test_it_is_torchvisions_network_in_channels_last_with_the_published_groups(published: ModuleType) -> None:
    step = published.stepper(CPU, F_, C, TAU, 1e-3, 1e-1, 3, None)
    network, probe = step.modules
    weights = [p for p in network.parameters() if p.dim() == 4]
    assert len(weights) == 20 and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert network[0].conv1.weight.std().item() == pytest.approx(0.111, rel=0.05)
    assert all((block.bn2.weight == 1).all() for block in network[0].layer1)
    seen = []
    network[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step(batches(1)[0])
    assert len(seen) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    groups = step.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 1e-4), (1e-1, 0.0)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in probe.parameters()}


def test_the_form_for_a_graph_takes_the_same_steps(published: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the recorded function is called instead of replayed; nothing in it may depend on the batch's own memory."""
    recorded = []
    monkeypatch.setattr(graphed, "capture", lambda function, stream: recorded.append(function) or function)
    steps = []
    for graph in (False, True):
        torch.manual_seed(0)
        steps.append(published.stepper(CPU, F_, C, TAU, 1e-4, 1e-2, 3, None, graph))
    for batch in batches(graphed.WARM_UP + 2):
        eager, graphed_loss = (step(batch).item() for step in steps)
        assert graphed_loss == pytest.approx(eager, rel=1e-3)
    assert len(recorded) == 1
    for mine, theirs in zip(steps[1].modules[0].parameters(), steps[0].modules[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2e-4)


def test_a_step_is_the_published_one(published: ModuleType) -> None:
    """Adam on the loss of both views, one after the other, plus the probe's mean cross entropy on detached features."""
    step = published.stepper(CPU, F_, C, TAU, 1e-3, 1e-1, 3, None)
    (backbone, projector), probe = copy.deepcopy(step.modules)
    codes = step.codes
    x1, x2, labels = batches(1)[0]
    y1, y2 = backbone(x1), backbone(x2)
    log_p = [(projector(y) @ codes / TAU).log_softmax(1) for y in (y1, y2)]
    pbar = [p.exp().mean(0) for p in log_p]
    prior = sum((p * (C * p).log()).sum() for p in pbar) / 2
    invariance = -(log_p[1].exp() * log_p[0] + log_p[0].exp() * log_p[1]).sum(1).mean() / 2
    probed = (F.cross_entropy(probe(y1.detach()), labels) + F.cross_entropy(probe(y2.detach()), labels)) / 2
    (prior + invariance + probed).backward()
    assert step(batches(1)[0]).item() == pytest.approx((prior + invariance).item(), rel=1e-5)
    for mine, theirs in zip(step.modules[1].parameters(), probe.parameters(), strict=True):
        moved = theirs.detach() - 1e-1 * theirs.grad.sign()  # Adam's first step
        torch.testing.assert_close(mine.detach(), moved, rtol=1e-3, atol=1e-4)
    parts = [*backbone.parameters(), *projector.parameters()]
    clear = [(m, t) for m, t in zip(step.modules[0].parameters(), parts, strict=True) if t.grad.norm() > 1e-3]
    assert len(clear) > 10
    for mine, theirs in clear:
        grad = theirs.grad + 1e-4 * theirs.detach()
        large = grad.abs() > grad.abs().quantile(0.5) if grad.numel() < 10**6 else grad.abs() > grad.abs().mean()
        moved = mine.detach()[large] - theirs.detach()[large]
        assert np.mean((moved.sign() == -grad[large].sign()).numpy()) > 0.99
