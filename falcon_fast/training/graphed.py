"""The whole step as one CUDA graph: views, forward, backward, update and averages, launched by one call.

A network on small images spends its time in launches: hundreds of kernels of a few microseconds each, started one by one from
Python. A graph is recorded once and then launched as a whole. Everything that a step reads from outside must then lie at fixed
addresses: before each replay, the batch (for resident images the random numbers of the clock, a few kilobytes; else the uint8
views) and the schedule's rate are copied there. What a step reports lies at fixed addresses too, and is valid until the next
step.

The first steps of a run, or of its continuation, are taken kernel by kernel. They are real steps, in which libraries choose their
algorithms and compilers compile, neither of which may happen during a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from falcon_fast.errors import UsageError
from falcon_fast.kernels.torch_private import tree_leaves, tree_map
from falcon_fast.training.optimizer import Rate
from falcon_fast.training.step import Learner, StepMetrics, training_step

WARM_UP = 3  # steps before the capture


class Graphed:
    """`function(inputs)` on a GPU, captured as a CUDA graph after `WARM_UP` ordinary calls.

    `inputs` is any tree of tensors, of the same shapes in every call. The next call overwrites the tensors of the result.

    Args:
        function: must not read a value of the device on the host.
        before_capture: is called once, before the capture.

    Raises:
        UsageError: the function cannot be captured.
    """

    def __init__(
        self, function: Callable[[Any], Any], device: torch.device, before_capture: Callable[[], None] | None = None
    ) -> None:
        self._function, self._device, self._before_capture = function, device, before_capture
        self._inputs: Any = None
        self._result: Any = None
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, inputs: Any) -> Any:
        if self._inputs is None:
            # The tensors at fixed addresses are used from the first call on, so that code is compiled for their strides.
            self._inputs = tree_map(lambda x: torch.empty_like(x) if torch.is_tensor(x) else x, inputs)
        for place, value in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            if torch.is_tensor(value):
                place.copy_(value, non_blocking=True)
        self._calls += 1
        if self._calls <= WARM_UP:
            self._warm_up()
        else:
            if self._replay is None:
                self._replay = self._captured()
            self._replay()
        return self._result

    def _run(self) -> None:
        self._result = self._function(self._inputs)

    def _warm_up(self) -> None:
        if self._stream is None:
            self._run()
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._run()
        current.wait_stream(self._stream)

    def _captured(self) -> Callable[[], None]:
        if self._before_capture is not None:
            self._before_capture()
        self._result = None
        try:
            return capture(self._run, self._stream)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UsageError(
                f"the step cannot be captured as a CUDA graph ({lines[0][:300]}): leave out --cuda-graph"
            ) from error


class GraphedStep:
    """`step(inputs, rate)`: `training_step` on the views of one of the loader's `inputs`, as a CUDA graph (see `Graphed`).

    The metrics always hold the norm of the gradient. The learning rates of the learner's optimiser are moved to the device.

    Args:
        views_of: the part of the loader that runs on the device, and the photometric stage. Makes of `inputs` the normalised
            views (2 B, 3, S, S) and the labels (B,) or None.
    """

    def __init__(
        self,
        learner: Learner,
        views_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]],
        device: torch.device,
    ) -> None:
        self._rate = torch.ones((), device=device), torch.zeros((), device=device)
        rates_on_device(learner.optimizer, device)

        def step(inputs: Any) -> StepMetrics:
            return training_step(learner, *views_of(inputs), Rate(*self._rate), measure_norm=True)

        # Gradients of the warm-up lie in ordinary memory; those of the graph must be allocated during the capture.
        self._step = Graphed(step, device, lambda: learner.optimizer.zero_grad(set_to_none=True))

    def __call__(self, inputs: Any, rate: Rate | float) -> StepMetrics:
        for place, value in zip(self._rate, rate if isinstance(rate, Rate) else Rate(rate), strict=True):
            place.fill_(value)
        metrics: StepMetrics = self._step(inputs)
        return metrics


def capture(function: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """Record `function` on `stream` without executing it. Returns the function that executes the record."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Turn the learning rates into float32 tensors on `device`, which a captured step reads again at each replay."""
    for group in optimizer.param_groups:
        if not torch.is_tensor(group["lr"]):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"


def why_not_graphed(device: torch.device, world_size: int, optimizer: str) -> str | None:
    """Return why the step of a run cannot be captured, as one phrase; None if it can be captured."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and this run is on {device.type}"
    if world_size > 1:
        return "it needs a run of one process, and this run has several"
    if optimizer == "lars":
        return "timm's LARS reads the learning rate on the host, which a CUDA graph cannot do"
    return None
