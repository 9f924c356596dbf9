"""One optimisation step, reading like the paper: views -> features -> embeddings -> loss -> gradient -> update.

Everything a step depends on comes in as an argument, nothing is kept between steps but what the learner holds, and nothing
waits for the device: so it can be compiled, captured and tested. (One pair of settings does wait: float16 with an optimiser that
is not fused, LARS or SGD on shards, where the GradScaler asks whether the gradients overflowed.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from falcon_fast.kernels.torch_private import grad_scaler_state
from falcon_fast.objective import FalconLoss
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.distributed.parallel import gradient_sync


@dataclass
class Learner:
    """What learns, and by which rules: all that a step reads and changes.

    network: images to features and embeddings, a FalconNetwork as the strategy and the compiler wrap it.
    probe: the online linear probe, features to class logits, wrapped likewise; None without labels.
    amp_dtype: of autocast; None is float32.
    scaler: of the gradients, for float16.
    accumulate: micro-batches that a step takes one after the other, averaging their gradients: the memory of one, the step
        of all but for two things. The prior's mean assignment and BatchNorm's statistics are of each micro-batch.
    clip_norm: what the norm of the network's gradient is clipped to; 0 leaves it. The probe's is its own affair.
    average: of the network's weights, kept beside them.
    compiled: `objective` compiled as a whole, called in its place; None where the network is compiled by itself, or nothing.
    """

    network: nn.Module
    criterion: FalconLoss
    probe: nn.Module | None
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    accumulate: int = 1
    clip_norm: float = 0.0
    average: WeightAverage | None = None
    compiled: Callable[[Learner, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, StepMetrics]] | None = None

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside weights and moments, by name; the tensors themselves, to be restored in place."""
        tensors: dict[str, torch.Tensor] = {}
        if self.scaler is not None:
            # Its state_dict() makes numbers of them, and waits for the device.
            scale, growth = grad_scaler_state(self.scaler)
            assert scale is not None and growth is not None
            tensors |= {"scaler.scale": scale, "scaler.growth": growth}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state().items()}
        return tensors


class StepMetrics(NamedTuple):
    """What a step reports: detached 0-d tensors on the device, means over its micro-batches.

    Attributes:
        codes_used: of several micro-batches, the most that one of them used.
        probe_accuracy: of this batch; None without labels.
        grad_norm: Euclidean norm of the network's whole gradient, over all processes, before clipping; None where nobody asked.
    """

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor
    probe_accuracy: torch.Tensor | None
    grad_norm: torch.Tensor | None = None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision in `dtype`, or none for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def objective(learner: Learner, views: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, StepMetrics]:
    """The scalar to minimise for normalised views (2 B, 3, S, S), view 1 first, and what to report of it.

    The online probe learns from detached features, so its loss adds nothing to the network's gradient.
    """
    with autocast(views.device, learner.amp_dtype):
        features, embeddings = learner.network(views)
    h1, h2 = embeddings.chunk(2)
    loss, prior, invariance, codes_used = learner.criterion(h1, h2)
    total, accuracy = loss, None
    if learner.probe is not None and labels is not None:
        logits = learner.probe(features.detach().float())
        targets = labels.repeat(2)
        total = loss + F.cross_entropy(logits, targets)
        accuracy = (logits.argmax(1) == targets).float().mean()
    return total, StepMetrics(loss.detach(), prior.detach(), invariance.detach(), codes_used, accuracy)


def training_step(
    learner: Learner,
    views: torch.Tensor,
    labels: torch.Tensor | None,
    lr_scale: float | torch.Tensor,
    measure_norm: bool = False,
) -> StepMetrics:
    """Forward, backward and update for one batch, at `lr_scale` times each parameter group's `peak_lr`.

    lr_scale: a tensor where the groups' rates are (graphed.py).
    measure_norm: report the gradient's norm though nothing is clipped by it.
    """
    for group in learner.optimizer.param_groups:
        rate = group["peak_lr"] * lr_scale
        if torch.is_tensor(rate):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate
    learner.optimizer.zero_grad(set_to_none=True)
    metrics = gradient(learner, views, labels)
    return metrics._replace(grad_norm=update(learner, measure_norm))


def gradient(learner: Learner, views: torch.Tensor, labels: torch.Tensor | None) -> StepMetrics:
    """Add the gradient of `objective` to the parameters', the mean over micro-batches; scaled, where there is a scaler."""
    found: list[StepMetrics] = []
    for views_part, labels_part in micro_batches(views, labels, learner.accumulate):
        last = len(found) == learner.accumulate - 1
        with gradient_sync((learner.network, learner.probe), last):
            total, metrics = (learner.compiled or objective)(learner, views_part, labels_part)
            total = total if learner.accumulate == 1 else total / learner.accumulate
            (total if learner.scaler is None else learner.scaler.scale(total)).backward()
        found.append(metrics)
    return found[0] if len(found) == 1 else _mean(found)


def micro_batches(
    views: torch.Tensor, labels: torch.Tensor | None, number: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A batch of two views (2 B, ...), view 1 first, in `number` equal parts that hold both views of their images."""
    if number == 1:
        yield views, labels
        return
    pairs = zip(*(view.chunk(number) for view in views.chunk(2)), strict=True)
    parts = [None] * number if labels is None else labels.chunk(number)
    for pair, part in zip(pairs, parts, strict=True):
        yield torch.cat(pair), part


def _mean(found: list[StepMetrics]) -> StepMetrics:
    """Of several micro-batches."""
    loss, prior, invariance, codes_used, accuracy, _ = zip(*found, strict=True)
    return StepMetrics(
        torch.stack(loss).mean(),
        torch.stack(prior).mean(),
        torch.stack(invariance).mean(),
        torch.stack(codes_used).amax(),
        None if accuracy[0] is None else torch.stack(accuracy).mean(),
    )


def update(learner: Learner, measure_norm: bool = False) -> torch.Tensor | None:
    """Unscale, clip, step, average. Returns the norm of the network's gradient before clipping, where clipped or asked for.

    A step whose scaled gradients overflowed changes neither weights nor moments, in any process: DDP's mean spreads the infinity,
    and for DTensors torch takes the maximum of `found_inf` over the mesh.
    """
    optimizer, scaler, norm = learner.optimizer, learner.scaler, None
    if scaler is not None:
        scaler.unscale_(optimizer)
    if learner.clip_norm or measure_norm:
        parameters = [p for p in learner.network.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if learner.clip_norm:
            clip_grads_with_norm_(parameters, learner.clip_norm, norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if learner.average is not None:
        learner.average.update()
    return norm
