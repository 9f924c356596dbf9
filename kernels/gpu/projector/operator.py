"""The projector as PyTorch operators: what autograd, torch.compile and CUDA graphs see of its kernels.

An operator with a derivative must not change its inputs, but BatchNorm changes its running averages. The product and the
statistics
therefore come first, without autograd: `falcon_fast::projector_product`, and `falcon_fast::batch_statistics`, which updates the
averages, or `falcon_fast::running_statistics`. From their results `falcon_fast::projector` computes the embeddings. Its
derivative, `falcon_fast::projector_gradient`, is that of the whole projector, through statistics and product to features and
parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from falcon_fast.kernels.gpu.projector.batchnorm import Averages, batch_statistics, running_statistics
from falcon_fast.kernels.gpu.projector.projector import gradients, normalise, product
from falcon_fast.kernels.torch_private import process_group_named

__all__ = ["Averages", "triton_projector"]


def _group(name: str) -> dist.ProcessGroup | None:
    return process_group_named(name) if name else None


@torch.library.custom_op("falcon_fast::projector_product", mutates_args=())
def product_op(features: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return product(features.to(dtype), weight.to(dtype).t(), torch.float32)


@product_op.register_fake
def _(features: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return features.new_empty((features.shape[0], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("falcon_fast::batch_statistics", mutates_args=("running_mean", "running_variance"))
def batch_statistics_op(
    x: torch.Tensor,
    views: int,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    group_name: str,
) -> torch.Tensor:
    averages = None
    if running_mean is not None and running_variance is not None and tracked is not None:
        averages = Averages(running_mean, running_variance, tracked, momentum)
    return batch_statistics(x, views, bias, averages, eps, _group(group_name))


@batch_statistics_op.register_fake
def _(
    x: torch.Tensor,
    views: int,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    group_name: str,
) -> torch.Tensor:
    return x.new_empty((4, views, x.shape[1]))


@torch.library.custom_op("falcon_fast::running_statistics", mutates_args=())
def running_statistics_op(mean: torch.Tensor, variance: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return running_statistics(mean, variance, bias, eps)


@running_statistics_op.register_fake
def _(mean: torch.Tensor, variance: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return mean.new_empty((4, 1, mean.shape[0]))


@torch.library.custom_op("falcon_fast::projector", mutates_args=())
def projector_op(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    row_norm: float | None,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return normalise(x, statistics, gamma, beta, row_norm, dtype)


@projector_op.register_fake
def _(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    row_norm: float | None,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(0 if row_norm is None else x.shape[0])


@torch.library.custom_op("falcon_fast::projector_gradient", mutates_args=())
def gradient_op(
    g: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    length: torch.Tensor,
    row_norm: float | None,
    product_dtype: torch.dtype,
    group_name: str,
    needs_features: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dgamma, dbeta, dbias = gradients(
        g, x, statistics, gamma, beta, length, row_norm, product_dtype, _group(group_name)
    )
    dfeatures, dweight = features.new_empty(0), weight.new_empty(0)
    if needs_features:
        dfeatures = product(dx, weight.to(product_dtype), features.dtype)
    if needs_weight:
        dweight = product(dx.t(), features.to(product_dtype), weight.dtype)
    return dfeatures, dweight, dbias, dgamma, dbeta


@gradient_op.register_fake
def _(
    g: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    length: torch.Tensor,
    row_norm: float | None,
    product_dtype: torch.dtype,
    group_name: str,
    needs_features: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dfeatures = features.new_empty(features.shape if needs_features else (0,))
    dweight = weight.new_empty(weight.shape if needs_weight else (0,))
    return dfeatures, dweight, torch.empty_like(gamma), torch.empty_like(gamma), torch.empty_like(gamma)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    features, weight, _, gamma, beta, x, statistics, row_norm, _, product_dtype, group_name = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, weight, gamma, beta, x, statistics, output[1])
    ctx.settings = row_norm, product_dtype, group_name


def _backward(ctx: Any, g: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    wanted = ctx.needs_input_grad[:5]
    found = gradient_op(g, *ctx.saved_tensors, *ctx.settings, wanted[0], wanted[1])
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), *(None,) * 6


projector_op.register_autograd(_backward, setup_context=_setup_context)


def triton_projector(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    *,
    views: int,
    batch: bool,
    averages: Averages | None,
    eps: float,
    row_norm: float | None,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Return embeddings (M, f) in `dtype` of features (M, d); float32 parameters weight (f, d), bias, gamma and beta (f,).

    batch: True normalises by the statistics of each of the `views` equal parts of the rows, over the processes of the group, and
    updates the averages and their count, unless they are None. False normalises by the averages.  row_norm: the length of l2
    rows; None for tanh.  product_dtype: dtype in which features and weight, and their gradients, are multiplied (the result is
    float32).

    Raises ValueError if the features are not a matrix, cannot be divided into the views, or have too few rows for statistics.
    """
    if features.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(f"features must be a matrix (N, {weight.shape[1]}), not {tuple(features.shape)}")
    name = "" if group is None or not batch else group.group_name
    if batch:
        rows = features.shape[0]
        if rows % views:
            raise ValueError(f"a batch of {rows} rows cannot be divided into {views} views of the same images")
        if rows == views and not name:
            raise ValueError(f"BatchNorm needs more than one row per view in training, not {rows // views}")
    with torch.no_grad():
        x = product_op(features, weight, product_dtype)
        if batch:
            if averages is not None:
                averages.tracked.add_(views)
            mean, variance, tracked, momentum = averages or (None, None, None, None)
            statistics = batch_statistics_op(x, views, bias, mean, variance, tracked, momentum, eps, name)
        else:
            assert averages is not None
            statistics = running_statistics_op(averages.mean, averages.variance, bias, eps)
    outputs: tuple[torch.Tensor, torch.Tensor] = projector_op(
        features, weight, bias, gamma, beta, x, statistics, row_norm, dtype, product_dtype, name
    )
    return outputs[0]
