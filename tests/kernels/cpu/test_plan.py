"""The plan of the loss on the CPU within its budget."""

from __future__ import annotations

import pytest

from falcon_fast.kernels.cpu.plan import dense_plan, hadamard_plan


def test_plans():
    small, large = dense_plan(128, 2048, 16384, "auto", None), dense_plan(256, 2048, 2**20, "auto", None)
    assert small.stored and not large.stored
    assert dense_plan(256, 2048, 131072, "auto", None).peak <= 256 * 2**20
    assert hadamard_plan(256, 2048, 524288, None).peak <= 64 * 2**20
    with pytest.raises(ValueError, match="budget"):
        dense_plan(256, 2048, 131072, "stored", 100 * 2**20)
    with pytest.raises(ValueError, match="budget"):
        hadamard_plan(256, 2048, 131072, 2**20)
    assert not dense_plan(256, 2048, 131072, "auto", 100 * 2**20).stored
