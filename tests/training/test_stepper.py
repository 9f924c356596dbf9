"""The two ways to take a step of the loop are the same step."""

from __future__ import annotations

import copy

import pytest
import torch

from falcon_fast.training import graphed
from falcon_fast.training.step import training_step
from falcon_fast.training.stepper import stepper

from .test_graphed import CPU, batches, learner


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_of_the_loop_is_a_training_step_on_the_views_of_its_inputs(cuda_graph, monkeypatch):
    monkeypatch.setattr(graphed, "capture", lambda function, stream: function)
    mine = learner()
    theirs = copy.deepcopy(mine)
    take_step = stepper(mine, lambda batch: (batch["views"] * 2, batch["labels"]), CPU, cuda_graph)
    for batch in batches(graphed.WARM_UP + 2):
        scale, asked = 1 / (1 + batch["step"]), batch["step"] % 2 == 0
        found = take_step(batch, scale, asked)
        expected = training_step(theirs, batch["views"] * 2, batch["labels"], scale, asked)
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.grad_norm is not None  # this learner clips
    for ours, reference in zip(mine.network.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)
