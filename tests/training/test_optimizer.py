from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import Lars
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
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", Lars)],
)
def test_by_name_with_the_probe_in_its_own_group(name, kind):
    network, probe = nn.Linear(3, 4), nn.Linear(4, 2)
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.5, weight_decay=0.1), network, probe, 0.25)
    assert type(optimizer) is kind
    between = [0.5] if name == "lars" else []  # biases and norms
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.5, *between, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, *(0.0 for _ in between), 0.0]
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in probe.parameters()}
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


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_biases_norms_and_what_a_vit_names_do_not_decay(name):
    network = nn.ModuleDict(
        {
            "backbone": timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32),
            "norm": nn.BatchNorm1d(3),
        }
    )
    config = OptimizerConfig(name=name, weight_decay=0.1, exclude_bias_and_norm=True)
    optimizer = build_optimizer(config, network, None, 0.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {n for n, p in network.named_parameters() if decay[id(p)]}
    assert names == {
        "backbone.patch_embed.proj.weight",
        *(f"backbone.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }
    assert len(decay) == len(list(network.parameters()))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_scales_each_layers_gradient_to_its_weights(weight_decay):
    """You et al. 2017, eq. 6: the local rate 0.001 |w| / (|g| + decay |w|), for weights alone."""
    network, probe = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double(), nn.Linear(4, 2).double()
    config = OptimizerConfig(name="lars", lr=0.5, weight_decay=weight_decay, momentum=0.9)
    optimizer = build_optimizer(config, network, probe, 0.25)
    parameters = dict(network.named_parameters()) | {f"probe.{k}": v for k, v in probe.named_parameters()}
    expected = {k: v.detach().clone() for k, v in parameters.items()}
    momentum = {k: torch.zeros_like(v) for k, v in parameters.items()}
    for _ in range(3):
        for key, parameter in parameters.items():
            parameter.grad = gradient = torch.randn_like(parameter)
            weight, rate = expected[key], 0.25 if key.startswith("probe") else 0.5
            if key == "0.weight":
                local = 1e-3 * weight.norm() / (gradient.norm() + weight_decay * weight.norm())
                gradient = local * (gradient + weight_decay * weight)
            momentum[key] = 0.9 * momentum[key] + gradient
            expected[key] = weight - rate * momentum[key]
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        optimizer.step()
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=1e-6, atol=1e-9, msg=key)
