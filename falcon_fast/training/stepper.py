"""The two ways to take a step of the loop: kernel by kernel, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from falcon_fast.training.graphed import GraphedStep
from falcon_fast.training.optimizer import Rate
from falcon_fast.training.step import Learner, StepMetrics, training_step

ViewsOf = Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]]
TakeStep = Callable[[Any, Rate | float, bool], StepMetrics]


def stepper(learner: Learner, views_of: ViewsOf, device: torch.device, cuda_graph: bool) -> TakeStep:
    """Return the function (inputs, rate, measure_norm) that takes a step of the loop on one of the loader's `inputs`.

    Args:
        views_of: makes of one of the loader's inputs the normalised views (2 B, 3, S, S) and the labels (B,) or None.
        cuda_graph: replay the step from a CUDA graph. The norm of the gradient is then always measured.
    """
    if cuda_graph:
        graphed = GraphedStep(learner, views_of, device)
        return lambda inputs, rate, measure_norm: graphed(inputs, rate)

    def step(inputs: Any, rate: Rate | float, measure_norm: bool) -> StepMetrics:
        return training_step(learner, *views_of(inputs), rate, measure_norm)

    return step
