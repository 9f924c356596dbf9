"""torch.compile of a step's objective: network, loss and probe in one graph, for the one shape that training has.

The optimiser stays outside, one fused call already. Evaluation goes through the network itself, whose batches have many
shapes and another BatchNorm. Under several processes the network alone is compiled: DistributedDataParallel stays outside,
so the graph is whole, the all-reduces of synchronised BatchNorm in it; the gradients then come out together, and their
averaging waits for the last of them.

Measured on two cores of an Intel Xeon, float32, whole steps against eager (benchmarks/bench_compile.py): ResNet-8 of width 32 at
32 px and batch 128, 1.21 times the images/s; width 8 at 16 px and batch 64, 1.80 times, and batch 16, 1.61. What is left there
at batch 16 is oneDNN's convolutions (3 of 6 ms) and the loss (1.2). On top of that launching code in C++ gained 4 %, forward and
backward as one graph 9 % (the large network lost 8 %), and compiling the optimiser nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import nn

from falcon_fast.errors import UsageError
from falcon_fast.models.network import FalconNetwork, blocks_of
from falcon_fast.training.step import Learner, StepMetrics, objective

Objective = Callable[[Learner, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, StepMetrics]]


def compiled_objective() -> Objective:
    """`step.objective` of a learner compiled on its first call: network, projector, loss and probe in one graph.

    A graph break is an error, not a slower step. Learning rates are the optimiser's, outside: they change without recompiling.
    """
    # The compiler keeps its graphs with a function's code, eight at most: a code of its own for each learner.
    own = FunctionType(objective.__code__.replace(), objective.__globals__, objective.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def compiled_network(network: nn.Module) -> nn.Module:
    """`network` compiled on its first call, sharing its parameters and buffers; a graph break is an error, not a slower step."""
    return torch.compile(network, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def compile_blocks(network: FalconNetwork) -> None:
    """The blocks and the projector compiled on their first call, a graph each, in place: for FSDP2, which gathers between them.

    Before `shard`; what lies between the blocks (a stem, a pooling) stays eager. Names of the state dict stay the same.
    """
    for block in (*blocks_of(network.backbone), network.projector):
        block.compile(fullgraph=True, dynamic=False)


@contextmanager
def compiler_failures() -> Iterator[None]:
    """What the compiler runs into at the first step becomes a UsageError that says how to do without."""
    try:
        yield
    except RuntimeError as error:
        # InductorError, Unsupported, BackendCompilerFailed: all are TorchDynamoException, whose module is imported by compiling.
        kinds = {cls.__name__ for cls in type(error).__mro__}
        if "TorchDynamoException" not in kinds:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(f"the network cannot be compiled ({lines[0][:300]}): leave out --compile") from None
