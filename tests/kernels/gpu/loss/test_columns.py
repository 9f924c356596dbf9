"""The settings of the columns' kernel; its arithmetic is tested through the loss."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from falcon_fast.kernels.gpu.loss import columns
from falcon_fast.kernels.spec import LossSpec


def test_statistics_are_in_the_mean_of_all_processes(monkeypatch) -> None:
    monkeypatch.setattr(LossSpec, "world_size", 4)
    assert columns.Scales.of(8, LossSpec(16, False, 2.0)).log_rows == 5.0
