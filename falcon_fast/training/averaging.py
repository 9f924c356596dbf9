"""An exponential moving average of the weights (EMA; Polyak and Juditsky 1992), which is evaluated and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from falcon_fast.kernels.torch_private import foreach_approach_
from falcon_fast.training.skipping import local


class WeightAverage:
    """The average of all parameters and floating-point buffers of a network.

    After each step: average <- decay * average + (1 - decay) * weights.

    Buffers are averaged too, as in timm's ModelEmaV3. BatchNorm's running statistics belong to the weights of about the last ten
    steps (momentum 0.1), and not to those of an average over 1 / (1 - decay) steps. On the digits (width 8, 12 epochs, decay
    0.95) embeddings computed with averaged statistics differed by 2.0 % from embeddings computed with the averaged weights' own
    statistics (of 60 batches passed through them); with copied statistics they differed by 3.5 %. While the weights still move
    far within 1 / (1 - decay) steps, neither is useful (width 16, step 176 of 352, decay 0.99: 74 % and 82 %). Counters
    (`num_batches_tracked`) are not averaged.

    Args:
        network: the network whose tensors are followed, plain or sharded ones (DTensor: each process averages its own part, and
            nothing is communicated).
        decay: in [0, 1). The average starts at the weights that the network has now.

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), not {decay}")
        self.decay = decay
        self._live = _followed(network)
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}
        dtypes = {tensor.dtype for tensor in self._average.values()}
        self._names = [[name for name, t in self._average.items() if t.dtype == dtype] for dtype in dtypes]

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None = None) -> None:
        """Update the average with the weights of the step that has just been taken.

        skipped: 0-d, on the device: the average keeps its values where this is not 0, as the step has been skipped.
        """
        for names in self._names:
            # Under FSDP2 parameters are sharded and buffers are plain; of both, this process's part is updated.
            average = [local(self._average[name]) for name in names]
            weight = torch.full((), 1 - self.decay, dtype=average[0].dtype, device=average[0].device)
            if skipped is not None:
                weight *= skipped == 0
            foreach_approach_(average, [local(self._live[name]) for name in names], weight)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the averaged tensors themselves, by the network's names, to be saved or restored in place."""
        return dict(self._average)

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the average and the weights of `network`, bit for bit and in place. A second call exchanges them back.

        network: the network that is followed, or another one with the same names and shapes.
        """
        live = _followed(network)
        for name, average in self._average.items():  # one at a time: needs memory for the largest tensor only
            kept = live[name].clone()
            live[name].copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Give `network` the averaged weights inside the context, and its own weights, bit for bit, afterwards."""
        self.swap(network)
        try:
            yield
        finally:
            self.swap(network)


def _followed(network: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return parameters | {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
