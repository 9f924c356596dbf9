from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes
from falcon_fast.config import OptimizerConfig
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import FalconNetwork, ResNet8
from falcon_fast.training import step as step_module
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, forward_and_loss, gradient, training_step

from ..processes import exact_run, in_processes


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
    total, metrics = forward_and_loss(Learner(per_view_batchnorm(network), criterion, None, None, None), views, None)
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
    total, metrics = forward_and_loss(Learner(with_probe, criterion, probe, None, None), views, labels)
    total.backward()
    forward_and_loss(Learner(without, criterion, None, None, None), views, None)[0].backward()
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
    forward_and_loss(Learner(before, criterion, None, None, None), views, None)[0].backward()
    metrics = training_step(Learner(network, criterion, probe, optimizer), views, labels, 0.1)
    for mine, old in zip(network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, old - 0.05 * old.grad)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])
    assert not metrics.loss.requires_grad
    # Gradients do not pile up from step to step.
    second = copy.deepcopy(network)
    for parameter in second.parameters():
        parameter.grad = None
    forward_and_loss(Learner(second, criterion, None, None, None), views, None)[0].backward()
    training_step(Learner(network, criterion, probe, optimizer), views, labels, 0.1)
    for mine, theirs in zip(network.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_mixed_precision_runs_the_backbone_low_and_the_loss_in_float32(parts):
    network, criterion, _, views, _ = parts
    per_view_batchnorm(network)
    seen = {}
    network.backbone.stages.register_forward_hook(lambda m, i, o: seen.update(backbone=o.dtype))
    criterion.register_forward_hook(lambda m, i, o: seen.update(embeddings=i[0].dtype, loss=o.loss.dtype))
    total, _ = forward_and_loss(Learner(network, criterion, None, None, torch.bfloat16), views, None)
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


# ---- clipping ----


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_the_networks_gradient_is_clipped_and_its_norm_reported(parts, clip):
    network, criterion, probe, views, labels = parts
    per_view_batchnorm(network)
    optimizer = build_optimizer(
        OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0, momentum=0.0), network, probe, 2.0
    )
    before, probe_before = copy.deepcopy(network), copy.deepcopy(probe)
    forward_and_loss(Learner(before, criterion, probe_before, None), views, labels)[0].backward()
    norm = torch.cat([p.grad.flatten() for p in before.parameters()]).norm()
    assert norm > 0.05
    metrics = training_step(
        Learner(network, criterion, probe, optimizer, clip_norm=clip), views, labels, 1.0, measure_norm=not clip
    )
    torch.testing.assert_close(metrics.grad_norm, norm)
    factor = min(1.0, clip / norm.item()) if clip else 1.0
    for mine, old in zip(network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, old - 0.5 * factor * old.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.weight, probe_before.weight - 2.0 * probe_before.weight.grad)
    metrics = training_step(Learner(network, criterion, probe, optimizer, clip_norm=clip), views, labels, 1.0)
    assert (metrics.grad_norm is None) == (clip == 0)  # it costs a pass


# ---- micro-batches, and all of it in several processes ----

TINY = {
    "model.width": 4,
    "loss.embedding_dim": 32,
    "loss.num_codes": 64,
    "loss.implementation": "reference",
    "training.batch_size": 16,
    "optimizer.lr": 0.05,
    "optimizer.name": "sgd",
}
STRATEGIES = ("ddp", "fsdp")


def exact(strategy: str, processes: Processes, **settings):
    changes = TINY | {key.replace("__", "."): value for key, value in settings.items()}
    return exact_run(changes, processes, strategy)


def batch(processes: Processes, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's share of 16 images in two views."""
    generator = torch.Generator().manual_seed(seed)
    views, labels = torch.randn(2, 16, 3, 16, 16, generator=generator).double(), torch.arange(16) % 10
    share = slice(processes.rank * 16 // processes.world_size, (processes.rank + 1) * 16 // processes.world_size)
    return views[:, share].flatten(0, 1), labels[share]


def plain(tensors) -> list:
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().numpy().copy() for t in tensors]


def accumulated(strategy: str, processes: Processes, number: int = 4) -> dict:
    """The gradients of a step of `number` micro-batches, and how often each collective was called."""
    run = exact(strategy, processes, training__accumulate=number)
    with CommDebugMode() as collectives:
        metrics = gradient(run.learner, *batch(processes))
    grads = plain(p.grad for p in [*run.network.parameters(), *run.probe.parameters()])
    counts = {str(op).rpartition(".")[-1]: n for op, n in collectives.get_comm_counts().items()}
    return {"grads": grads, "loss": processes.mean(metrics.loss).item(), "counts": counts}


def several_steps(strategy: str, processes: Processes, name: str) -> dict:
    """Weights and their average after three clipped steps of two micro-batches."""
    run = exact(
        strategy,
        processes,
        training__accumulate=2,
        optimizer__clip_norm=0.5,
        optimizer__ema_decay=0.5,
        optimizer__name=name,
        optimizer__exclude_bias_and_norm=True,
    )
    norms = [training_step(run.learner, *batch(processes, seed), 1.0).grad_norm.item() for seed in range(3)]
    if run.sharded:
        assert all(type(run.learner.average.state()[n]) is DTensor for n, _ in run.network.named_parameters())
    weights = plain(run.network.parameters())
    with run.averaged():
        averaged = plain(run.network.parameters())
    assert all((a == b).all() for a, b in zip(weights, plain(run.network.parameters()), strict=True))
    return {"norms": norms, "weights": weights, "average": averaged}


def overflowing(strategy: str, processes: Processes) -> tuple[bool, float, bool]:
    """Whether weights moved, the scale, and whether the loss is finite, after a gradient overflowed in the last process only."""
    run = exact(strategy, processes)
    learner = dataclasses.replace(run.learner, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    if processes.rank == processes.world_size - 1:
        run.network.projector.register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * math.inf), o)[1])
    before = plain(run.network.parameters())
    metrics = training_step(learner, *batch(processes), 1.0)
    moved = any((a != b).any() for a, b in zip(before, plain(run.network.parameters()), strict=True))
    return moved, learner.scaler.get_scale(), bool(metrics.loss.isfinite())


def bad_in_one(strategy: str, processes: Processes, name: str) -> tuple[list[bool], float, list[int]]:
    """What was bad of three steps, the second with an infinite pixel in the last process only; how far weights, moments and
    statistics then are from those after the good steps alone; and the counts."""
    mine, theirs = (
        exact(strategy, processes, optimizer__name=name, optimizer__ema_decay=0.5, training__sync_batchnorm=False)
        for _ in range(2)
    )
    bad = []
    for seed in range(3):
        views, labels = batch(processes, seed)
        if seed == 1 and processes.rank == processes.world_size - 1:
            views[3, 0, 2, 2] = math.inf
        bad.append(training_step(mine.learner, views, labels, 1.0).bad.item())
        if seed != 1:
            training_step(theirs.learner, views, labels, 1.0)

    def state(run) -> list:
        moments = [v for p in run.network.parameters() for v in run.learner.optimizer.state[p].values()]
        return plain([*run.network.state_dict().values(), *run.learner.average.state().values(), *moments])

    apart = max(float(abs(a - b).max()) for a, b in zip(state(mine), state(theirs), strict=True) if a.size)
    return bad, apart, mine.learner.bad_steps.tolist()


def known_to_one(strategy, processes):
    """Whether a step is bad whose gradient is not finite in the last process alone (as a shard of FSDP can be), and whether the
    weights are those of before. (An infinite pixel is no such case: averaged gradients carry it to all processes.)"""
    run = exact(strategy, processes)
    before = plain([tensor.clone() for tensor in run.network.state_dict().values()])
    with pytest.MonkeyPatch.context() as patch:
        found = torch.tensor(float(processes.rank == processes.world_size - 1))
        patch.setattr(step_module, "non_finite_gradient", lambda parameters: found)
        bad = training_step(run.learner, *batch(processes, 0), 1.0).bad.item()
    after = plain(run.network.state_dict().values())
    return bad, all((a == b).all() for a, b in zip(before, after, strict=True))


def _two_processes(rank, world):
    processes = Processes(rank, world, rank, dist.group.WORLD, dist.new_group(backend="gloo"), 60)
    found = {}
    for strategy in STRATEGIES:
        found[f"accumulated-{strategy}"] = accumulated(strategy, processes)
        found[f"at-once-{strategy}"] = accumulated(strategy, processes, 1)
        found[f"overflow-{strategy}"] = overflowing(strategy, processes)
        found[f"known-to-one-{strategy}"] = known_to_one(strategy, processes)
        for name in ("sgd", "lars", "adamw"):
            found[f"{name}-{strategy}"] = several_steps(strategy, processes, name)
            found[f"bad-{name}-{strategy}"] = bad_in_one(strategy, processes, name)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(_two_processes, 2, tmp_path_factory.mktemp("step"))


def assert_alike(mine: list, theirs: list) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert abs(a - b).max() <= 1e-9 * max(1.0, abs(b).max())


def test_micro_batches_have_the_mean_of_their_gradients():
    run = exact("single", Processes(), training__accumulate=4)
    views, labels = batch(Processes())
    modules = (run.learner.network, run.learner.probe)
    apart = [copy.deepcopy(module) for module in modules]
    losses, sums = [], None
    for part in range(4):
        images = slice(4 * part, 4 * part + 4)
        one = views.unflatten(0, (2, 16))[:, images].flatten(0, 1)
        projector = apart[0].projector
        projector.forward = lambda features, own=projector: torch.tanh(own.norm(own.linear(features)))
        apart[1].forward = lambda features: F.linear(features.double(), apart[1].weight, apart[1].bias)
        total, metrics = forward_and_loss(Learner(apart[0], run.criterion, apart[1], None), one, labels[images])
        parameters = [p for module in apart for p in module.parameters()]
        grads = torch.autograd.grad(total, parameters)
        sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
        losses.append(metrics)
    metrics = gradient(run.learner, views, labels)
    for mine, theirs in zip((p for module in modules for p in module.parameters()), sums, strict=True):
        torch.testing.assert_close(mine.grad, theirs / 4, rtol=1e-9, atol=1e-12)
    for name in ("loss", "prior", "invariance", "probe_accuracy"):
        mean = torch.stack([getattr(each, name) for each in losses]).mean()
        torch.testing.assert_close(getattr(metrics, name), mean, rtol=1e-9, atol=0)
    assert metrics.codes_used == max(each.codes_used for each in losses)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_accumulate_like_one_with_one_reduction(two, strategy):
    """The images of one process are reordered, so that its micro-batches have the images that two processes have together."""
    run = exact("single", Processes(), training__accumulate=4)
    views, labels = batch(Processes())
    # Process r has images 8 r to 8 r + 7, and takes them by twos.
    order = torch.tensor([image for part in range(4) for image in (2 * part, 2 * part + 1, 8 + 2 * part, 9 + 2 * part)])
    metrics = gradient(run.learner, views.unflatten(0, (2, 16))[:, order].flatten(0, 1), labels[order])
    expected = plain(p.grad for p in [*run.network.parameters(), *run.probe.parameters()])
    for found in two:
        mine = found[f"accumulated-{strategy}"]
        assert_alike(mine["grads"], expected)
        assert mine["loss"] == pytest.approx(metrics.loss.item(), rel=1e-9)
    once, four = (two[0][f"{how}-{strategy}"]["counts"] for how in ("at-once", "accumulated"))
    if strategy == "ddp":  # one for the network and one for the probe; the loss has its own in every micro-batch
        assert 4 * once["allreduce_"] - four["allreduce_"] == 3 * 2
    else:
        for kind in ("_reduce_scatter_base_", "_allgather_base_"):
            assert four[kind] == once[kind] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_two_processes_clip_step_and_average_like_one(two, strategy, name):
    order = torch.tensor([*range(4), *range(8, 12), *range(4, 8), *range(12, 16)])

    def whole(processes, seed=5, batch=batch):
        views, labels = batch(processes, seed)
        return views.unflatten(0, (2, 16))[:, order].flatten(0, 1), labels[order]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "batch", whole)
        expected = several_steps("single", Processes(), name)
    assert min(expected["norms"]) > 0.5 / 10
    for found in two:
        mine = found[f"{name}-{strategy}"]
        assert mine["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        assert_alike(mine["weights"], expected["weights"])
        assert_alike(mine["average"], expected["average"])
    assert any(abs(a - b).max() > 1e-6 for a, b in zip(expected["weights"], expected["average"], strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_processes_skip_a_step_that_overflowed_in_one(two, strategy):
    assert [found[f"overflow-{strategy}"] for found in two] == [(False, 4.0, True)] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_all_processes_skip_a_step_that_is_bad_in_one_and_it_leaves_no_trace(two, strategy, name):
    assert [found[f"bad-{name}-{strategy}"] for found in two] == [([False, True, False], 0.0, [1, 0])] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_one_process_alone_knows_of_a_step_decides_for_all(two, strategy):
    assert [found[f"known-to-one-{strategy}"] for found in two] == [(True, True)] * 2
