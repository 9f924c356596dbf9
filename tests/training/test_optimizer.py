from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import Lars
from torch import nn

from falcon_fast.config import OptimizerConfig
from falcon_fast.training.optimizer import Rate, build_optimizer, rate_at


def test_warm_up_then_half_cosine():
    rates = [rate_at(step, 110, 10, 0.1).of(1.0) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 0 < rates[-1] < 1e-3
    assert rate_at(110, 110, 10, 0.1).of(1.0) == pytest.approx(0, abs=1e-15)


@given(total=st.integers(1, 200), warmup=st.integers(0, 250), peak=st.floats(1e-5, 1))
def test_never_outside_its_ends(total, warmup, peak):
    rates = [rate_at(step, total, warmup, 1e-6).of(peak) for step in range(total)]
    assert all(0 <= rate <= peak * (1 + 1e-12) or rate == 1e-6 for rate in rates)


TOTAL, WARM_UP = 400, 50  # steps
PEAKS = {"network": 2.5e-4, "probe": 2.5e-2}
FLOOR = 3e-5


@pytest.mark.parametrize("group", PEAKS)
def test_the_schedule_is_torchs_linear_warm_up_then_its_cosine(group):
    """Both groups rise from 3e-5 to their own peaks, as in the published code."""
    peak = PEAKS[group]
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=peak)
    schedulers = torch.optim.lr_scheduler
    warm_up = schedulers.LinearLR(optimizer, start_factor=FLOOR / peak, total_iters=WARM_UP)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=TOTAL - WARM_UP)
    schedule = schedulers.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    for step in range(TOTAL):
        found = rate_at(step, TOTAL, WARM_UP, FLOOR).of(peak)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("group", PEAKS)
def test_the_published_warm_up_is_one_step_shorter(group):
    """There step t of W has floor + t (peak - floor) / (W - 1), so that the peak comes twice; the cosine is the same."""
    peak = PEAKS[group]
    for step in range(WARM_UP):
        theirs = FLOOR + step * (peak - FLOOR) / (WARM_UP - 1)
        found = rate_at(step, TOTAL, WARM_UP, FLOOR).of(peak)
        assert found <= theirs and theirs - found == pytest.approx((peak - FLOOR) * step / (WARM_UP * (WARM_UP - 1)))
    for step in range(WARM_UP, TOTAL):
        theirs = 0.5 * peak * (1 + math.cos(math.pi * (step - WARM_UP) / (TOTAL - WARM_UP)))
        assert rate_at(step, TOTAL, WARM_UP, FLOOR).of(peak) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_steps_are_those_of_torchs_optimiser_with_the_published_groups(name, kind, options):
    """Backbone and projector with weight decay 1e-4 on everything, the classifier at its own rate without."""
    torch.manual_seed(0)
    network, probe = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)),
        nn.Linear(4, 2),
    )
    copies = copy.deepcopy((network, probe))
    config = OptimizerConfig(name=name, lr=2.5e-4, weight_decay=1e-4)
    mine = build_optimizer(config, network, probe, 2.5e-2)
    theirs = kind(
        [{"params": copies[0].parameters()}, {"params": copies[1].parameters(), "lr": 2.5e-2, "weight_decay": 0}],
        lr=2.5e-4,
        weight_decay=1e-4,
        **options,
    )
    pairs = list(zip(nn.ModuleList([network, probe]).parameters(), nn.ModuleList(copies).parameters(), strict=True))
    peaks = [group["lr"] for group in theirs.param_groups]
    for step in range(20):
        rate = rate_at(step, 20, 5, FLOOR)
        for ours, reference in pairs:
            ours.grad = torch.randn_like(ours)
            reference.grad = ours.grad.clone()
        for group in mine.param_groups:
            group["lr"] = rate.of(group["peak_lr"])
        for group, peak in zip(theirs.param_groups, peaks, strict=True):
            group["lr"] = FLOOR + step / 5 * (peak - FLOOR) if step < 5 else peak * rate.share
        mine.step()
        theirs.step()
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_a_rate_of_tensors_is_a_tensor():
    rate = Rate(torch.tensor(0.5), torch.tensor(0.25))
    assert rate.of(0.75).item() == 0.5 and Rate(0.5).of(0.75) == 0.375


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
