from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from falcon_fast import FalconProjector, RademacherCodes, temperature
from falcon_fast.models.batchnorm import per_view_batchnorm


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


# ---- in every situation that a caller can bring ----


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * expected.norm())


@pytest.fixture(params=["tanh", "l2"])
def projector(request) -> FalconProjector:
    module = FalconProjector(10, 6, request.param, temperature_batch=8)
    with torch.no_grad():
        module.norm.weight.uniform_(0.5, 2)
        module.norm.bias.normal_()
    return module


@pytest.mark.parametrize("features", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_projector_of_any_dtype(projector, dtype, features, training):
    mine = per_view_batchnorm(copy.deepcopy(projector)).to(dtype).train(training)
    oracle = per_view_batchnorm(copy.deepcopy(mine)).double()
    x = torch.randn(8, 10).to(features)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    h, expected = mine(a), oracle(b)
    assert h.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert near(h, expected, tolerance)
    h.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in mine.named_parameters():
        assert parameter.grad.dtype == dtype
        theirs = oracle.get_parameter(name).grad
        assert (parameter.grad.double() - theirs).norm() <= 1e-2 * theirs.norm() + 1e-3, name
    assert a.grad.dtype == features
    rounding = torch.finfo(dtype).eps
    for name, buffer in mine.named_buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == dtype
            torch.testing.assert_close(buffer.double(), oracle.get_buffer(name), rtol=4 * rounding, atol=4 * rounding)
    assert mine.norm.num_batches_tracked == (2 if training else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_projector_under_any_default_dtype(projector, dtype):
    x = torch.randn(8, 10)
    expected = copy.deepcopy(projector)(x)
    torch.set_default_dtype(dtype)
    try:
        found = projector(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_projector_in_other_modes(projector):
    x = torch.randn(8, 10)
    expected = copy.deepcopy(projector)(x).detach()
    for mode in (torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode():
            assert torch.equal(copy.deepcopy(projector)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(projector))(x), expected)
    file = io.BytesIO()
    torch.save(projector, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert projector.to("meta")(x.to("meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_compiled_projector(projector, dtype):
    mine, x = projector.to(dtype), torch.randn(8, 10)
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    assert near(compiled(x), eager(x).detach(), 1e-6)
    assert near(mine.norm.running_mean, eager.norm.running_mean, 1e-2)


def test_a_projector_is_differentiated_twice_and_by_transforms(projector):
    module = projector.double().eval()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, x)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    assert near(torch.func.grad(lambda y: module(y).square().sum())(x.detach()), gradient, 1e-12)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.randn(8, 9), r"features must be a matrix \(N, 10\)"),
        (torch.randn(10), r"features must be a matrix"),
        (torch.randn(2, 4, 10), r"features must be a matrix"),
        (torch.ones(8, 10, dtype=torch.int64), "floating-point dtype"),
        (torch.randn(8, 10, device="meta"), "features are on meta"),
        (torch.randn(1, 10), "more than 1 value per channel"),
    ],
    ids=["width", "vector", "three dimensions", "integers", "device", "one row"],
)
def test_features_that_do_not_fit(projector, features, words):
    with pytest.raises(ValueError, match=words) as caught:
        projector(features)
    assert "\n" not in str(caught.value)
