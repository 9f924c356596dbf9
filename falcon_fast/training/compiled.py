"""torch.compile of a step's forward pass and loss: network, loss and probe in one graph, for the one shape that training has.

The optimiser stays outside, because it is one fused call already. Evaluation calls the uncompiled network, because its batches
have many shapes and BatchNorm works differently there. With several processes only the network is compiled:
DistributedDataParallel stays outside, so that the graph is whole, with the all-reduces of synchronised BatchNorm in it. The
gradients then become available all together, and their averaging waits for the last of them.

Measured on two cores of an Intel Xeon, float32, whole steps against eager (benchmarks/bench_compile.py): ResNet-8 of width 32 at
32 px and batch 128, 1.21 times the images/s; width 8 at 16 px and batch 64, 1.80 times, and batch 16, 1.61. At batch 16 the
remaining time is oneDNN's convolutions (3 of 6 ms) and the loss (1.2 ms). Three further attempts: launching code in C++ gained 4
%; forward and backward as one graph gained 9 % (the large network lost 8 %); compiling the optimiser gained nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import nn

from falcon_fast.errors import RunStopped, UsageError
from falcon_fast.models.network import FalconNetwork, blocks_of
from falcon_fast.training.step import ForwardAndLoss, forward_and_loss


def compiled_forward_and_loss() -> ForwardAndLoss:
    """Return `step.forward_and_loss`, to be compiled on its first call: network, projector, loss and probe in one graph.

    A graph break is an error, not a slower step. The learning rates belong to the optimiser, outside, and change without
    recompilation.
    """
    # The compiler keeps its graphs, eight at most, with the code of a function: each learner gets a function with its own code.
    own = FunctionType(forward_and_loss.__code__.replace(), forward_and_loss.__globals__, forward_and_loss.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def compiled_network(network: nn.Module) -> nn.Module:
    """Return `network`, to be compiled on its first call, with the same parameters and buffers.

    A graph break is an error, not a slower step.
    """
    return torch.compile(network, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def compile_blocks(network: FalconNetwork) -> None:
    """Have the blocks and the projector compiled on their first call, in place, one graph each.

    This is for FSDP2, which gathers parameters between the blocks. Call it before `shard`. What lies between the blocks (a stem,
    a pooling layer) stays eager, and the names in the state dict stay the same.
    """
    for block in (*blocks_of(network.backbone), network.projector):
        block.compile(fullgraph=True, dynamic=False)


@contextmanager
def compiler_failures(stopping: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an error of the compiler, at the first step, into a UsageError that says how to train without it.

    stopping: whether a signal asked the run to stop. Ctrl-C on a terminal reaches the C++ compiler, too, and ends it; the run
        then ends as asked (RunStopped).
    """
    try:
        yield
    except RuntimeError as error:
        # InductorError, Unsupported, BackendCompilerFailed: all are TorchDynamoException, whose module is imported by compiling.
        kinds = {cls.__name__ for cls in type(error).__mro__}
        if "TorchDynamoException" not in kinds:
            raise
        if stopping():
            raise RunStopped from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(f"the network cannot be compiled ({lines[0][:300]}): leave out --compile") from None
