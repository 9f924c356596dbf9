"""How many FLOP a training step is worth: counted from the operators of the network's forward and backward, nothing computed.

One multiply-add is 2 FLOP; matrix products, convolutions and attention count, what goes element by element does not. They are the
model's FLOP: what a kernel computes anew to save memory (flash attention's logits, the streaming plan's) is not counted, so that
a share of a device's peak says how well it is used. Throughout falcon_fast the loss is worth its floor: 8 N f c, each view's
logits and their gradient formed once, N images a view; with Hadamard codes, whose product is a fast transform, 4 N c log2 f.
The online probe is left out.
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
    """FLOP of one step over all processes: forward and backward of the network, and of the loss."""

    network: float
    loss: float

    @property
    def total(self) -> float:
        return self.network + self.loss


@contextmanager
def without_storage(module: nn.Module) -> Iterator[nn.Module]:
    """A copy of `module` whose parameters and buffers have shapes and no memory, and a mode in which all new tensors are alike.

    On the CPU as far as anyone can see, so that autocast acts as in training.
    """
    mode = FakeTensorMode()
    tensors = (*module.parameters(), *module.buffers())
    with mode:
        yield copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def network_flops(network: nn.Module, images: int, size: int) -> float:
    """FLOP of forward and backward for `images` images (3, size, size), whose own gradient nobody needs.

    network: gives (features, embeddings), the gradient is of the latter; it is not touched. A projector with kernels of its own
        counts by PyTorch's layers, which multiply as much.
    """
    with without_storage(network) as fake, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, embeddings = fake.train()(torch.empty(images, 3, size, size))
        embeddings.sum().backward()
    return float(counter.get_total_flops())


def loss_flops(n: int, f: int, c: int, codes: str) -> float:
    """The loss's floor for `n` images a view (see above)."""
    return 4.0 * n * c * math.log2(f) if codes == "hadamard" else 8.0 * n * f * c


def step_flops(config: Config, network: nn.Module, size: int) -> StepFlops:
    """FLOP of a step of the whole batch, views of `size` pixels a side, in however many parts it is taken."""
    images, loss = config.training.batch_size, config.loss
    return StepFlops(
        network_flops(network, 2 * images, size),
        loss_flops(images, loss.embedding_dim, loss.num_codes, loss.codes),
    )
