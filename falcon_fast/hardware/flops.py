"""Count the FLOP of a training step from the operators of the network's forward and backward passes, without computing anything.

One multiply-add is 2 FLOP. Matrix products, convolutions and attention are counted; element-wise operators are not. The count is
the model's FLOP: what a kernel recomputes to save memory (the logits of flash attention or of the streaming plan) is not counted,
so that the share of a device's peak says how well the device is used. Everywhere in falcon_fast the loss counts as its minimum:
8 N f c for N images per view, where each view's logits and their gradient are computed once; with Hadamard codes, whose product
is a fast transform, 4 N c log2 f. The online probe is not counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from falcon_fast.config import Config
from falcon_fast.kernels.torch_private import FakeTensorMode


class StepFlops(NamedTuple):
    """FLOP of one step over all processes, forward and backward: of the network and of the loss."""

    network: float
    loss: float

    @property
    def total(self) -> float:
        return self.network + self.loss


@contextmanager
def without_storage(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of `module` whose parameters and buffers have shapes but no memory.

    Tensors that are created inside also have no memory. All of them report the CPU as their device, so that autocast acts as in
    training.
    """
    mode = FakeTensorMode()
    tensors = (*module.parameters(), *module.buffers())
    with mode:
        yield copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def network_flops(network: nn.Module, images: int, size: int) -> float:
    """Return the FLOP of forward and backward for `images` images (3, size, size), without the gradient of the images.

    network: returns (features, embeddings); the backward pass starts from the embeddings. The network is not changed. A projector
        with its own kernels is counted as PyTorch's layers, which have the same number of multiplications.
    """
    with without_storage(network) as fake, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, embeddings = fake.train()(torch.empty(images, 3, size, size))
        embeddings.sum().backward()
    return float(counter.get_total_flops())


def loss_flops(n: int, f: int, c: int, codes: str) -> float:
    """Return the minimum FLOP of the loss, forward and backward, for `n` images per view (see the module's docstring)."""
    return 4.0 * n * c * math.log2(f) if codes == "hadamard" else 8.0 * n * f * c


def step_flops(config: Config, network: nn.Module, size: int) -> StepFlops:
    """Return the FLOP of a step over the whole batch, over all processes and micro-batches. size: side of a view, pixels."""
    images, loss = config.training.batch_size, config.loss
    return StepFlops(
        network_flops(network, 2 * images, size),
        loss_flops(images, loss.embedding_dim, loss.num_codes, loss.codes),
    )
