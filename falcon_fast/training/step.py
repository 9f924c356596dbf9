"""One optimisation step, reading like the paper: views -> features -> embeddings -> loss -> gradient -> update.

Everything a step depends on comes in as an argument, nothing is kept between steps but what the modules and the optimiser
hold, and nothing waits for the device: so it can be compiled, captured and tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from falcon_fast.objective import FalconLoss


class StepMetrics(NamedTuple):
    """What a step reports: detached 0-d tensors on the device. `probe_accuracy` is of this batch, None without labels."""

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor
    probe_accuracy: torch.Tensor | None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision in `dtype`, or none for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def objective(
    network: nn.Module,
    criterion: FalconLoss,
    probe: nn.Module | None,
    views: torch.Tensor,
    labels: torch.Tensor | None,
    amp_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, StepMetrics]:
    """The scalar to minimise for normalised views (2 B, 3, S, S), view 1 first, and what to report of it.

    network: a FalconNetwork, or what wraps it: images to features and embeddings.

    The online probe learns from detached features, so its loss adds nothing to the network's gradient.
    """
    with autocast(views.device, amp_dtype):
        features, embeddings = network(views)
    h1, h2 = embeddings.chunk(2)
    loss, prior, invariance, codes_used = criterion(h1, h2)
    total, accuracy = loss, None
    if probe is not None and labels is not None:
        logits = probe(features.detach().float())
        targets = labels.repeat(2)
        total = loss + F.cross_entropy(logits, targets)
        accuracy = (logits.argmax(1) == targets).float().mean()
    return total, StepMetrics(loss.detach(), prior.detach(), invariance.detach(), codes_used, accuracy)


def training_step(
    network: nn.Module,
    criterion: FalconLoss,
    probe: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    views: torch.Tensor,
    labels: torch.Tensor | None,
    lr_scale: float,
    amp_dtype: torch.dtype | None = None,
) -> StepMetrics:
    """Forward, backward and update for one batch, at `lr_scale` times each parameter group's `peak_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale
    total, metrics = objective(network, criterion, probe, views, labels, amp_dtype)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return metrics
