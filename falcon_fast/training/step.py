"""One optimisation step, reading like the paper: views -> features -> embeddings -> loss -> gradient -> update.

Everything that a step depends on is an argument, nothing is kept between steps except what the learner holds, and nothing waits
for the device: so a step can be compiled, captured and tested. A step whose loss or gradient is not finite is skipped
(skipping.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from falcon_fast.kernels.torch_private import grad_scaler_state
from falcon_fast.objective import FalconLoss
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.distributed.parallel import gradient_sync
from falcon_fast.training.optimizer import Rate
from falcon_fast.training.skipping import Before, in_any_process, non_finite_gradient, running_statistics, step_unless

# The scale of float16 gradients below which an overflow is no longer the scale's fault.
SMALLEST_SCALE = 1.0


@dataclass
class Learner:
    """The modules that learn and the rules by which they learn: everything that a step reads and changes.

    Attributes:
        network: images to features and embeddings, a FalconNetwork as the strategy and the compiler wrap it.
        probe: the online linear probe, features to class logits, wrapped likewise; None without labels.
        amp_dtype: dtype of autocast; None for float32.
        scaler: scales the gradients, for float16.
        accumulate: number of micro-batches in a step. They are computed one after the other and their gradients are averaged. It
            takes the memory of one micro-batch and makes the step of the whole batch, except for two things: the prior's mean
            assignment and BatchNorm's statistics are those of each micro-batch.
        clip_norm: largest norm of the network's gradient; 0 for no clipping. The probe's gradient is not clipped.
        average: moving average of the network's weights.
        compiled: `forward_and_loss` compiled as a whole, called in its place; None where the network is compiled separately, or
            nothing is compiled.
        group: the processes that take the step together; None for this process alone.
        bad_steps: int64 (2,), on the device of the network: the number of bad steps (see `StepMetrics.bad`) so far, and the
            number of the last steps in a row that were bad.
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
    compiled: ForwardAndLoss | None = None
    group: dist.ProcessGroup | None = None
    bad_steps: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = next((p.device for p in self.network.parameters()), None)
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Return, by name, the tensors that a resumed run needs in addition to weights and moments.

        They are the tensors themselves, so that they can be restored in place.
        """
        tensors = {"bad_steps": self.bad_steps}
        if self.scaler is not None:
            # Its state_dict() would turn them into Python numbers, for which it waits for the device.
            scale, growth = grad_scaler_state(self.scaler)
            assert scale is not None and growth is not None
            tensors |= {"scaler.scale": scale, "scaler.growth": growth}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state().items()}
        return tensors


class StepMetrics(NamedTuple):
    """What a step reports: detached 0-d tensors on the device, means over its micro-batches.

    Attributes:
        loss, prior, invariance: float32, in nats; `loss` is that of the paper, without the probe's.
        codes_used: number of distinct codes; with several micro-batches, the largest number in one of them.
        probe_accuracy: on this batch, in [0, 1]; None without labels.
        grad_norm: Euclidean norm of the network's whole gradient, over all processes, before clipping; None if it was neither
            needed for clipping nor asked for.
        bad: bool, whether the step was skipped because its loss or a gradient is not finite, the same in all processes. With a
            scaler, a step whose gradients overflow by their scale is skipped too, but is not bad: that is how a GradScaler
            finds the scale. It is bad if the loss itself is not finite, or the scale is at its minimum of 1 already. From
            `gradient`: whether the loss of this process is not finite.
    """

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor
    probe_accuracy: torch.Tensor | None
    grad_norm: torch.Tensor | None = None
    bad: torch.Tensor | None = None


ForwardAndLoss = Callable[[Learner, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, StepMetrics]]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return a context of mixed precision in `dtype`; for None, one that does nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def forward_and_loss(
    learner: Learner, views: torch.Tensor, labels: torch.Tensor | None
) -> tuple[torch.Tensor, StepMetrics]:
    """Return the scalar to minimise, and the metrics.

    The online probe learns from detached features, so that its loss adds nothing to the network's gradient.

    Args:
        views: normalised images (2 B, 3, S, S), view 1 of all B images first.
        labels: (B,) integers, or None.
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
    rate: Rate | float,
    measure_norm: bool = False,
) -> StepMetrics:
    """Take one step on one batch: forward, backward and update.

    If the loss or a gradient is not finite in any process, no process changes anything that it learns or averages.

    Args:
        views: normalised images (2 B, 3, S, S), view 1 of all B images first.
        labels: (B,) integers, or None.
        rate: makes of each parameter group's `peak_lr` its learning rate; a number is a share of the peak. It holds tensors where
            the groups' rates are tensors (graphed.py).
        measure_norm: report the norm of the gradient even if nothing is clipped.
    """
    rate = rate if isinstance(rate, Rate) else Rate(rate)
    for group in learner.optimizer.param_groups:
        lr = rate.of(group["peak_lr"])
        if torch.is_tensor(lr):
            group["lr"].copy_(lr)
        else:
            group["lr"] = lr
    learner.optimizer.zero_grad(set_to_none=True)
    statistics = Before(running_statistics(learner.network))
    metrics = gradient(learner, views, labels)
    assert metrics.bad is not None
    norm, bad = update(learner, metrics.bad, statistics, measure_norm)
    return metrics._replace(grad_norm=norm, bad=bad)


def gradient(learner: Learner, views: torch.Tensor, labels: torch.Tensor | None) -> StepMetrics:
    """Add the gradient of `forward_and_loss`, averaged over the micro-batches, to the parameters' gradients.

    Where there is a scaler, the gradient is scaled.
    """
    found: list[StepMetrics] = []
    for views_part, labels_part in micro_batches(views, labels, learner.accumulate):
        last = len(found) == learner.accumulate - 1
        with gradient_sync((learner.network, learner.probe), last):
            total, metrics = (learner.compiled or forward_and_loss)(learner, views_part, labels_part)
            total = total if learner.accumulate == 1 else total / learner.accumulate
            (total if learner.scaler is None else learner.scaler.scale(total)).backward()
        found.append(metrics._replace(bad=~torch.isfinite(total.detach())))
    return found[0] if len(found) == 1 else _mean(found)


def micro_batches(
    views: torch.Tensor, labels: torch.Tensor | None, number: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield a batch of two views (2 B, ...), view 1 first, in `number` equal parts that hold both views of their images."""
    if number == 1:
        yield views, labels
        return
    pairs = zip(*(view.chunk(number) for view in views.chunk(2)), strict=True)
    parts = [None] * number if labels is None else labels.chunk(number)
    for pair, part in zip(pairs, parts, strict=True):
        yield torch.cat(pair), part


def _mean(found: list[StepMetrics]) -> StepMetrics:
    """Return the metrics of a step from those of its micro-batches."""
    loss, prior, invariance, codes_used, accuracy, _, bad = zip(*found, strict=True)
    return StepMetrics(
        torch.stack(loss).mean(),
        torch.stack(prior).mean(),
        torch.stack(invariance).mean(),
        torch.stack(codes_used).amax(),
        None if accuracy[0] is None else torch.stack(accuracy).mean(),
        bad=torch.stack(bad).any(),
    )


def update(
    learner: Learner, loss_bad: torch.Tensor, statistics: Before, measure_norm: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Unscale and clip the gradient, take the optimiser's step, and update the average of the weights; or skip all of it.

    All processes decide alike: their flags, two numbers, are all-reduced.

    Args:
        loss_bad: 0-d bool, whether the loss of this process is not finite.
        statistics: BatchNorm's running statistics from before the forward pass.
        measure_norm: compute the norm of the gradient even if nothing is clipped.

    Returns:
        The norm of the network's gradient before clipping, a 0-d tensor, or None if it was neither needed nor asked for; and
        whether the step was bad (`StepMetrics.bad`).
    """
    optimizer, scaler, norm = learner.optimizer, learner.scaler, None
    if scaler is not None:
        scaler.unscale_(optimizer)
    found = non_finite_gradient(p for group in optimizer.param_groups for p in group["params"])
    flags = in_any_process(torch.stack((loss_bad.float(), found)), learner.group)
    loss_bad, skipped = flags[0].bool(), flags.amax()
    if learner.clip_norm or measure_norm:
        parameters = [p for p in learner.network.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if learner.clip_norm:
            clip_grads_with_norm_(parameters, learner.clip_norm, norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    step_unless(skipped, optimizer)
    bad = skipped.bool()
    if scaler is not None:
        scale, growth = grad_scaler_state(scaler)
        assert scale is not None and growth is not None
        bad = loss_bad | (bad & (scale <= SMALLEST_SCALE))
        before = Before((scale, growth))
        scaler.update()
        before.put_back_if(bad)  # a smaller scale would not help
    statistics.put_back_if(skipped)
    if learner.average is not None:
        learner.average.update(skipped)
    _count(learner.bad_steps, bad)
    return norm, bad


def _count(bad_steps: torch.Tensor, bad: torch.Tensor) -> None:
    """Update the number of bad steps, and of the last ones in a row, in place."""
    total, in_a_row = bad_steps
    total.add_(bad)
    in_a_row.add_(1).mul_(bad)
