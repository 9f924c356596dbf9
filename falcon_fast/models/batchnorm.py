"""BatchNorm with separate statistics for each of two views that share one batch; also over several processes.

In the published code the two views pass through the network one after the other, so each is normalised with its own statistics.
Here they pass together (one set of kernels, twice the batch), and only the BatchNorm layers separate them: outputs, gradients and
running statistics are as if view 1 and then view 2 had passed alone.

Synchronised over a process group, every layer makes one all-reduce in the forward and one in the backward pass, for both views,
and then gives the same result as one process with the whole batch. torch's own SyncBatchNorm works on GPUs only, breaks a
compiled graph, and cannot separate views.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from falcon_fast.kernels.torch_private import BatchNormBase as _BatchNorm
from falcon_fast.models.normalization import NormalizeOverGroup, NormalizeViews


class PerView:
    """Mixin that makes a BatchNorm class normalise each of `num_views` equal parts of a training batch separately.

    Evaluation is unchanged: it uses the running statistics, which both views share.
    """

    num_views: int = 2
    known_forward: bool  # whether the forward is BatchNorm's own, or timm's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc,no-any-return]
        if x.shape[0] % self.num_views:
            raise ValueError(f"a batch of {x.shape[0]} does not hold {self.num_views} views of the same images")
        # Measured on a CPU. On a GPU the compiled step of the README keeps the views separate.
        if torch.compiler.is_compiling() and self.known_forward and x.device.type == "cpu":
            return self._in_one_graph(x)
        views = [super(PerView, self).forward(view) for view in x.chunk(self.num_views)]  # type: ignore[misc]
        return torch.cat(views)

    def _in_one_graph(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The same for a compiler: both views at once, with no copy of them between this layer and the next."""
        self._check_input_dim(x)
        count = x.numel() // x.shape[1] // self.num_views
        if count < 2:
            raise ValueError(f"BatchNorm needs more than one value per channel and view, not {tuple(x.shape)}")
        views = x.unflatten(0, (self.num_views, -1))
        y, means, variances = NormalizeViews.apply(views, self.weight, self.bias, self.eps)
        _track(self, means, variances, count)
        return _act(self, y.flatten(0, 1))


def _does_more(cls: type) -> str | None:
    """Return the name of the class whose forward does more than BatchNorm; None if there is none.

    timm's BatchNormAct2d, which adds an activation and dropout, is known and does not count.
    """
    own = next(c for c in cls.__mro__ if "forward" in vars(c) and c not in (PerView, Synchronized))
    return None if own is _BatchNorm or own.__name__ == "BatchNormAct2d" else own.__name__


def _track(layer: Any, means: torch.Tensor, variances: torch.Tensor, count: int) -> None:
    """Update the running averages in place as if the views had passed one after the other.

    means, variances: (V, C), the variances biased.  count: values per channel and view.
    """
    if not layer.track_running_stats:
        return
    for mean, variance in zip(means, variances, strict=True):
        layer.num_batches_tracked.add_(1)
        momentum = 1.0 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
        unbiased = variance * (count / (count - 1))
        layer.running_mean.copy_(layer.running_mean + momentum * (mean - layer.running_mean))
        layer.running_var.copy_(layer.running_var + momentum * (unbiased - layer.running_var))


def _act(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Apply what timm's BatchNormAct2d adds to BatchNorm: dropout and an activation."""
    for name in ("drop", "act"):
        if name in layer._modules:
            y = getattr(layer, name)(y)
    return y


@functools.cache
def _per_view_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"PerView{cls.__name__}", (PerView, cls), {"known_forward": _does_more(cls) is None})


def per_view_batchnorm(module: nn.Module, num_views: int = 2) -> nn.Module:
    """Give every BatchNorm layer inside `module` statistics per view, in place; return `module`.

    Works for torch's BatchNorm1d/2d/3d and for subclasses with their own forward (timm's BatchNormAct2d). Parameters, buffers and
    the keys of the state dict stay the same.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            if not isinstance(layer, PerView | Synchronized):  # Synchronized handles views itself
                layer.__class__ = _per_view_class(type(layer))  # type: ignore[arg-type]
            layer.num_views = num_views  # type: ignore[assignment]
    return module


def has_batchnorm(module: nn.Module) -> bool:
    """Check whether any layer of `module` is a BatchNorm, which cannot train on a single image per view."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


class Synchronized:
    """Mixin that makes a BatchNorm class take its training statistics over a process group, for each view separately."""

    num_views: int = 1
    group_name: str
    group_rank: int
    group_size: int

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        self._check_input_dim(x)
        if x.shape[0] % self.num_views:
            raise ValueError(f"a batch of {x.shape[0]} does not hold {self.num_views} views of the same images")
        count = x.numel() // x.shape[1] // self.num_views * self.group_size
        if count < 2:
            raise ValueError(
                f"BatchNorm needs more than one value per channel and view, not {tuple(x.shape)} in one process"
            )
        y, means, variances = NormalizeOverGroup.apply(
            x, self.weight, self.bias, self.num_views, self.eps, self.group_name, self.group_rank, self.group_size
        )
        _track(self, means, variances, count)
        return _act(self, y)


@functools.cache
def _synchronized_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Synchronized{cls.__name__}", (Synchronized, cls), {})


def sync_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Let every BatchNorm layer inside `module` take its training statistics over `group`, in place; return `module`.

    Outputs, input gradients and running statistics are those of one process with all rows. Every process must bring the same
    number of rows. Layers with statistics per view keep them, whichever of the two functions is called first. Runs on any backend
    and inside torch.compile (fullgraph). Parameters, buffers and the keys of the state dict stay the same.

    Raises:
        ValueError: the forward of a layer does more than BatchNorm, in a way that is not known here.
    """
    for layer in module.modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, Synchronized):
            if (other := _does_more(type(layer))) is not None:
                raise ValueError(f"cannot synchronise {other}: its forward does more than BatchNorm")
            layer.__class__ = _synchronized_class(type(layer))  # type: ignore[arg-type]
        layer.group_name = group.group_name  # type: ignore[assignment]
        layer.group_rank, layer.group_size = dist.get_rank(group), dist.get_world_size(group)  # type: ignore[assignment]
    return module
