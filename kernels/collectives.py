"""Reductions over a process group that every implementation of the loss needs."""

from __future__ import annotations

import torch
import torch.distributed as dist


def log_sum_over(group: dist.ProcessGroup, log_sum: torch.Tensor, base: int | None = None) -> torch.Tensor:
    """Return log of the sum of exp(log_sum) over the processes of the group, element by element.

    It all-reduces the maximum and then the sum: a plain sum of the exponentials would already have underflowed. The result is
    differentiable if `log_sum` needs a gradient.

    log_sum: of any shape, the same in every process.  base: None for natural logarithms and exponentials, 2 for those of base 2.
    """
    exp, log = (torch.exp2, torch.log2) if base == 2 else (torch.exp, torch.log)
    maximum = log_sum.detach().clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    total = exp(log_sum - maximum)
    if total.requires_grad:
        from torch.distributed.nn.functional import all_reduce

        total = all_reduce(total, dist.ReduceOp.SUM, group=group)
    else:
        dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return log(total) + maximum


def count_flagged(flags: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return how many entries are flagged in at least one process of the group (None: in this process), int64, 0-d.

    flags: integers 0 or 1, overwritten. The host does not wait for the device.
    """
    if group is not None:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return flags.sum()
