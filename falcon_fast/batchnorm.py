"""BatchNorm whose statistics are per view, for two views that travel in one batch.

FALCON's views go through the network one after the other as published, so each is normalised by its own statistics.
Here they go through together (one set of kernels, twice the batch) and the BatchNorm layers alone take them apart: outputs,
gradients and running statistics are as if view 1 and then view 2 had passed separately.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class PerView:
    """Mixin that makes a BatchNorm class normalise each of `num_views` equal parts of a training batch by itself.

    Evaluation uses the running statistics, which do not know views, and is left as it is.
    """

    num_views: int = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        if x.shape[0] % self.num_views:
            raise ValueError(f"a batch of {x.shape[0]} does not hold {self.num_views} views of the same images")
        views = [super(PerView, self).forward(view) for view in x.chunk(self.num_views)]  # type: ignore[misc]
        return torch.cat(views)


@functools.cache
def _per_view_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"PerView{cls.__name__}", (PerView, cls), {})


def per_view_batchnorm(module: nn.Module, num_views: int = 2) -> nn.Module:
    """Give every BatchNorm layer inside `module` per-view statistics, in place; returns `module`.

    Works for torch's BatchNorm1d/2d/3d and for subclasses with a forward of their own (timm's BatchNormAct2d). Parameters,
    buffers and the keys of the state dict stay the same.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            if not isinstance(layer, PerView):
                layer.__class__ = _per_view_class(type(layer))  # type: ignore[arg-type]
            layer.num_views = num_views  # type: ignore[assignment]
    return module


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any layer of `module` is a BatchNorm, which cannot train on a single image a view."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())
