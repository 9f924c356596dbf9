"""Which way a step is taken: eagerly, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from falcon_fast.training.graphed import GraphedStep
from falcon_fast.training.step import Learner, StepMetrics, training_step


def stepper(
    learner: Learner,
    views_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
    cuda_graph: bool,
) -> Callable[[Any, float, bool], StepMetrics]:
    """A function (inputs, lr_scale, measure_norm) that takes a step of the loop: as a CUDA graph, or kernel by kernel."""
    if cuda_graph:
        graphed = GraphedStep(learner, views_of, device)
        return lambda inputs, lr_scale, measure_norm: graphed(inputs, lr_scale)

    def step(inputs: Any, lr_scale: float, measure_norm: bool) -> StepMetrics:
        return training_step(learner, *views_of(inputs), lr_scale, measure_norm)

    return step
