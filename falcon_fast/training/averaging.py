"""An exponential moving average of the weights (EMA; Polyak and Juditsky 1992), which is what is evaluated and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from falcon_fast.kernels.torch_private import foreach_lerp_


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after each step, of all parameters and floating-point buffers.

    Buffers are averaged too, as in timm's ModelEmaV3: BatchNorm's running statistics belong to the weights of the last ten steps
    or so (momentum 0.1), which are not those of an average over 1 / (1 - decay) steps. Digits, width 8, 12 epochs, decay 0.95:
    embeddings by averaged statistics were 2.0 % from those by the averaged weights' own (60 batches passed through
    them), by copied ones 3.5 %. While weights still move far within 1 / (1 - decay) steps neither is of use (width 16, step
    176 of 352, decay 0.99: 74 % and 82 %). Counters (`num_batches_tracked`) stay the network's.

    network: whose tensors are followed, plain or sharded (DTensor: each process averages its own part and nothing is sent).
    decay: in [0, 1); the average begins at the weights that the network has now.

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), not {decay}")
        self.decay = decay
        self._live = _followed(network)
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}
        # A foreach takes sharded or plain tensors, not both: under FSDP2 buffers are plain.
        kinds = {type(tensor) for tensor in self._average.values()}
        self._names = [[name for name, t in self._average.items() if type(t) is kind] for kind in kinds]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step that has just been made."""
        for names in self._names:
            average = [self._average[name] for name in names]
            foreach_lerp_(average, [self._live[name] for name in names], 1 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages themselves, by the network's names: to save, or to restore in place."""
        return dict(self._average)

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the average and the weights of `network`, bit for bit, in place; a second time, back.

        `network` is the one that is followed, or another one of the same names and shapes.
        """
        live = _followed(network)
        for name, average in self._average.items():  # one at a time: no more memory than the largest
            kept = live[name].clone()
            live[name].copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Inside, `network` has the averaged weights; afterwards its own again, to the bit."""
        self.swap(network)
        try:
            yield
        finally:
            self.swap(network)


def _followed(network: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return parameters | {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
