"""The objective in plain eager PyTorch: the ground truth that the tests compare every fused implementation with.

With logits Z_v = H_v W / tau and assignments P_v = softmax(Z_v), row by row, for the views v = 1, 2, and the mean
assignment pbar_v = mean_i P_v[i] over the batch (arXiv 2410.04959; section 1 of its method, terms as in the published code):

    prior, reverse    K_v = sum_j pbar_vj ln(c pbar_vj)             = KL(pbar_v || uniform)
    prior, forward    K_v = -(1/c) sum_j ln pbar_vj - ln c          = KL(uniform || pbar_v)
    invariance        C_12 = -(1/N) sum_ij P_2[ij] ln P_1[ij], and C_21 likewise
    loss              1/2 (K_1 + K_2) + beta/2 (C_12 + C_21)

Nothing is detached: both views carry gradient through both factors. Everything stays in the log domain: ln P is a log-softmax
and ln pbar_j = logsumexp_i ln P[ij] - ln N, so no probability is rounded to zero before its logarithm is taken (for that reason
the published code gives NaN in float32 at the theoretical optimum).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F

from falcon_fast.kernels.collectives import count_flagged, log_sum_over

# Number of N x c matrices (one view's logits) that forward and backward hold at their peak: 2 views x (logits, ln P, P, their
# gradients and one temporary). tests/objective/test_reference.py counts them with the allocator.
PEAK_COPIES = 14


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without mixed precision on `device`; on a device that has none, like meta, one that does nothing."""
    # Not torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def log_mean_assignment(log_p: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return ln pbar (c,) from ln P (N, c), over this process's batch, or over the group's, in which every process holds N rows.

    Over a group it is a log-sum-exp of log-sum-exps: a mean of the probabilities would already have underflowed.
    """
    log_sum = torch.logsumexp(log_p, dim=0)
    if group is None:
        return log_sum - math.log(log_p.shape[0])
    return log_sum_over(group, log_sum) - math.log(log_p.shape[0] * dist.get_world_size(group))


def prior_term(log_pbar: torch.Tensor, prior: str) -> torch.Tensor:
    """Return the divergence of the mean assignment from uniform, 0-d, from ln pbar (c,); `prior` is `reverse` or `forward`."""
    log_c = math.log(log_pbar.shape[0])
    if prior == "reverse":
        return torch.sum(torch.exp(log_pbar) * (log_pbar + log_c))
    return -torch.mean(log_pbar) - log_c


def count_used(z1: torch.Tensor, z2: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return how many distinct codes are the argmax of at least one row of either view, int64, 0-d, from logits (N, c).

    The host does not wait for the device.
    """
    none = torch.zeros(z1.shape[1], dtype=torch.int32, device=z1.device)
    return count_flagged(none.scatter(0, torch.cat((z1.argmax(1), z2.argmax(1))), 1), group)


def reference_loss(
    h1: torch.Tensor,
    h2: torch.Tensor,
    w: torch.Tensor,
    tau: float,
    beta: float,
    prior: str,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, prior, invariance (0-d, differentiable) and codes in use for embeddings (N, f) and a dense dictionary (f, c).

    Everything is computed in the dtype of `h1`. The public function, `falcon_loss`, checks the arguments.
    """
    z1, z2 = (h1 / tau) @ w, (h2 / tau) @ w
    log_p1, log_p2 = F.log_softmax(z1, dim=1), F.log_softmax(z2, dim=1)

    prior_1 = prior_term(log_mean_assignment(log_p1, group), prior)
    prior_2 = prior_term(log_mean_assignment(log_p2, group), prior)
    cross_12 = -torch.sum(torch.exp(log_p2) * log_p1, dim=1).mean()
    cross_21 = -torch.sum(torch.exp(log_p1) * log_p2, dim=1).mean()

    prior_value = 0.5 * (prior_1 + prior_2)
    invariance = 0.5 * (cross_12 + cross_21)
    return prior_value + beta * invariance, prior_value, invariance, count_used(z1.detach(), z2.detach(), group)
