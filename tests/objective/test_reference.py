"""The mathematics: golden vectors, gradients by finite differences, and properties that hold for all inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast import RademacherCodes, falcon_loss, temperature
from falcon_fast.objective.reference import PEAK_COPIES, log_mean_assignment, prior_term, reference_loss

from ..vectors import GOLDEN, golden_vectors


def random_case(seed: int, n: int, f: int, c: int, scale: float = 1.0):
    random = np.random.RandomState(seed)
    h1, h2 = (torch.from_numpy(np.tanh(scale * random.randn(n, f))).requires_grad_() for _ in range(2))
    return h1, h2, RademacherCodes(f, c, seed), temperature(f, c, n)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_all_golden_vectors_are_here():
    assert len(GOLDEN) == 8


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name: str):
    case = golden_vectors(name)
    codes = RademacherCodes.from_dense(torch.from_numpy(case["codes"]))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        h1, h2 = (torch.from_numpy(case[k]).to(dtype).requires_grad_() for k in ("h1", "h2"))
        out = falcon_loss(
            h1,
            h2,
            codes,
            float(case["tau"]),
            beta=float(case["beta"]),
            prior=str(case["prior"]),
            implementation="reference",
        )
        g1, g2 = gradient(out.loss, h1, h2)
        assert out.loss.item() == pytest.approx(case["loss"].item(), rel=tolerance)
        absolute = 1e-6 if dtype == torch.float32 else 1e-15
        assert out.prior.item() == pytest.approx(case["prior_term"].item(), rel=tolerance, abs=absolute)
        assert out.invariance.item() == pytest.approx(case["invariance_term"].item(), rel=tolerance, abs=absolute)
        for mine, theirs in ((g1, case["grad_h1"]), (g2, case["grad_h2"])):
            assert torch.isfinite(mine).all()
            assert relative(mine.double(), torch.from_numpy(theirs)) < tolerance


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_equals_the_definition_where_nothing_underflows(prior: str):
    h1, h2, codes, tau = random_case(0, 6, 16, 40)
    w = codes.dense(torch.float64)
    p1, p2 = ((h @ w / tau).softmax(1) for h in (h1, h2))
    bars = p1.mean(0), p2.mean(0)
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    if prior == "reverse":
        terms = [(b * (b / uniform).log()).sum() for b in bars]
    else:
        terms = [(uniform * (uniform / b).log()).sum() for b in bars]
    cross = [-(p2 * p1.log()).sum(1).mean(), -(p1 * p2.log()).sum(1).mean()]
    out = falcon_loss(h1, h2, codes, tau, beta=0.7, prior=prior)
    assert out.prior.item() == pytest.approx(sum(terms).item() / 2, rel=1e-12)
    assert out.invariance.item() == pytest.approx(sum(cross).item() / 2, rel=1e-12)
    assert out.loss.item() == pytest.approx((sum(terms) + 0.7 * sum(cross)).item() / 2, rel=1e-12)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_gradcheck(prior: str):
    h1, h2, codes, tau = random_case(1, 4, 8, 12, scale=0.5)
    assert torch.autograd.gradcheck(lambda a, b: falcon_loss(a, b, codes, tau, beta=0.7, prior=prior).loss, (h1, h2))


cases = st.tuples(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.integers(2, 70))


@settings(max_examples=30)
@given(case=cases, prior=st.sampled_from(["reverse", "forward"]), scale=st.floats(0.01, 5))
def test_properties(case, prior: str, scale: float):
    seed, n, f, c = case
    h1, h2, codes, tau = random_case(seed, n, f, c, scale)
    options = {"beta": 0.7, "prior": prior}
    out = falcon_loss(h1, h2, codes, tau, **options)
    g1, g2 = gradient(out.loss, h1, h2)

    swapped = falcon_loss(h2, h1, codes, tau, **options)
    s2, s1 = gradient(swapped.loss, h2, h1)
    torch.testing.assert_close(swapped.loss, out.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((s1, s2), (g1, g2), rtol=1e-9, atol=1e-12)

    order = torch.from_numpy(np.random.RandomState(seed).permutation(c))
    permuted = falcon_loss(h1, h2, RademacherCodes.from_dense(codes.dense()[:, order]), tau, **options)
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(permuted.loss, h1, h2), (g1, g2), rtol=1e-9, atol=1e-12)
    assert permuted.codes_used == out.codes_used

    assert 1 <= out.codes_used <= min(c, 2 * n)
    assert out.prior >= -1e-12 and out.invariance >= -1e-12


@settings(max_examples=30)
@given(case=cases, prior=st.sampled_from(["reverse", "forward"]))
def test_gradients_of_the_logits(case, prior: str):
    """Each row of dL/dZ sums to zero, and a constant added to a row's logits changes nothing."""
    seed, n, _, c = case
    random = np.random.RandomState(seed)
    # With W the identity and tau 1 the embeddings are the logits.
    z1, z2 = (torch.from_numpy(5 * random.randn(n, c)).requires_grad_() for _ in range(2))
    eye = torch.eye(c, dtype=torch.float64)
    out = reference_loss(z1, z2, eye, 1.0, 0.7, prior, None)
    g1, g2 = gradient(out[0], z1, z2)
    for g in (g1, g2):
        torch.testing.assert_close(g.sum(1), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-12)
    shift = torch.from_numpy(100 * random.randn(n, 1))
    moved = reference_loss(z1 + shift, z2 - shift, eye, 1.0, 0.7, prior, None)
    torch.testing.assert_close(moved[0], out[0], rtol=1e-11, atol=1e-11)


def test_the_closed_form_of_the_gradient():
    """dL/dZ_1 = 1/(2N) (P_1 (g_1 - a_1) + beta (P_1 - P_2) - beta P_1 (Z_2 - x_12)), with both priors' g."""
    random = np.random.RandomState(0)
    n, c, beta = 5, 30, 0.7
    z1, z2 = (torch.from_numpy(2 * random.randn(n, c)).requires_grad_() for _ in range(2))
    p1, p2 = z1.softmax(1).detach(), z2.softmax(1).detach()
    for prior in ("reverse", "forward"):
        pbar = p1.mean(0)
        g = torch.log(c * pbar) if prior == "reverse" else -1 / (c * pbar)
        a, x12 = (p1 * g).sum(1, keepdim=True), (p1 * z2).sum(1, keepdim=True).detach()
        expected = (p1 * (g - a) + beta * (p1 - p2) - beta * p1 * (z2.detach() - x12)) / (2 * n)
        loss = reference_loss(z1, z2, torch.eye(c, dtype=torch.float64), 1.0, beta, prior, None)[0]
        torch.testing.assert_close(gradient(loss, z1)[0], expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("n", [64, 256, 1024])
def test_finite_in_float32_at_the_optimum(prior: str, n: int):
    """Embeddings on their codes."""
    codes = RademacherCodes(256, 512, 0)
    h = codes.dense()[:, :32].T.contiguous().requires_grad_()
    out = falcon_loss(h, h, codes, temperature(256, 512, n), prior=prior, implementation="reference")
    assert all(torch.isfinite(x) for x in (out.loss, out.prior, out.invariance))
    assert torch.isfinite(gradient(out.loss, h)[0]).all()
    if prior == "reverse":
        assert out.prior.item() == pytest.approx(math.log(512 / 32), rel=1e-3)  # uniform over 32 of 512 codes
    assert out.codes_used == 32


def with_plain_probabilities(h1: torch.Tensor, h2: torch.Tensor, w: torch.Tensor, tau: float) -> torch.Tensor:
    """The loss as the paper writes it (beta = 1, reverse prior), with probabilities that float32 may round to zero."""
    c = w.shape[1]
    p1, p2 = ((h @ w / tau).softmax(1) for h in (h1, h2))
    priors = [torch.sum(p.mean(0) * torch.log(c * p.mean(0))) for p in (p1, p2)]
    crosses = [-torch.sum(p * (h @ w / tau).log_softmax(1)) / len(h) for p, h in ((p2, h1), (p1, h2))]
    return 0.5 * sum(priors) + 0.5 * sum(crosses)


def test_the_smallest_case_where_plain_probabilities_are_nan():
    """One image, f = 1, c = 2, n = 8: the other code's probability exp(-104) is 0 in float32, and 0 ln 0 is NaN."""
    h, w = torch.ones(1, 1), torch.tensor([[1.0, -1.0]])
    for n, nan in ((7, False), (8, True)):
        tau = temperature(1, 2, n)
        assert with_plain_probabilities(h, h, w, tau).isnan().item() is nan
        assert reference_loss(h, h, w, tau, 1.0, "reverse", None)[0].item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.fixture(scope="module")
def published_dictionary() -> tuple[RademacherCodes, torch.Tensor]:
    codes = RademacherCodes(2048, 16384, 0)
    return codes, codes.dense()


@pytest.mark.parametrize(
    ("n", "share", "nan"), [(31, 1.0, False), (33, 1.0, True), (64, 0.70, False), (64, 0.71, True)]
)
def test_where_plain_probabilities_become_nan_at_the_published_size(published_dictionary, n, share, nan):
    """n images on `share` times their codes. n = 32 goes either way with the rounding of the exponential."""
    codes, w = published_dictionary
    h, tau = share * w[:, :n].T.contiguous(), temperature(2048, 16384, n)
    assert with_plain_probabilities(h, h, w, tau).isnan().item() is nan
    loss = falcon_loss(h, h, codes, tau, implementation="reference").loss.item()
    assert loss == pytest.approx(math.log(16384 / n), rel=1e-4)


def test_a_loss_and_a_gradient_where_half_the_views_disagree(published_dictionary):
    """Where the gradient is needed most. Two codes are sqrt(n) ln(1 / eps) = 147 apart: half of it, and the prior."""
    codes, w = published_dictionary
    n, tau = 64, temperature(2048, 16384, 64)
    h1 = w[:, :n].T.contiguous()
    h2 = torch.cat((w[:, n : n + n // 2].T, h1[n // 2 :])).contiguous()
    assert with_plain_probabilities(h1, h2, w, tau).isnan()
    h1.requires_grad_()
    loss = falcon_loss(h1, h2, codes, tau, implementation="reference").loss
    assert loss.item() == pytest.approx(79, abs=1)
    assert loss.item() == pytest.approx(0.5 * 8 * math.log(1e8) + math.log(16384 / n), rel=0.02)
    (grad,) = gradient(loss, h1)
    assert torch.isfinite(grad).all() and (grad.norm(dim=1) > 1e-3).tolist() == [True] * 32 + [False] * 32


def test_log_mean_assignment_does_not_underflow():
    log_p = torch.tensor([[-400.0, 0.0], [-402.0, 0.0]])
    expected = -400 + math.log((1 + math.exp(-2)) / 2)
    assert log_mean_assignment(log_p, None)[0].item() == pytest.approx(expected, rel=1e-6)
    assert prior_term(log_mean_assignment(log_p, None), "reverse").item() == pytest.approx(math.log(2))


def test_the_stated_peak_of_memory_is_honest():
    """PEAK_COPIES bounds what forward and backward hold at once, and not by more than a factor of two."""
    n, f, c = 64, 8, 4096
    h1, h2, codes, tau = random_case(0, n, f, c)
    h1, h2 = (h.detach().float().requires_grad_() for h in (h1, h2))
    falcon_loss(h1, h2, codes, tau, implementation="reference").loss.backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        falcon_loss(h1, h2, codes, tau, implementation="reference").loss.backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert PEAK_COPIES / 2 < peak / (n * c * 4) < PEAK_COPIES
