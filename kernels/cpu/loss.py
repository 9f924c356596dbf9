"""The loss and its gradient on the CPU, in three sweeps over the codes that never hold the N x c matrices.

With y_v = Z_v - max_j Z_v (row by row), s_v = sum_j exp(y_v) and P_v = exp(y_v - ln s_v), views v = 1, 2:

1. rows: the maxima, ln s_v, and x_1 = E_{P_1}[y_2], x_2 = E_{P_2}[y_1]; C_12 = mean_i(ln s_1 - x_2), C_21 = mean_i(ln s_2 - x_1);
2. columns: t_j = max_i ln P_ij and ln pbar_j = t_j + ln sum_i exp(ln P_ij - t_j) - ln N, hence the prior, E_j = exp(t_j) and
   q_j = E_j ln(c pbar_j) (reverse) or -exp(t_j - ln pbar_j) / c (forward), so that with e_ij = exp(ln P_ij - t_j), which
   cannot underflow where it matters, P_ij = e_ij E_j and P_ij g_j = e_ij q_j; and a_i = sum_j e_ij q_j;
3. gradient: dL/dZ_1 = 1/(2N) (P_1 g_1 + P_1 (beta - a_1 + beta x_1 - beta y_2) - beta P_2), view 2 by symmetry,
   and dH = dZ W^T / tau.

The gradient is formed in the forward pass, kept in float32 and multiplied by the loss's own gradient in the backward pass.
Where the extension is built the sweeps run in C++ (level.hpp), otherwise in PyTorch (fallback.py), strip by strip of codes.
With AVX-512 VNNI a dense product takes the embeddings and dZ as 16-bit fixed point (rows, or rows of 128 codes, to one
scale; the codes are -1 and +1 and the sums exact), or as float32 where the rounding could be felt; otherwise it is torch's.
Results are the same bits for any number of threads, where the product is not torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from falcon_fast.kernels.cpu.sweeps import Columns, Dictionary, Objective, Views, sweeps_for
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

__all__ = ["Dictionary", "Objective", "cpu_loss"]


def _count_used(arguments: torch.Tensor, c: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return torch.tensor(torch.unique(arguments).numel())
    used = torch.zeros(c, dtype=torch.int32)
    used[arguments] = 1
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    return used.sum()


def loss_and_gradient(
    views: Views,
    dictionary: Dictionary,
    objective: Objective,
    plan: str,
    memory_budget: int | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Views | None]:
    """Loss, prior, invariance, codes in use and dL/dH (or None)."""
    n, c = views[0].shape[0], dictionary.c
    sweeps = sweeps_for(views, objective.tau, dictionary, plan, memory_budget)

    state = torch.zeros(n, 8, dtype=torch.float64)
    sweeps.rows(state)
    maxima, sums, cross, arguments = state.T.unflatten(0, (4, 2))  # each (2, N)
    terms = torch.zeros(2, n, 4)
    terms[..., 0], terms[..., 1], terms[..., 2] = maxima, sums.log(), cross / sums
    invariance = 0.5 * (sums.log() - (cross / sums).flip(0)).numpy().sum() / n

    columns, a = Columns(c), torch.zeros(2, n, dtype=torch.float64)
    world = 1 if objective.group is None else dist.get_world_size(objective.group)
    prior = 0.5 * sum(sweeps.columns(terms, columns, a, objective, math.log(n * world)))
    if objective.prior == "forward":
        prior -= math.log(c)
    terms[..., 3] = a

    gradient = None
    if with_gradient:
        gradient = sweeps.gradient(terms, columns, objective)
    loss, prior, invariance = (torch.tensor(float(x)) for x in (prior + objective.beta * invariance, prior, invariance))
    if not np.isfinite(state.numpy()).all():  # nor are the embeddings then; later sweeps may lose it
        loss, prior, invariance = (torch.tensor(math.nan) for _ in range(3))
        for g in gradient or ():
            g.fill_(math.nan)
    used = _count_used(arguments.long().flatten().clamp(max=c - 1), c, objective.group)
    return loss, prior, invariance, used, gradient


class _CpuLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h1: torch.Tensor, h2: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
        *outputs, gradient = loss_and_gradient((h1.float().contiguous(), h2.float().contiguous()), *settings)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(h1, h2)
        ctx.gradient, ctx.dtype, ctx.settings = gradient, h1.dtype, settings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        # The gradient's memory is given away: a copy costs a tenth of a Hadamard step. A second backward (retain_graph) forms
        # it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            h1, h2 = ctx.saved_tensors
            gradient = loss_and_gradient((h1.float().contiguous(), h2.float().contiguous()), *ctx.settings)[-1]
        factor = grad_loss.item()
        g1, g2 = ((g if factor == 1 else g.mul_(factor)).to(ctx.dtype) for g in gradient)
        return g1, g2, None, None, None, None, None


# C++ reads and writes the tensors behind the compiler's back. torch.compiler.disable would make `import falcon_fast` import the
# compiler and triton; this is the same, put off to the first call.
@_disable_dynamo
def cpu_loss(
    h1: torch.Tensor,
    h2: torch.Tensor,
    dictionary: Dictionary,
    objective: Objective,
    plan: str,
    memory_budget: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (differentiable once), prior, invariance and codes in use, of embeddings (N, f) in any precision up to float32.

    The dense plans: `stored`, `streaming`, or `auto`, stored where it fits the budget. The public door, `falcon_loss`, checks
    the arguments.
    """
    with_gradient = torch.is_grad_enabled() and (h1.requires_grad or h2.requires_grad)
    with torch.autocast("cpu", enabled=False):
        loss, prior, invariance, used = _CpuLoss.apply(
            h1, h2, dictionary, objective, plan, memory_budget, with_gradient
        )
    return loss, prior, invariance, used
