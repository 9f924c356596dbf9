"""What passes through each layer of a network in one step, forward and backward: ranges, and what is not finite.

Hooks look at the output of every module except plain containers, and at the gradient with respect to it, at the moment when it
is made (a later layer may overwrite it). The step itself is not changed, not even in its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

# A value that no layer of a healthy network comes near, and that float16 (which ends at 65,504) can hardly hold.
EXTREME = 1e4
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Statistics(NamedTuple):
    """A tensor in four numbers. The first three are those of its finite entries, None if there are none.

    Attributes:
        minimum, maximum: the smallest and the largest entry.
        rms: root mean square.
        non_finite: number of entries that are NaN or infinite.
        entries: number of all entries.
    """

    minimum: float | None
    maximum: float | None
    rms: float | None
    non_finite: int
    entries: int

    @property
    def extreme(self) -> bool:
        """Whether a finite entry is beyond `EXTREME`."""
        return self.maximum is not None and self.minimum is not None and max(self.maximum, -self.minimum) > EXTREME


def statistics_of(tensor: torch.Tensor, scale: float = 1.0) -> Statistics:
    """Return the statistics of `tensor / scale`."""
    values = tensor.detach()
    finite = values[torch.isfinite(values)].double() / scale
    count, non_finite = values.numel(), values.numel() - finite.numel()
    if not finite.numel():
        return Statistics(None, None, None, non_finite, count)
    rms = math.sqrt(finite.square().mean().item())
    return Statistics(finite.min().item(), finite.max().item(), rms, non_finite, count)


class Row(NamedTuple):
    """An image in one of its views: its place in the batch (from 0), and the view (1 or 2)."""

    place: int
    view: int


@dataclass
class Layer:
    """A layer in one micro-batch.

    Attributes:
        name: the module's name in the network, or `views` for the network's input.
        kind: its class.
        forward: statistics of its output.
        backward: statistics of the gradient with respect to its output; None if no gradient came.
        bad_rows, bad_gradient_rows: the images for which the output, or its gradient, is not finite; None if the first dimension
            of the output is not that of the images.
        bad_parameters: the names of its own parameters and buffers that were not finite before the step.
        turn: in which order the gradients came, from 0.
    """

    name: str
    kind: str
    forward: Statistics
    backward: Statistics | None = None
    bad_rows: list[Row] | None = None
    bad_gradient_rows: list[Row] | None = None
    bad_parameters: list[str] = field(default_factory=list)
    turn: int = -1


class Watch:
    """Collects the `layers` of the steps that are taken inside `watching`, in the order of their outputs.

    Args:
        network: the network, called with (2 B, 3, S, S) views, view 1 of all images first, once for each micro-batch.
        scale: the factor by which a GradScaler multiplies gradients; backward statistics are divided by it.

    Attributes:
        gradient_norms: Euclidean norm of the gradient with respect to the embeddings of each image, both views together.
    """

    def __init__(self, network: nn.Module, scale: float = 1.0) -> None:
        self._network, self._scale = network, scale
        self.layers: list[Layer] = []
        self.gradient_norms: list[float] = []
        self._images = self._first = self._turn = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [self._network.register_forward_pre_hook(self._begin)]
        for name, module in self._network.named_modules():
            if module is not self._network and not isinstance(module, CONTAINERS):
                handles.append(module.register_forward_hook(self._seen(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (views,) = inputs
        self._first += self._images
        self._images = views.shape[0] // 2
        self.layers.append(Layer("views", "input", statistics_of(views), bad_rows=self._bad_rows(views, self._first)))

    def _seen(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                return
            first = self._first
            kind = type(module).__name__.removeprefix("PerView").removeprefix("Synchronized")
            layer = Layer(name, kind, statistics_of(output), bad_rows=self._bad_rows(output, first))
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            layer.bad_parameters = [
                each for each, value in own if value.is_floating_point() and not bool(torch.isfinite(value).all())
            ]
            self.layers.append(layer)
            if not output.requires_grad:
                return

            def backward(gradient: torch.Tensor) -> None:
                layer.backward = statistics_of(gradient, self._scale)
                layer.bad_gradient_rows = self._bad_rows(gradient, first)
                layer.turn, self._turn = self._turn, self._turn + 1
                if name == "projector":
                    norms = gradient.detach().double().norm(dim=1).unflatten(0, (2, -1)).norm(dim=0) / self._scale
                    self.gradient_norms += norms.tolist()

            output.register_hook(backward)

        return hook

    def _bad_rows(self, tensor: torch.Tensor, first: int) -> list[Row] | None:
        if tensor.dim() < 2 or tensor.shape[0] != 2 * self._images:
            return None
        bad = (~torch.isfinite(tensor.detach())).flatten(1).any(1).nonzero().flatten().tolist()
        return [Row(first + row % self._images, 1 + row // self._images) for row in bad]


def first_bad(layers: list[Layer]) -> tuple[Layer, bool] | None:
    """Return the layer at which numbers stop being finite, and whether that is in the forward pass; None if all are finite.

    The forward pass comes first; in the backward pass, the layer whose gradient came first.
    """
    for layer in layers:
        if layer.forward.non_finite:
            return layer, True
    backward = [layer for layer in layers if layer.backward is not None and layer.backward.non_finite]
    return (min(backward, key=lambda layer: layer.turn), False) if backward else None
