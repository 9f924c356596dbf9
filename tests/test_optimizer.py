from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from falcon_fast.config import OptimizerConfig
from falcon_fast.training.optimizer import build_optimizer, learning_rate


def test_warm_up_then_half_cosine():
    rates = [learning_rate(step, 1.0, 110, 10, 0.1) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(110, 1.0, 110, 10, 0.1) == pytest.approx(0, abs=1e-15)


@given(total=st.integers(1, 200), warmup=st.integers(0, 250), peak=st.floats(1e-5, 1))
def test_never_outside_its_ends(total, warmup, peak):
    rates = [learning_rate(step, peak, total, warmup, 1e-6) for step in range(total)]
    assert all(0 <= rate <= peak * (1 + 1e-12) or rate == 1e-6 for rate in rates)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_by_name_with_the_probe_in_its_own_group(name, kind):
    network, probe = nn.Linear(3, 4), nn.Linear(4, 2)
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.5, weight_decay=0.1), network, probe, 0.25)
    assert type(optimizer) is kind
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in probe.parameters()}
    assert len(build_optimizer(OptimizerConfig(), network, None, 0.25).param_groups) == 1


def test_adam_decays_like_l2_and_adamw_decoupled():
    """From a zero gradient Adam moves a weight by the whole rate (L2 makes a gradient), AdamW by lr * decay * weight."""
    moved = {}
    for name in ("adam", "adamw"):
        weight = nn.Linear(1, 1, bias=False)
        nn.init.constant_(weight.weight, 2.0)
        optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.1, weight_decay=0.01), weight, None, 0.0)
        weight.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        moved[name] = 2.0 - weight.weight.item()
    assert moved["adam"] == pytest.approx(0.1, rel=1e-4)
    assert moved["adamw"] == pytest.approx(0.1 * 0.01 * 2.0, rel=1e-4)
