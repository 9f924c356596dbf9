"""The whole step as one CUDA graph: views, forward, backward, update and averages, launched by one call.

A network of small images spends its time in launches: hundreds of kernels of a few microseconds, each started by Python. A
graph is recorded once and started whole. What a step reads from outside is then memory at fixed places: the batch (for resident
images the numbers that the clock gave, a few kilobytes; else the uint8 views) and the schedule's place are copied there before
each replay, and what a step reports lies at fixed places too, until the next one.

The first steps of a run, or of its continuation, are taken one kernel at a time: real steps, in which libraries choose their
algorithms and compilers compile, as a capture must not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from falcon_fast.errors import UsageError
from falcon_fast.kernels.torch_private import tree_leaves, tree_map
from falcon_fast.training.step import Learner, StepMetrics, training_step

WARM_UP = 3  # steps before the capture


class Graphed:
    """`function(inputs)` on a GPU, captured as a CUDA graph after `WARM_UP` ordinary calls; `inputs` is any tree of tensors.

    Every call must bring tensors of the same shapes. Tensors of the result are overwritten by the next call.

    Args:
        function: may not read a value of the device on the host.
        before_capture: called once, before the capture.

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
            # The places from the first call on: compiled code is then for their strides.
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
    """`step(inputs, lr_scale)`: as `training_step` on the views of a loader's `inputs`, as a CUDA graph (see `Graphed`).

    The gradient's norm is in the metrics always. The learner's optimiser has its learning rates on the device from here on.

    Args:
        views_of: the rest of the loader and the photometric stage: of `inputs` normalised views (2 B, 3, S, S), and labels (B,)
            or None.
    """

    def __init__(
        self,
        learner: Learner,
        views_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]],
        device: torch.device,
    ) -> None:
        self._lr_scale = torch.ones((), device=device)
        rates_on_device(learner.optimizer, device)

        def step(inputs: Any) -> StepMetrics:
            return training_step(learner, *views_of(inputs), self._lr_scale, measure_norm=True)

        # Gradients of the warm-up lie in ordinary memory: those of the graph must be born inside it.
        self._step = Graphed(step, device, lambda: learner.optimizer.zero_grad(set_to_none=True))

    def __call__(self, inputs: Any, lr_scale: float) -> StepMetrics:
        self._lr_scale.fill_(lr_scale)
        return self._step(inputs)


def capture(function: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """`function` recorded on `stream` without being executed; what is returned executes the record."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make the learning rates float32 tensors on `device`, which a captured step reads anew each time."""
    for group in optimizer.param_groups:
        if not torch.is_tensor(group["lr"]):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"


def why_not_graphed(device: torch.device, world_size: int, optimizer: str) -> str | None:
    """None where a run's step can be captured, else the reason in one phrase."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, and this run is on {device.type}"
    if world_size > 1:
        return "it is for one process, and this run has several"
    if optimizer == "lars":
        return "timm's LARS reads the learning rate on the host"
    return None
