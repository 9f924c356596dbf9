"""The loss for embeddings that nobody should pass, by every implementation that runs here (made and judged by adversarial.py)."""

from __future__ import annotations

import pytest
import torch

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss
from falcon_fast.kernels import why_no_triton

from .adversarial import FARTHEST, KINDS, case, complaints

# How far off an input may be, relative to the largest of its row: 16-bit fixed point, float32, float16.
ROUNDING = {"cpu": 2.0**-15, "reference": 2.0**-22, "triton": 2.0**-11}
needs_triton = pytest.mark.skipif(
    why_no_triton(torch.device("cpu")) is not None, reason="needs TRITON_INTERPRET=1, which is set without a GPU"
)


def test_the_cases_are_of_every_kind():
    names = [case(seed).name for seed in range(300)]
    for piece in (
        *KINDS,
        "n 1,",
        "f 1,",
        "c 2 ",
        "Hadamard",
        "Rademacher",
        "beta 0,",
        "beta 1e+06",
        "reverse",
        "forward",
    ):
        assert any(piece in name for name in names), piece
    assert any(not case(seed).h1.is_contiguous() for seed in range(50))


@pytest.mark.parametrize(("implementation", "count"), [("cpu", 300), ("reference", 100)])
def test_some_hundreds_of_them(implementation, count):
    assert complaints(range(count), implementation, ROUNDING[implementation]) == []


def test_30_at_every_level(level):
    assert complaints(range(300, 330), "cpu", ROUNDING["cpu"]) == []


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_5_in_tritons_interpreter():
    assert complaints(range(5), "triton", ROUNDING["triton"], largest=130) == []


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_10000_of_them(implementation):
    assert complaints(range(10_000), implementation, ROUNDING[implementation]) == []


@pytest.mark.slow
def test_1000_at_every_level(level):
    assert complaints(range(10_000, 11_000), "cpu", ROUNDING["cpu"]) == []


@pytest.mark.slow
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_300_in_tritons_interpreter():
    assert complaints(range(300), "triton", ROUNDING["triton"]) == []


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("codes", [RademacherCodes(32, 200), HadamardCodes(32, 128)])
def test_logits_beyond_float32_are_no_number(codes, prior):
    """Their value is right or not finite, never a plausible one."""
    h1, h2 = (3e37 * torch.randn(4, 32).tanh() for _ in range(2))
    out = falcon_loss(h1.requires_grad_(), h2, codes, 0.01, prior=prior, implementation="cpu")
    assert not torch.isfinite(out.loss)
    assert not torch.isfinite(torch.autograd.grad(out.loss, h1)[0]).any()


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_logits_beyond_float16_are_no_number_in_the_kernels():
    """Distances between logits of a tile are stored in float16: those of embeddings on codes are twice the largest logit."""
    codes = RademacherCodes(32, 64)
    on_codes = codes.dense().T[:4].contiguous()
    for factor, finite in ((0.98, True), (1.02, False)):
        tau = 32 / (factor * FARTHEST)
        h = on_codes.clone().requires_grad_()
        out = falcon_loss(h, on_codes.flip(0), codes, tau, implementation="triton")
        (gradient,) = torch.autograd.grad(out.loss, h)
        exact = falcon_loss(on_codes.double(), on_codes.flip(0).double(), codes, tau).loss.item()
        assert torch.isfinite(out.loss) == torch.isfinite(gradient).all() == finite
        if finite:
            assert out.loss.item() == pytest.approx(exact, rel=1e-3)
