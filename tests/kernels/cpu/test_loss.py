"""The CPU implementation against the float64 reference, level by level of the processor, and without the extension."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss, temperature
from falcon_fast.kernels import cpu_extension
from falcon_fast.kernels.cpu import sweeps
from falcon_fast.kernels.cpu.plan import dense_plan, own_products
from falcon_fast.kernels.spec import LossSpec

from ...vectors import GOLDEN, golden_vectors

needs_extension = pytest.mark.skipif(cpu_extension is None, reason="extension not built")


def embeddings(seed: int, n: int, f: int, scale: float = 1.0):
    random = np.random.RandomState(seed)
    return [torch.from_numpy(np.tanh(scale * random.randn(n, f)).astype(np.float32)) for _ in range(2)]


def evaluate(h1, h2, codes, tau, **options):
    """The output, and both gradients side by side."""
    h1, h2 = h1.clone().requires_grad_(), h2.clone().requires_grad_()
    out = falcon_loss(h1, h2, codes, tau, **options)
    return out, torch.cat(torch.autograd.grad(out.loss, (h1, h2)))


def assert_close_to_reference(h1, h2, codes, tau, tolerance=1e-3, **options):
    """Loss to 1e-4 relative or 1e-6 absolute; the gradient to `tolerance` of its norm, or float32's rounding of P W^T / tau."""
    out, gradient = evaluate(h1, h2, codes, tau, implementation="cpu", **options)
    options.pop("plan", None)
    expected, exact = evaluate(h1.double(), h2.double(), codes, tau, implementation="reference", **options)
    assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
    for mine, theirs in zip(out[:3], expected[:3], strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-4 * max(1.0, expected.loss.item()))
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4, abs=1e-6)
    assert (gradient - exact).norm() <= tolerance * exact.norm() + 1e-6 * math.sqrt(codes.f) / tau
    return out, expected


@pytest.mark.parametrize("plan", ["stored", "streaming"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(level, name: str, plan: str):
    case = golden_vectors(name)
    codes = RademacherCodes.from_dense(torch.from_numpy(case["codes"]))
    h1, h2 = (torch.from_numpy(case[k]).float() for k in ("h1", "h2"))
    options = {"beta": float(case["beta"]), "prior": str(case["prior"]), "plan": plan, "implementation": "cpu"}
    out, gradient = evaluate(h1, h2, codes, float(case["tau"]), **options)
    exact = torch.from_numpy(np.concatenate((case["grad_h1"], case["grad_h2"])))
    assert out.loss.item() == pytest.approx(case["loss"].item(), rel=1e-4)
    assert out.prior.item() == pytest.approx(case["prior_term"].item(), rel=1e-4, abs=1e-6)
    assert out.invariance.item() == pytest.approx(case["invariance_term"].item(), rel=1e-4, abs=1e-6)
    assert torch.isfinite(gradient).all()
    assert (gradient - exact).norm() <= 1e-3 * exact.norm()


priors = st.sampled_from(["reverse", "forward"])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 70),
    f=st.integers(1, 300),
    c=st.integers(2, 3000),
    scale=st.floats(0.05, 3),
    prior=priors,
    plan=st.sampled_from(["stored", "streaming"]),
)
def test_dense_shapes(seed, n, f, c, scale, prior, plan):
    h1, h2 = embeddings(seed, n, f, scale)
    codes = RademacherCodes(f, c, seed)
    assert_close_to_reference(h1, h2, codes, temperature(f, c, min(n, 2 * f)), beta=0.7, prior=prior, plan=plan)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 70),
    log_f=st.integers(0, 9),
    blocks=st.integers(1, 20),
    scale=st.floats(0.05, 3),
    prior=priors,
)
def test_hadamard_shapes(seed, n, log_f, blocks, scale, prior):
    f = 2**log_f
    c = max(2, f * blocks)
    h1, h2 = embeddings(seed, n, f, scale)
    codes = HadamardCodes(f, c, seed)
    assert_close_to_reference(h1, h2, codes, temperature(f, c, min(n, 2 * f)), beta=0.7, prior=prior)


SHAPES = [
    (RademacherCodes, 37, 200, 700),
    (RademacherCodes, 5, 33, 129),
    (HadamardCodes, 19, 128, 640),
    (HadamardCodes, 6, 4096, 8192),
    (HadamardCodes, 7, 8, 48),
]


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize(("kind", "n", "f", "c"), SHAPES)
def test_every_level(level, kind, n, f, c, prior):
    h1, h2 = embeddings(1, n, f)
    codes, tau = kind(f, c, 3), temperature(f, c, min(n, f))
    for plan in ("stored", "streaming") if kind is RademacherCodes else ("auto",):
        assert_close_to_reference(h1, h2, codes, tau, beta=0.7, prior=prior, plan=plan)


def _keeps(n, f, c, budget) -> bool:
    try:
        dense_plan(n, f, c, "streaming", budget)
    except ValueError:
        return False
    return True


def test_strips_make_no_difference(level):
    """Several narrow strips, and one, give the same statistics: the merging of rows is exercised."""
    n, f, c = 9, 40, 2000
    h1, h2 = embeddings(2, n, f)
    codes, tau = RademacherCodes(f, c), temperature(f, c, 9)
    wide, one = evaluate(h1, h2, codes, tau, implementation="cpu", plan="streaming")
    one_strip = dense_plan(n, f, c, "streaming", None)
    assert one_strip.width >= c
    budget = next(b for b in range(10_000, one_strip.peak, 10_000) if _keeps(n, f, c, b))
    assert dense_plan(n, f, c, "streaming", budget).width < c / 4
    out, gradient = evaluate(h1, h2, codes, tau, implementation="cpu", plan="streaming", memory_budget=budget)
    torch.testing.assert_close(tuple(out), tuple(wide), rtol=1e-6, atol=1e-6)
    assert (gradient - one).norm() <= 2e-4 * one.norm()


@needs_extension
@pytest.mark.parametrize(("kind", "n", "f", "c"), SHAPES)
def test_one_thread_and_many_are_bit_equal(kind, n, f, c):
    if kind is RademacherCodes and not own_products():
        pytest.skip("torch's own product, which promises no such thing")
    h1, h2 = embeddings(4, n, f)
    codes, tau = kind(f, c, 5), temperature(f, c, min(n, f))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [
                (*evaluate(h1, h2, codes, tau, implementation="cpu", plan=plan),)
                for plan in (("stored", "streaming") if kind is RademacherCodes else ("auto",))
            ]
    finally:
        torch.set_num_threads(before)
    plans = len(results) // 4
    for k, (out, gradient) in enumerate(results):
        assert torch.equal(gradient, results[k % plans][1])
        assert all(torch.equal(a, b) for a, b in zip(out, results[k % plans][0], strict=True))


def adversarial():
    random = np.random.RandomState(0)
    codes = RademacherCodes(64, 200, 1)
    w = codes.dense().T.contiguous()
    h1, h2 = embeddings(6, 12, 64)
    tau = temperature(64, 200, 12)
    duplicated = RademacherCodes.from_dense(codes.dense()[:, torch.from_numpy(random.randint(0, 5, 300))])
    return {
        "logits of 1000": (h1, h2, codes, (h1 @ w.T).abs().max().item() / 1000),
        "rows on their codes": (w[:12], w[:12], codes, temperature(64, 200, 1024)),
        "rows on each other's codes": (w[:12], w[12:24], codes, temperature(64, 200, 256)),
        "all-negative logits": (
            h1 * 0.01 - w[:1],
            h2 * 0.01 - w[:1],
            RademacherCodes.from_dense(w[:1].T.repeat(1, 7)),
            tau,
        ),
        "duplicated codes": (h1, h2, duplicated, tau),
        "one row": (h1[:1], h2[:1], codes, tau),
        "identical views": (h1, h1, codes, tau),
        "zeros": (torch.zeros(3, 64), torch.zeros(3, 64), codes, tau),
        "one feature a thousand times the others": (h1 * torch.eye(64)[0] * 999 + h1, h2, codes, 50 * tau),
    }


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_inputs(level, name, prior):
    h1, h2, codes, tau = adversarial()[name]
    for plan in ("stored", "streaming"):
        assert_close_to_reference(h1, h2, codes, tau, prior=prior, plan=plan, tolerance=2e-3)


@pytest.mark.parametrize("codes", [RademacherCodes(96, 500, 1), HadamardCodes(128, 512, 1)])
def test_properties(level, codes):
    h1, h2 = embeddings(7, 21, codes.f)
    tau = temperature(codes.f, codes.c, 21)
    out, gradient = evaluate(h1, h2, codes, tau, implementation="cpu")
    swapped, mirrored = evaluate(h2, h1, codes, tau, implementation="cpu")
    torch.testing.assert_close(swapped.loss, out.loss, rtol=1e-6, atol=0)
    assert (torch.cat(gradient.chunk(2)[::-1]) - mirrored).norm() <= 1e-4 * gradient.norm()
    expected = falcon_loss(h1, h2, codes, tau, implementation="reference")
    assert out.codes_used.item() == expected.codes_used.item() and out.codes_used.dtype == torch.int64
    assert not out.prior.requires_grad and not out.invariance.requires_grad


def test_the_gradient_is_scaled_by_what_follows():
    """A gradient scaler's factor reaches the float32 gradient before it is rounded to the embeddings' dtype."""
    codes, tau = RademacherCodes(64, 300), 2.0
    h1, h2 = (h.half() for h in embeddings(8, 5, 64))
    _, gradient = evaluate(h1.float(), h2.float(), codes, tau, implementation="cpu")
    a = h1.clone().requires_grad_()
    (falcon_loss(a, h2, codes, tau, implementation="cpu").loss * 2.0**12).backward()
    assert a.grad.dtype == torch.float16
    torch.testing.assert_close(a.grad.float(), gradient[:5] * 2.0**12, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [RademacherCodes, HadamardCodes])
def test_a_second_backward_gives_the_gradient_again(kind):
    h1, h2 = (h.requires_grad_() for h in embeddings(9, 5, 64))
    loss = falcon_loss(h1, h2, kind(64, 320), 2.0, implementation="cpu").loss
    first = torch.autograd.grad(loss, (h1, h2), torch.tensor(3.0), retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(loss, (h1, h2), torch.tensor(3.0))
    for g, before, now in zip(again, kept, first, strict=True):
        assert torch.equal(g, before) and torch.equal(now, before)


# In a process of its own, without the threads that other tests have started: torch.compile's, for one, a child waits for.
FORKED = """
import multiprocessing, numpy, torch
from falcon_fast import HadamardCodes, falcon_loss

def gradient():
    torch.set_num_threads(2)
    random = numpy.random.RandomState(12)  # not torch's: its tanh waits for the threads that stayed behind
    h1, h2 = (torch.from_numpy(numpy.tanh(random.randn(13, 64))).float().requires_grad_() for _ in range(2))
    loss = falcon_loss(h1, h2, HadamardCodes(64, 1024), 2.0, implementation="cpu").loss
    return torch.stack(torch.autograd.grad(loss, (h1, h2))).numpy().tobytes()

expected = gradient()
receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
child = multiprocessing.get_context("fork").Process(target=lambda: sender.send_bytes(gradient()))
child.start()
if not receiver.poll(60):
    child.kill()
    raise SystemExit("the child hangs")
assert receiver.recv_bytes() == expected
child.join(60)
"""


@needs_extension
def test_a_forked_child_works_alone():
    """The threads of OpenMP stay behind in the parent; a child that waited for them would wait for ever."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_without_gradient_the_third_sweep_is_left_out(monkeypatch):
    monkeypatch.setattr(sweeps._Strips, "gradient", None)
    h1, h2 = embeddings(9, 5, 64)
    codes = RademacherCodes(64, 300)
    assert falcon_loss(h1, h2, codes, 2.0).loss.grad_fn is None
    with torch.no_grad():
        falcon_loss(h1.requires_grad_(), h2, codes, 2.0)


def test_second_derivatives_are_refused():
    h1, h2 = (h.requires_grad_() for h in embeddings(9, 5, 64))
    loss = falcon_loss(h1, h2, RademacherCodes(64, 300), 2.0).loss
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss, h1, create_graph=True)


def test_memory_stays_within_the_plan(level):
    """What torch allocates in forward and backward; C++ scratch is at most the strip's 2-byte copy, counted in the plan."""
    n, f, c = 64, 64, 40_000
    h1, h2 = (h.requires_grad_() for h in embeddings(10, n, f))
    codes = RademacherCodes(f, c)
    for plan in ("stored", "streaming"):
        falcon_loss(h1, h2, codes, 2.0, plan=plan).loss.backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            falcon_loss(h1, h2, codes, 2.0, plan=plan).loss.backward()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        bound = dense_plan(n, f, c, plan, None).peak
        assert peak <= bound, (plan, peak / 2**20, bound / 2**20)
        if plan == "streaming" and own_products():
            assert bound < 2 * n * c * 2


@pytest.mark.parametrize("codes", [RademacherCodes(64, 130), HadamardCodes(64, 64)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_through(level, codes, bad):
    """A diverged network sees it in its loss, as with the reference, and nothing crashes."""
    h1, h2 = embeddings(12, 3, 64)
    h1[1, 5] = bad
    out, _ = evaluate(h1, h2, codes, 2.0, implementation="cpu")
    assert math.isnan(out.loss.item())


def test_the_door(level):
    h1, h2 = embeddings(11, 4, 64)
    codes, blocks = RademacherCodes(64, 256), HadamardCodes(64, 256)
    with pytest.raises(ValueError, match="float64"):
        falcon_loss(h1.double(), h2.double(), codes, 1.0, implementation="cpu")
    with pytest.raises(ValueError, match="auto or streaming"):
        falcon_loss(h1, h2, blocks, 1.0, plan="stored")
    with pytest.raises(ValueError, match="no plan"):
        falcon_loss(h1, h2, codes, 1.0, plan="stored", implementation="reference")
    with pytest.raises(ValueError, match="budget"):
        falcon_loss(h1, h2, codes, 1.0, memory_budget=1000)
    with pytest.raises(ValueError, match="budget"):
        falcon_loss(h1, h2, blocks, 1.0, memory_budget=1000)
    strided = torch.stack((h1, h2), dim=2)
    torch.testing.assert_close(
        falcon_loss(strided[..., 0], strided[..., 1], codes, 1.0), falcon_loss(h1, h2, codes, 1.0), rtol=0, atol=0
    )
    assert math.isfinite(falcon_loss(h1, h2, codes, 1.0).loss.item())


@pytest.mark.parametrize("codes", [RademacherCodes(40, 100), HadamardCodes(64, 128), HadamardCodes(8, 16)])
def test_opcheck(level, codes):
    from falcon_fast.kernels.cpu.loss import loss_op

    h1, h2 = (h.requires_grad_() for h in embeddings(0, 4, codes.f))
    spec = LossSpec(codes.c, isinstance(codes, HadamardCodes), 2.0)
    torch.library.opcheck(loss_op, (h1, h2, codes.words, *spec.flat()))
    without = replace(spec, with_gradient=False)
    with torch.no_grad():
        torch.library.opcheck(loss_op, (h1.detach(), h2.detach(), codes.words, *without.flat()))


def test_the_gradient_may_be_asked_for_twice_and_scaled():
    codes = RademacherCodes(32, 100)
    h1, h2 = embeddings(0, 5, 32)
    out = falcon_loss(h1.requires_grad_(), h2, codes, 2.0, implementation="cpu")
    (first,) = torch.autograd.grad(out.loss, h1, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(-3 * out.loss, h1)
    torch.testing.assert_close(second, -3 * kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break_to_the_same_bits(dtype):
    codes = RademacherCodes(40, 100)
    h1, h2 = (h.to(dtype) for h in embeddings(0, 4, 40))

    def step(a, b):
        out = falcon_loss(a * 1.0, b, codes, 2.0, implementation="cpu")
        return out.loss * 2, out.codes_used

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        a, b = h1.clone().requires_grad_(), h2.clone().requires_grad_()
        value, used = function(a, b)
        results.append((value, used, *torch.autograd.grad(value, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
