"""The loss as a PyTorch operator: what autograd, torch.compile and CUDA graphs see of the kernels.

`falcon_fast::loss` computes the gradient in the forward pass (the loss is a scalar, so its own gradient is one factor) and
returns it in parts, after the loss and its terms. `falcon_fast::loss_gradient` adds the parts up and multiplies them by that
factor. Both operators have fake kernels, so that a compiler can trace through them without running anything.
"""

from __future__ import annotations

from typing import Any

import torch

from falcon_fast.kernels.gpu.loss.gradient import combine
from falcon_fast.kernels.gpu.loss.loss import falcon_loss_parts, parts_shape
from falcon_fast.kernels.spec import NO_GRADIENTS, LossSpec, operator_schema, save_gradient

__all__ = ["triton_loss"]


@torch.library.custom_op("falcon_fast::loss", mutates_args=(), schema=operator_schema(2))
def loss_op(h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
    readings, gradient = falcon_loss_parts(h1, h2, words, LossSpec.of_flat(settings))
    if gradient is None:
        return (
            *readings,
            torch.empty(0, dtype=torch.float32, device=h1.device),
            torch.empty(0, dtype=torch.float32, device=h1.device),
        )
    return *readings, *gradient


@loss_op.register_fake
def _(h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
    spec = LossSpec.of_flat(settings)
    n, f = (int(size) for size in h1.shape)  # the plan, and with it the number of parts, depends on the values
    parts: tuple[int, ...] = (0,)
    quantum: tuple[int, ...] = (0,)
    if spec.with_gradient:
        parts, quantum = parts_shape(n, f, spec, h1.device), (2, 2, n)
    readings = [h1.new_empty((), dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float32, torch.int64)]
    return *readings, *(h1.new_empty(shape, dtype=torch.float32) for shape in (parts, quantum))


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


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None, None, *NO_GRADIENTS)
    return *gradient_op(*ctx.saved_tensors, grad_loss, ctx.dtype), *NO_GRADIENTS


loss_op.register_autograd(_backward, setup_context=save_gradient)


def triton_loss(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss (differentiable once), prior, invariance and codes in use, each 0-d.

    h1, h2: embeddings (N, f) in any precision up to float32.  words: the packed signs of the dictionary (see `LossSpec`).
    `falcon_loss` checks the arguments. Raises ValueError if the plan or the budget does not fit.
    """
    loss, prior, invariance, used, _, _ = loss_op(h1, h2, words, *spec.flat())
    return loss, prior, invariance, used
