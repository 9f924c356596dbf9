"""The spread of the logits at initialisation, and the warning of a frozen softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from falcon_fast import RademacherCodes, temperature
from falcon_fast.objective.frozen_start import frozen_start, start


@pytest.mark.parametrize(("activation", "n"), [("tanh", 64), ("tanh", 1024), ("l2", 64), ("l2", 7)])
def test_the_spread_at_initialisation_is_that_of_simulated_logits(activation, n) -> None:
    f, c = 512, 4096
    h = torch.from_numpy(np.random.RandomState(0).randn(256, f)).float()
    h = torch.tanh(h) if activation == "tanh" else torch.nn.functional.normalize(h) * math.sqrt(f / n)
    tau = temperature(f, c, n)
    spread = (h @ RademacherCodes(f, c).dense() / tau).std().item()
    assert start(f, c, tau, activation, n).spread == pytest.approx(spread, rel=0.02)


def test_a_frozen_start_is_said_with_what_to_do() -> None:
    assert frozen_start(2048, 16384, temperature(2048, 16384, 64), "tanh", 64) is None
    line = frozen_start(512, 524288, temperature(512, 524288, 1024), "tanh", 1024)
    assert line is not None and "\n" not in line and "temperature_batch from 1024 to about" in line
    advised = int(line.rpartition(" ")[2])
    assert frozen_start(512, 524288, temperature(512, 524288, advised), "tanh", advised) is None
    assert "embedding_dim" in frozen_start(8, 16384, temperature(8, 16384, 64), "l2", 64)
