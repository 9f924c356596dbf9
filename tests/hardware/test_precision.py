"""The precision that a device uses; the dtypes that reach the loss; scaled gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes
from falcon_fast.config import PRECISIONS, OptimizerConfig, TrainingConfig
from falcon_fast.hardware import precision as module
from falcon_fast.hardware.precision import Precision, choose_precision
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import FalconNetwork, ResNet8
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, training_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "native", "done", "line"),
    [
        ("auto", True, "float32", None),
        ("auto", False, "float32", None),
        ("float32", False, "float32", None),
        ("bf16", True, "bf16", None),
        (
            "bf16",
            False,
            "float32",
            "--amp (--precision bf16): this CPU has no native bfloat16 products, training in float32",
        ),
        ("fp16", True, "fp16", None),
        ("fp16", False, "float32", "--precision fp16: this CPU has no native float16 products"),
        ("tf32", True, "float32", "--precision tf32: TF32 needs an NVIDIA GPU, Ampere or newer, training in float32"),
    ],
)
def test_what_a_cpu_does_and_says(monkeypatch, asked, native, done, line):
    monkeypatch.setattr(module, "native_bfloat16", lambda: native)
    monkeypatch.setattr(module, "native_float16", lambda: native)
    found, notes = choose_precision(TrainingConfig(precision=asked), CPU)
    assert found.name == done and len(notes) == (line is not None)
    assert line is None or (notes[0].startswith(line) and "\n" not in notes[0])


@pytest.mark.parametrize(("asked", "done"), [("auto", "float32"), *((name, name) for name in PRECISIONS[1:])])
def test_a_gpu_does_what_it_is_asked(monkeypatch, asked, done):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision(TrainingConfig(precision=asked), GPU) == (Precision(done, asked != "auto"), ())


def test_an_old_gpu_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    found, (line,) = choose_precision(TrainingConfig(precision="tf32"), GPU)
    assert found == Precision() and "older than Ampere" in line
    found, (line,) = choose_precision(TrainingConfig(precision="bf16"), GPU)
    assert found.name == "bf16" and "--precision fp16 is faster" in line


def test_native_products_are_asked_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert module.native_bfloat16() is native
    assert isinstance(module.native_float16(), bool)


def flags() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [("highest", True), ("high", False)])
def test_switches_of_tf32_only_where_asked_and_only_inside(before):
    initially = flags()
    try:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        for chosen, expected in (
            (Precision("tf32", True), ("high", True)),
            (Precision("float32", True), ("highest", False)),
            (Precision("float32", False), before),
            (Precision("bf16", True), before),
        ):
            with pytest.raises(KeyError), chosen.switches():
                assert flags() == expected
                raise KeyError
            assert flags() == before
    finally:
        torch.set_float32_matmul_precision(initially[0])
        torch.backends.cudnn.allow_tf32 = initially[1]
    assert flags() == initially


def learner(name: str, seed: int = 0, optimizer: str = "adamw", **options) -> Learner:
    torch.manual_seed(seed)
    network = per_view_batchnorm(FalconNetwork(ResNet8(4), FalconProjector(16, 32)))
    criterion = FalconLoss(RademacherCodes(32, 64), 4.0)
    config = OptimizerConfig(name=optimizer, lr=1e-3, weight_decay=1e-2)
    chosen = Precision(name)
    return Learner(
        network,
        criterion,
        None,
        build_optimizer(config, network, None, 0.0),
        chosen.autocast,
        chosen.scaler(CPU),
        **options,
    )


@pytest.mark.parametrize("name", ["float32", "tf32", "bf16", "fp16"])
def test_embeddings_reach_the_loss_in_float32_and_the_backbone_is_low(name):
    mine, seen = learner(name), {}
    mine.network.backbone.stages.register_forward_hook(lambda m, i, o: seen.update(backbone=o.dtype))
    mine.criterion.register_forward_hook(lambda m, i, o: seen.update(embeddings=i[0].dtype, loss=o.loss.dtype))
    metrics = training_step(mine, torch.randn(12, 3, 8, 8), None, 1.0, True)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    assert seen == {"backbone": low, "embeddings": torch.float32, "loss": torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in mine.network.parameters())
    assert metrics.loss.isfinite() and metrics.grad_norm.dtype == torch.float32
    assert (mine.scaler is not None) == (name == "fp16")


def test_scaled_gradients_are_unscaled_before_anyone_uses_them():
    """The same gradient and step whatever the scale, a power of two, in float32 products."""
    views, found = torch.randn(12, 3, 8, 8), []
    for scaled in (False, True):
        mine = learner("fp16", clip_norm=0.01)
        mine.amp_dtype = None
        mine.scaler = mine.scaler if scaled else None
        norm = training_step(mine, views, None, 1.0).grad_norm
        found.append((norm, [p.detach() for p in mine.network.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_an_overflow_leaves_weights_and_moments_and_halves_the_scale(optimizer):
    mine, views = learner("fp16", optimizer=optimizer), torch.randn(12, 3, 8, 8)
    training_step(mine, views, None, 1.0)
    state = lambda: [v.clone() for s in mine.optimizer.state.values() for v in s.values() if v.dim()]  # noqa: E731
    weights, moments = [p.detach().clone() for p in mine.network.parameters()], state()
    before_projector = mine.network.projector.linear.weight.detach().clone()
    mine.scaler._scale.fill_(2.0**127)
    metrics = training_step(mine, views, None, 1.0, True)
    assert metrics.loss.isfinite() and not metrics.grad_norm.isfinite()
    for mine_, before in zip([*mine.network.parameters(), *state()], [*weights, *moments], strict=True):
        assert torch.equal(mine_, before)
    assert mine.scaler.get_scale() == 2.0**126
    mine.scaler._scale.fill_(1024.0)
    training_step(mine, views, None, 1.0)
    assert not torch.equal(mine.network.projector.linear.weight, before_projector)


def test_the_scale_is_state_that_comes_back_in_place():
    mine, other, views = learner("fp16"), learner("fp16"), torch.randn(12, 3, 8, 8)
    mine.scaler._scale.fill_(512.0)
    for _ in range(3):
        training_step(mine, views, None, 1.0)
    state = mine.extra_state()
    expected = {"bad_steps": [0, 0], "scaler.scale": 512.0, "scaler.growth": 3}
    assert {k: v.tolist() for k, v in state.items()} == expected
    for key, target in other.extra_state().items():
        target.copy_(state[key])
    assert other.scaler.state_dict() == mine.scaler.state_dict()
    assert learner("float32").extra_state().keys() == {"bad_steps"}


def test_no_scaler_without_float16():
    assert [Precision(name).scaler(CPU) is None for name in PRECISIONS[1:]] == [True, True, True, False]
    assert isinstance(learner("float32").network, nn.Module)
