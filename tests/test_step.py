from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes
from falcon_fast.batchnorm import per_view_batchnorm
from falcon_fast.config import OptimizerConfig
from falcon_fast.models import FalconNetwork, ResNet8
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, objective, training_step


@pytest.fixture
def parts():
    network = FalconNetwork(ResNet8(4), FalconProjector(16, 32))
    criterion = FalconLoss(RademacherCodes(32, 64), 4.0)
    return network, criterion, nn.Linear(16, 3), torch.randn(12, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])


def test_views_in_one_batch_are_as_views_apart(parts):
    """The published way, view after view, has the same loss, gradients and running statistics."""
    network, criterion, _, views, _ = parts
    apart = copy.deepcopy(network)
    h1, h2 = apart(views[:6])[1], apart(views[6:])[1]
    criterion(h1, h2).loss.backward()
    total, metrics = objective(Learner(per_view_batchnorm(network), criterion, None, None, None), views, None)
    total.backward()
    torch.testing.assert_close(metrics.loss, criterion(h1, h2).loss.detach())
    for (name, mine), theirs in zip(network.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    for mine, theirs in zip(network.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_probe_learns_and_leaves_the_network_alone(parts):
    network, criterion, probe, views, labels = parts
    per_view_batchnorm(network)
    with_probe, without = copy.deepcopy(network), copy.deepcopy(network)
    total, metrics = objective(Learner(with_probe, criterion, probe, None, None), views, labels)
    total.backward()
    objective(Learner(without, criterion, None, None, None), views, None)[0].backward()
    for mine, theirs in zip(with_probe.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    features = copy.deepcopy(network)(views)[0]
    logits = probe(features.detach())
    expected = torch.autograd.grad(F.cross_entropy(logits, torch.cat([labels, labels])), probe.weight)[0]
    torch.testing.assert_close(probe.weight.grad, expected)
    accuracy = (logits.argmax(1) == labels.repeat(2)).float().mean()
    torch.testing.assert_close(metrics.probe_accuracy, accuracy)


def test_a_step_follows_the_gradient_at_the_scheduled_rate(parts):
    network, criterion, probe, views, labels = parts
    per_view_batchnorm(network)
    optimizer = build_optimizer(
        OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0, momentum=0.0), network, probe, 2.0
    )
    before = copy.deepcopy(network)
    objective(Learner(before, criterion, None, None, None), views, None)[0].backward()
    metrics = training_step(Learner(network, criterion, probe, optimizer), views, labels, 0.1)
    for mine, old in zip(network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, old - 0.05 * old.grad)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])
    assert not metrics.loss.requires_grad
    # Gradients do not pile up from step to step.
    second = copy.deepcopy(network)
    for parameter in second.parameters():
        parameter.grad = None
    objective(Learner(second, criterion, None, None, None), views, None)[0].backward()
    training_step(Learner(network, criterion, probe, optimizer), views, labels, 0.1)
    for mine, theirs in zip(network.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_mixed_precision_runs_the_backbone_low_and_the_loss_in_float32(parts):
    network, criterion, _, views, _ = parts
    per_view_batchnorm(network)
    seen = {}
    network.backbone.stages.register_forward_hook(lambda m, i, o: seen.update(backbone=o.dtype))
    criterion.register_forward_hook(lambda m, i, o: seen.update(embeddings=i[0].dtype, loss=o.loss.dtype))
    total, _ = objective(Learner(network, criterion, None, None, torch.bfloat16), views, None)
    total.backward()
    assert seen == {"backbone": torch.bfloat16, "embeddings": torch.float32, "loss": torch.float32}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in network.parameters())


def test_training_steps_lower_the_loss(parts):
    network, criterion, _, views, _ = parts
    per_view_batchnorm(network)
    optimizer = build_optimizer(OptimizerConfig(lr=3e-3), network, None, 0.0)
    losses = [
        training_step(Learner(network, criterion, None, optimizer), views, None, 1.0).loss.item() for _ in range(40)
    ]
    assert losses[-1] < losses[0] - 0.5
