"""The loss and its gradient on the CPU, in three sweeps over the codes.

No N x c matrix is held, except the logits in 16 bits where the plan stores them.

With y_v = Z_v - max_j Z_v (row by row), s_v = sum_j exp(y_v) and P_v = exp(y_v - ln s_v) for the views v = 1, 2:

1. rows: the maxima, ln s_v, x_1 = E_{P_1}[y_2] and x_2 = E_{P_2}[y_1]; C_12 = mean_i(ln s_1 - x_2), C_21 = mean_i(ln s_2 - x_1);
2. columns: t_j = max_i ln P_ij and ln pbar_j = t_j + ln sum_i exp(ln P_ij - t_j) - ln N, which give the prior. With E_j =
   exp(t_j), q_j = E_j ln(c pbar_j) (reverse prior) or -exp(t_j - ln pbar_j) / c (forward prior), and e_ij = exp(ln P_ij - t_j),
   which cannot underflow where it matters: P_ij = e_ij E_j, P_ij g_j = e_ij q_j, and a_i = sum_j e_ij q_j;
3. gradient: dL/dZ_1 = 1/(2N) (P_1 g_1 + P_1 (beta - a_1 + beta x_1 - beta y_2) - beta P_2), view 2 by symmetry,
   and dH = dZ W^T / tau.

The gradient is computed in the forward pass, kept in float32, and multiplied by the gradient of the loss in the backward pass.
PyTorch sees a single operator, `falcon_fast::cpu_loss`, which torch.compile takes into a graph without looking inside.
The sweeps run in C++ (level.hpp) if the extension is built, otherwise in PyTorch (fallback.py), one strip of codes at a time.
With AVX-512 VNNI a dense product takes the embeddings and dZ in 16-bit fixed point (one scale for each row, or for each 128
codes of a row; the codes are -1 and +1 and the sums are exact), or in float32 where the rounding could be felt. Otherwise torch
computes it. The results have the same bits for any number of threads, except where torch computes the product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from falcon_fast.kernels.collectives import count_flagged
from falcon_fast.kernels.cpu.sweeps import Columns, Views, sweeps_for
from falcon_fast.kernels.spec import NO_GRADIENTS, LossSpec, operator_schema, save_gradient

__all__ = ["cpu_loss"]


def _count_used(arguments: torch.Tensor, c: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return torch.tensor(torch.unique(arguments).numel())
    used = torch.zeros(c, dtype=torch.int32)
    used[arguments] = 1
    return count_flagged(used, group)


def loss_and_gradient(
    views: Views, words: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, prior, invariance, codes in use and dL/dH (2, N, f), or an empty tensor in its place if it is not wanted."""
    n, c = views[0].shape[0], spec.c
    sweeps = sweeps_for(views, words, spec)

    state = torch.zeros(n, 8, dtype=torch.float64)
    sweeps.rows(state)
    maxima, sums, cross, arguments = state.T.unflatten(0, (4, 2))  # each (2, N)
    terms = torch.zeros(2, n, 4, dtype=torch.float32)
    terms[..., 0], terms[..., 1], terms[..., 2] = maxima, sums.log(), cross / sums
    invariance_term = 0.5 * (sums.log() - (cross / sums).flip(0)).numpy().sum() / n

    columns, a = Columns(c), torch.zeros(2, n, dtype=torch.float64)
    prior_term = 0.5 * sum(sweeps.columns(terms, columns, a, math.log(n * spec.world_size)))
    if spec.forward:
        prior_term -= math.log(c)
    terms[..., 3] = a

    gradient = sweeps.gradient(terms, columns) if spec.with_gradient else torch.empty(0, dtype=torch.float32)
    loss_term = prior_term + spec.beta * invariance_term
    loss, prior, invariance = (
        torch.tensor(float(x), dtype=torch.float32) for x in (loss_term, prior_term, invariance_term)
    )
    if not np.isfinite(state.numpy()).all():  # nor are the embeddings then; the later sweeps may lose that
        loss, prior, invariance = (torch.tensor(math.nan, dtype=torch.float32) for _ in range(3))
        gradient.fill_(math.nan)
    used = _count_used(arguments.long().flatten().clamp(max=c - 1), c, spec.group)
    return loss, prior, invariance, used, gradient


@torch.library.custom_op("falcon_fast::cpu_loss", mutates_args=(), device_types="cpu", schema=operator_schema(1))
def loss_op(h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
    views = h1.float().contiguous(), h2.float().contiguous()
    with torch.autocast("cpu", enabled=False):
        return loss_and_gradient(views, words, LossSpec.of_flat(settings))


@loss_op.register_fake
def _(h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
    loss, prior, invariance = (h1.new_empty((), dtype=torch.float32) for _ in range(3))
    shape = (2, *h1.shape) if LossSpec.of_flat(settings).with_gradient else (0,)
    return loss, prior, invariance, h1.new_empty((), dtype=torch.int64), h1.new_empty(shape, dtype=torch.float32)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None, None, *NO_GRADIENTS)
    (gradient,) = ctx.saved_tensors
    g1, g2 = (gradient * grad_loss).to(ctx.dtype)
    return g1, g2, *NO_GRADIENTS


loss_op.register_autograd(_backward, setup_context=save_gradient)


def cpu_loss(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss (differentiable once), prior, invariance and codes in use, each 0-d.

    h1, h2: embeddings (N, f) in any precision up to float32.  words: the packed signs of the dictionary (see `LossSpec`).
    `falcon_loss` checks the arguments. Raises ValueError if the plan or the budget does not fit.
    """
    loss, prior, invariance, used, _ = loss_op(h1, h2, words, *spec.flat())
    return loss, prior, invariance, used
