"""BatchNorm whose statistics are per view, for two views that travel in one batch; and over processes, where asked.

FALCON's views go through the network one after the other as published, so each is normalised by its own statistics.
Here they go through together (one set of kernels, twice the batch) and the BatchNorm layers alone take them apart: outputs,
gradients and running statistics are as if view 1 and then view 2 had passed separately.

Synchronised over a process group, every layer makes one all-reduce forward and one backward, both views in it, and then gives
what one process with the whole batch would. torch's own SyncBatchNorm takes GPUs only, breaks a compiled graph and knows no
views.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from falcon_fast.kernels.torch_private import BatchNormBase as _BatchNorm
from falcon_fast.kernels.torch_private import functional_collectives

funcol = functional_collectives()


class PerView:
    """Mixin that makes a BatchNorm class normalise each of `num_views` equal parts of a training batch by itself.

    Evaluation uses the running statistics, which do not know views, and is left as it is.
    """

    num_views: int = 2
    known_forward: bool  # BatchNorm's own, or timm's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        if x.shape[0] % self.num_views:
            raise ValueError(f"a batch of {x.shape[0]} does not hold {self.num_views} views of the same images")
        # Measured on a CPU; on a GPU the compiled step of the README has the views apart.
        if torch.compiler.is_compiling() and self.known_forward and x.device.type == "cpu":
            return self._in_one_graph(x)
        views = [super(PerView, self).forward(view) for view in x.chunk(self.num_views)]  # type: ignore[misc]
        return torch.cat(views)

    def _in_one_graph(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The same for a compiler: both views at once, and no copy of them between this layer and the next."""
        self._check_input_dim(x)
        count = x.numel() // x.shape[1] // self.num_views
        if count < 2:
            raise ValueError(f"BatchNorm needs more than one value a channel and view, not {tuple(x.shape)}")
        views = x.unflatten(0, (self.num_views, -1))
        y, means, variances = _NormalizeViews.apply(views, self.weight, self.bias, self.eps)
        _track(self, means, variances, count)
        return _act(self, y.flatten(0, 1))


def _does_more(cls: type) -> str | None:
    """The class, if any, whose forward is neither BatchNorm's nor, with an activation and dropout behind it, timm's."""
    own = next(c for c in cls.__mro__ if "forward" in vars(c) and c not in (PerView, Synchronized))
    return None if own is _BatchNorm or own.__name__ == "BatchNormAct2d" else own.__name__


def _track(layer: Any, means: torch.Tensor, variances: torch.Tensor, count: int) -> None:
    """Running averages, in place, as if the views had passed one after the other, from their mean and biased variance (V, C)."""
    if not layer.track_running_stats:
        return
    for mean, variance in zip(means, variances, strict=True):
        layer.num_batches_tracked.add_(1)
        momentum = 1.0 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
        unbiased = variance * (count / (count - 1))
        layer.running_mean.copy_(layer.running_mean + momentum * (mean - layer.running_mean))
        layer.running_var.copy_(layer.running_var + momentum * (unbiased - layer.running_var))


def _act(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What timm's BatchNormAct2d does besides."""
    for name in ("drop", "act"):
        if name in layer._modules:
            y = getattr(layer, name)(y)
    return y


class _NormalizeViews(torch.autograd.Function):
    """Batch normalisation of each view by its own statistics, written for a compiler.

    Takes x (V, B, C, ...), weight and bias (C,) or None; returns y like x, and in float32 (float64 for float64) the mean and the
    biased variance (V, C), which carry no gradient.

    A view is an index here, not a tensor: taken apart and put together again, the views are written once more, and what follows
    (a ReLU, an addition) reads them once more. The variance takes a pass of its own over x, which costs a compiled step less
    than Welford's recurrence (ResNet-8, batch 128 on two cores: 574 ms against 596, and 646 with two views apart).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dims, shape = _per_view(x)
        wide = x.to(_wide(x))
        mean = wide.mean(dims)
        variance = (wide - mean.view(shape)).square().mean(dims)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = wide * scale.view(shape) + shift.view(shape)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, variance)
        # Not y.to() where it changes nothing: compiled by torch 2.11 the gradient of x is then zero.
        return (y if y.dtype == x.dtype else y.to(x.dtype)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dims, shape = _per_view(x)
        wide, grad = x.to(mean.dtype), grad.to(mean.dtype)
        along = grad.sum(dims)
        across = (grad * (wide - mean.view(shape))).sum(dims) * inverse
        # dL/dx = scale (grad - along / n - normalised across / n), as a multiple of each of grad, x and 1
        scale = inverse if weight is None else inverse * weight
        count = x.numel() // mean.numel()
        of_x = -scale * inverse * across / count
        of_one = -scale * along / count - of_x * mean
        grad_x = grad * scale.view(shape) + (wide * of_x.view(shape) + of_one.view(shape))
        return (
            grad_x.to(x.dtype),
            None if weight is None else across.sum(0).to(weight.dtype),
            along.sum(0) if ctx.has_bias else None,
            None,
        )


def _per_view(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """Of x (V, B, C, ...): the dimensions that statistics are over, and the shape in which a (V, C) meets it."""
    return [1, *range(3, x.dim())], [x.shape[0], 1, -1] + [1] * (x.dim() - 3)


@functools.cache
def _per_view_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"PerView{cls.__name__}", (PerView, cls), {"known_forward": _does_more(cls) is None})


def per_view_batchnorm(module: nn.Module, num_views: int = 2) -> nn.Module:
    """Give every BatchNorm layer inside `module` per-view statistics, in place; returns `module`.

    Works for torch's BatchNorm1d/2d/3d and for subclasses with a forward of their own (timm's BatchNormAct2d). Parameters,
    buffers and the keys of the state dict stay the same.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            if not isinstance(layer, PerView | Synchronized):  # the latter knows views itself
                layer.__class__ = _per_view_class(type(layer))  # type: ignore[arg-type]
            layer.num_views = num_views  # type: ignore[assignment]
    return module


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any layer of `module` is a BatchNorm, which cannot train on a single image a view."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


class _NormalizeOverGroup(torch.autograd.Function):
    """Batch normalisation of each view by its statistics over a process group, every process holding as many rows.

    Takes x (V B, C, ...), weight and bias (C,) or None; returns y like x, and in float32 (float64 for float64) the mean and the
    biased variance (V, C) over the group, which carry no gradient. The gradients of weight and bias are this process's own share,
    which the data-parallel strategy averages with the others as it does every parameter's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        num_views: int,
        eps: float,
        group: Any,  # its name
        rank: int,
        world_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dims, shape = _reduced(x), _per_channel(x)
        views = [view.to(_wide(x)) for view in x.chunk(num_views)]
        # Mean and variance rather than sums of values and squares, which in float32 lose a variance 10^6 times below the mean's
        # square. By mean() and not var_mean(), which is slow on channels_last (128 x 64 x 16 x 16 on two cores: 6.3 ms against
        # 0.5 for two sums).
        means = torch.stack([view.mean(dims) for view in views])
        variances = torch.stack(
            [(view - mean.view(shape)).square().mean(dims) for view, mean in zip(views, means, strict=True)]
        )
        # A gather as the sum of vectors that are zero in the others' places: exact, the same bits in every process, and
        # all_reduce is the one functional collective whose name is the same in every torch from 2.11 on.
        local = torch.stack([means, variances])
        gathered = F.one_hot(torch.tensor(rank), world_size).to(local)[:, None, None, None] * local
        gathered = funcol.wait_tensor(funcol.all_reduce(gathered, "sum", group))
        mean = gathered[:, 0].mean(0)
        variance = gathered[:, 1].mean(0) + (gathered[:, 0] - mean).square().mean(0)
        inverse = torch.rsqrt(variance + eps)

        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = torch.cat(
            [torch.addcmul(b.view(shape), v, a.view(shape)) for v, a, b in zip(views, scale, shift, strict=True)]
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.has_bias, ctx.group, ctx.world_size = bias is not None, group, world_size
        ctx.mark_non_differentiable(mean, variance)
        # Not y.to() where it changes nothing: compiled by torch 2.11 the gradient of x is then zero.
        return (y if y.dtype == x.dtype else y.to(x.dtype)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dims, shape, num_views = _reduced(x), _per_channel(x), mean.shape[0]
        grads = [view.to(mean.dtype) for view in grad.chunk(num_views)]
        normalized = [
            (view.to(mean.dtype) - m.view(shape)) * i.view(shape)
            for view, m, i in zip(x.chunk(num_views), mean, inverse, strict=True)
        ]
        sums = torch.stack(
            [
                torch.stack([g.sum(dims) for g in grads]),
                torch.stack([(g * n).sum(dims) for g, n in zip(grads, normalized, strict=True)]),
            ]
        )
        total = funcol.wait_tensor(funcol.all_reduce(sums, "sum", ctx.group))
        along, across = total / (x.numel() // x.shape[1] // num_views * ctx.world_size)
        scale = inverse if weight is None else inverse * weight
        grad_x = torch.cat(
            [
                s.view(shape) * (g - a.view(shape) - n * c.view(shape))
                for g, n, s, a, c in zip(grads, normalized, scale, along, across, strict=True)
            ]
        )
        bias_grad, weight_grad = sums.sum(1)
        return (
            grad_x.to(x.dtype),
            None if weight is None else weight_grad.to(weight.dtype),
            bias_grad.to(mean.dtype) if ctx.has_bias else None,
            *(None,) * 5,
        )


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reduced(x: torch.Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _per_channel(x: torch.Tensor) -> list[int]:
    """The shape in which a vector of C numbers meets x."""
    return [-1] + [1] * (x.dim() - 2)


class Synchronized:
    """Mixin that makes a BatchNorm class take the statistics of a training batch over a process group, view by view."""

    num_views: int = 1
    group_name: str
    group_rank: int
    group_size: int

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc]
        self._check_input_dim(x)
        if x.shape[0] % self.num_views:
            raise ValueError(f"a batch of {x.shape[0]} does not hold {self.num_views} views of the same images")
        count = x.numel() // x.shape[1] // self.num_views * self.group_size
        if count < 2:
            raise ValueError(
                f"BatchNorm needs more than one value a channel and view, not {tuple(x.shape)} in one process"
            )
        y, means, variances = _NormalizeOverGroup.apply(
            x, self.weight, self.bias, self.num_views, self.eps, self.group_name, self.group_rank, self.group_size
        )
        _track(self, means, variances, count)
        return _act(self, y)


@functools.cache
def _synchronized_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Synchronized{cls.__name__}", (Synchronized, cls), {})


def sync_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Let every BatchNorm layer inside `module` take its training statistics over `group`, in place; returns `module`.

    Outputs, input gradients and running statistics are those of one process with all rows; every process must bring equally many.
    Per-view layers stay so, before or after. Runs on any backend and inside torch.compile (fullgraph). Parameters, buffers
    and the keys of the state dict stay the same.

    Raises:
        ValueError: a layer whose forward does more than BatchNorm, in a way that is not known here.
    """
    for layer in module.modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, Synchronized):
            if (other := _does_more(type(layer))) is not None:
                raise ValueError(f"cannot synchronise {other}: its forward is not BatchNorm's alone")
            layer.__class__ = _synchronized_class(type(layer))  # type: ignore[arg-type]
        layer.group_name = group.group_name  # type: ignore[assignment]
        layer.group_rank, layer.group_size = dist.get_rank(group), dist.get_world_size(group)  # type: ignore[assignment]
    return module
