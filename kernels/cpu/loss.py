"""The loss and its gradient on the CPU, in three sweeps over the codes that never hold the N x c matrices.

With y_v = Z_v - max_j Z_v (row by row), s_v = sum_j exp(y_v) and P_v = exp(y_v - ln s_v), views v = 1, 2:

1. rows: the maxima, ln s_v, and x_1 = E_{P_1}[y_2], x_2 = E_{P_2}[y_1]; C_12 = mean_i(ln s_1 - x_2), C_21 = mean_i(ln s_2 - x_1);
2. columns: t_j = max_i ln P_ij and ln pbar_j = t_j + ln sum_i exp(ln P_ij - t_j) - ln N, hence the prior, E_j = exp(t_j) and
   q_j = E_j ln(c pbar_j) (reverse) or -exp(t_j - ln pbar_j) / c (forward), so that with e_ij = exp(ln P_ij - t_j), which
   cannot underflow where it matters, P_ij = e_ij E_j and P_ij g_j = e_ij q_j; and a_i = sum_j e_ij q_j;
3. gradient: dL/dZ_1 = 1/(2N) (P_1 g_1 + P_1 (beta - a_1 + beta x_1 - beta y_2) - beta P_2), view 2 by symmetry,
   and dH = dZ W^T / tau.

The gradient is formed in the forward pass, kept in float32 and multiplied by the loss's own gradient in the backward pass.
To PyTorch all this is one operator, `falcon_fast::cpu_loss`, which torch.compile takes into a graph without looking inside.
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
from torch.distributed.distributed_c10d import _resolve_process_group

from falcon_fast.kernels.cpu.sweeps import Columns, Dictionary, Objective, Views, sweeps_for

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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, prior, invariance, codes in use and dL/dH (2, N, f), or without it an empty tensor."""
    n, c = views[0].shape[0], dictionary.c
    sweeps = sweeps_for(views, objective.tau, dictionary, plan, memory_budget)

    state = torch.zeros(n, 8, dtype=torch.float64)
    sweeps.rows(state)
    maxima, sums, cross, arguments = state.T.unflatten(0, (4, 2))  # each (2, N)
    terms = torch.zeros(2, n, 4)
    terms[..., 0], terms[..., 1], terms[..., 2] = maxima, sums.log(), cross / sums
    invariance_term = 0.5 * (sums.log() - (cross / sums).flip(0)).numpy().sum() / n

    columns, a = Columns(c), torch.zeros(2, n, dtype=torch.float64)
    world = 1 if objective.group is None else dist.get_world_size(objective.group)
    prior_term = 0.5 * sum(sweeps.columns(terms, columns, a, objective, math.log(n * world)))
    if objective.prior == "forward":
        prior_term -= math.log(c)
    terms[..., 3] = a

    gradient = sweeps.gradient(terms, columns, objective) if with_gradient else torch.empty(0)
    loss_term = prior_term + objective.beta * invariance_term
    loss, prior, invariance = (torch.tensor(float(x)) for x in (loss_term, prior_term, invariance_term))
    if not np.isfinite(state.numpy()).all():  # nor are the embeddings then; later sweeps may lose it
        loss, prior, invariance = (torch.tensor(math.nan) for _ in range(3))
        gradient.fill_(math.nan)
    used = _count_used(arguments.long().flatten().clamp(max=c - 1), c, objective.group)
    return loss, prior, invariance, used, gradient


@torch.library.custom_op("falcon_fast::cpu_loss", mutates_args=(), device_types="cpu")
def loss_op(
    h1: torch.Tensor,
    h2: torch.Tensor,
    words: torch.Tensor,
    c: int,
    is_hadamard: bool,
    tau: float,
    beta: float,
    prior: str,
    group_name: str,
    plan: str,
    memory_budget: int | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = _resolve_process_group(group_name) if group_name else None  # type: ignore[arg-type]
    views = h1.float().contiguous(), h2.float().contiguous()
    dictionary, objective = Dictionary(words, h1.shape[1], c, is_hadamard), Objective(tau, beta, prior, group)
    with torch.autocast("cpu", enabled=False):
        return loss_and_gradient(views, dictionary, objective, plan, memory_budget, with_gradient)


@loss_op.register_fake
def _(h1: torch.Tensor, h2: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
    loss, prior, invariance = (h1.new_empty((), dtype=torch.float32) for _ in range(3))
    gradient = h1.new_empty((2, *h1.shape) if settings[-1] else (0,), dtype=torch.float32)
    return loss, prior, invariance, h1.new_empty((), dtype=torch.int64), gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    (gradient,) = ctx.saved_tensors
    g1, g2 = (gradient * grad_loss).to(ctx.dtype)
    return g1, g2, *(None,) * 10


loss_op.register_autograd(_backward, setup_context=_setup_context)


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
    words, _, c, is_hadamard = dictionary
    tau, beta, prior, group = objective
    name = "" if group is None else group.group_name
    loss, prior_term, invariance, used, _ = loss_op(
        h1, h2, words, c, is_hadamard, tau, beta, prior, name, plan, memory_budget, with_gradient
    )
    return loss, prior_term, invariance, used
