"""One optimisation step, reading like the paper: views -> features -> embeddings -> loss -> gradient -> update.

Everything a step depends on comes in as an argument, nothing is kept between steps but what the learner holds, and nothing
waits for the device: so it can be compiled, captured and tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from falcon_fast.objective import FalconLoss


@dataclass
class Learner:
    """What learns, and by which rules: all that a step reads and changes.

    network: images to features and embeddings, a FalconNetwork as the strategy and the compiler wrap it.
    probe: the online linear probe, features to class logits, wrapped likewise; None without labels.
    amp_dtype: of autocast; None is float32.
    """

    network: nn.Module
    criterion: FalconLoss
    probe: nn.Module | None
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None = None


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


def training_step(learner: Learner, views: torch.Tensor, labels: torch.Tensor | None, lr_scale: float) -> StepMetrics:
    """Forward, backward and update for one batch, at `lr_scale` times each parameter group's `peak_lr`."""
    optimizer = learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale
    total, metrics = objective(learner, views, labels)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return metrics
