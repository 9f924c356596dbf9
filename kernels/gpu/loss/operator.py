"""The loss as a PyTorch operator: what autograd, torch.compile and CUDA graphs see of the kernels.

`falcon_fast::loss` forms the gradient in the forward pass (the loss is a scalar, and its factor is one number) and returns it in
parts beside the readings; `falcon_fast::loss_gradient` puts it together and multiplies the loss's own gradient in. Both have
fake kernels, so that a compiler can trace through them without running anything.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from falcon_fast.kernels.gpu.loss.gradient import combine
from falcon_fast.kernels.gpu.loss.loss import falcon_loss_parts, parts_shape

__all__ = ["triton_loss"]


@torch.library.custom_op("falcon_fast::loss", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = _resolve_process_group(group_name) if group_name else None  # type: ignore[arg-type]
    readings, gradient = falcon_loss_parts(
        h1, h2, words, c, is_hadamard, tau, beta, prior, group, plan, memory_budget, with_gradient
    )
    if gradient is None:
        return *readings, torch.empty(0, device=h1.device), torch.empty(0, device=h1.device)
    return *readings, *gradient


@loss_op.register_fake
def _(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, f = (int(size) for size in h1.shape)  # the plan, and with it the number of parts, depends on the values
    parts: tuple[int, ...] = (0,)
    quantum: tuple[int, ...] = (0,)
    if with_gradient:
        parts, quantum = parts_shape(n, f, c, is_hadamard, plan, memory_budget, h1.device), (2, 2, n)
    readings = [h1.new_empty((), dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float32, torch.int64)]
    gradient = [h1.new_empty(shape, dtype=torch.float32) for shape in (parts, quantum)]
    return readings[0], readings[1], readings[2], readings[3], gradient[0], gradient[1]


@torch.library.custom_op("falcon_fast::loss_gradient", mutates_args=())
def gradient_op(
    parts: torch.Tensor, quantum: torch.Tensor, grad_loss: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return combine(parts, quantum, grad_loss, dtype)


@gradient_op.register_fake
def _(
    parts: torch.Tensor, quantum: torch.Tensor, grad_loss: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (parts.shape[1] // 2, parts.shape[2])
    return parts.new_empty(shape, dtype=dtype), parts.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    return *gradient_op(*ctx.saved_tensors, grad_loss, ctx.dtype), *(None,) * 10


loss_op.register_autograd(_backward, setup_context=_setup_context)


def triton_loss(
    h1: torch.Tensor,
    h2: torch.Tensor,
    words: torch.Tensor,
    c: int,
    is_hadamard: bool,
    tau: float,
    beta: float,
    prior: str,
    group: dist.ProcessGroup | None,
    plan: str,
    memory_budget: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (differentiable once), prior, invariance and codes in use, of embeddings (N, f) in any precision up to float32.

    The public door, `falcon_loss`, checks the arguments and says what they mean. Raises ValueError where the plan or the budget
    does not fit.
    """
    with_gradient = torch.is_grad_enabled() and (h1.requires_grad or h2.requires_grad)
    name = "" if group is None else group.group_name
    loss, prior_term, invariance, used, _, _ = loss_op(
        h1, h2, words, c, is_hadamard, tau, beta, prior, name, plan, memory_budget, with_gradient
    )
    return loss, prior_term, invariance, used
