from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from falcon_fast import FalconProjector, RademacherCodes, temperature


def test_tanh_is_linear_batchnorm_tanh():
    projector = FalconProjector(10, 6)
    x = torch.randn(16, 10)
    plain = nn.Sequential(projector.linear, nn.BatchNorm1d(6), nn.Tanh())
    torch.testing.assert_close(projector(x), plain(x))
    assert projector.linear.bias is not None


def test_l2_rows_on_a_code_have_the_stated_logit():
    f, c, n, epsilon = 64, 256, 32, 1e-8
    projector = FalconProjector(10, f, "l2", temperature_batch=n)
    h = projector(torch.randn(16, 10))
    torch.testing.assert_close(h.norm(dim=1), torch.full((16,), math.sqrt(f / n)))
    code = RademacherCodes(f, c).dense()[:, 0]
    on_code = code / code.norm() * math.sqrt(f / n)
    logit = (on_code @ code / temperature(f, c, n, epsilon)).item()
    assert logit == pytest.approx(math.log((1 - epsilon * (c - 1)) / epsilon), rel=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "l2"])
def test_float32_under_autocast(activation):
    projector = FalconProjector(10, 6, activation, temperature_batch=8)
    x = torch.randn(16, 10).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = projector(x)
    assert h.dtype == torch.float32
    assert torch.equal(h, projector(x.float()))
    h.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0, 8), "positive"), ((8, 0), "positive"), ((8, 8, "relu"), "tanh, l2"), ((8, 8, "l2"), "temperature_batch")],
)
def test_bad_input(arguments, word):
    with pytest.raises(ValueError, match=word):
        FalconProjector(*arguments)
