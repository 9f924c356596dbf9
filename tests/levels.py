"""The C++ kernels at each instruction set of this processor, and PyTorch in their place."""

from __future__ import annotations

import pytest

from falcon_fast.kernels import cpu_extension
from falcon_fast.kernels.cpu import sweeps

LEVELS = ["torch", *(cpu_extension.levels() if cpu_extension else ())]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Each instruction set of this processor, and PyTorch alone."""
    if request.param == "torch":
        monkeypatch.setattr(sweeps, "cpu_extension", None)
        monkeypatch.setattr("falcon_fast.kernels.cpu.plan.cpu_extension", None)
        monkeypatch.setattr("falcon_fast.kernels.signs.cpu_extension", None)
        yield "torch"
        return
    best = cpu_extension.level()
    cpu_extension.use_level(request.param)
    yield request.param
    cpu_extension.use_level(best)
