"""The Triton kernels of the loss against the float64 reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss, temperature

pytest.importorskip("triton")

from falcon_fast.kernels.gpu import launch
from falcon_fast.kernels.gpu.loss import gradient, logits, loss, plan, tuning
from falcon_fast.kernels.spec import LossSpec

from ....vectors import GOLDEN, golden_vectors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGE = Path(launch.__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # inf - inf where the kernels mean it


def embeddings(n: int, f: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    random = np.random.RandomState(seed)
    return [torch.from_numpy(np.tanh(scale * random.randn(n, f)).astype(np.float32)).to(DEVICE) for _ in range(2)]


def evaluate(h1, h2, codes, tau, factor=1.0, **options):
    """The output, and both gradients (of `factor` times the loss) side by side, in float64."""
    h1, h2 = h1.detach().clone().requires_grad_(), h2.detach().clone().requires_grad_()
    out = falcon_loss(h1, h2, codes, tau, **options)
    return out, torch.cat(torch.autograd.grad(factor * out.loss, (h1, h2))).double()


def assert_close_to_reference(h1, h2, codes, tau, tolerance=1e-3, **options):
    codes = codes.to(DEVICE)
    out, found = evaluate(h1, h2, codes, tau, implementation="triton", **options)
    for name in ("plan", "memory_budget"):
        options.pop(name, None)
    expected, exact = evaluate(h1.double(), h2.double(), codes, tau, implementation="reference", **options)
    assert torch.isfinite(found).all()
    near = 2e-4 * max(1.0, expected.loss.item())
    for mine, theirs in zip(out[:3], expected[:3], strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=2e-4, abs=near)
    # fp16 rounds an embedding by 2^-12 of itself at most: what is left of the gradient then is a share of P W^T / tau.
    assert (found - exact).norm() <= tolerance * exact.norm() + 1e-5 * math.sqrt(codes.f) / tau
    return out, expected


@pytest.fixture
def narrow_ranges(monkeypatch):
    """Streaming in ranges of 1024 codes at these sizes too."""
    monkeypatch.setattr(plan, "RANGE_BYTES", 1)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not initialised holds NaN, or the largest integer."""
    empty = torch.empty

    def poisoned_empty(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(poisoned, name: str, stored: bool) -> None:
    case = golden_vectors(name)
    codes = RademacherCodes.from_dense(torch.from_numpy(case["codes"])).to(DEVICE)
    h1, h2 = (torch.from_numpy(case[k]).float().to(DEVICE) for k in ("h1", "h2"))
    options = {"beta": float(case["beta"]), "prior": str(case["prior"]), "plan": "stored" if stored else "streaming"}
    out, found = evaluate(h1, h2, codes, float(case["tau"]), implementation="triton", **options)
    exact = torch.from_numpy(np.concatenate((case["grad_h1"], case["grad_h2"]))).to(DEVICE)
    assert out.loss.item() == pytest.approx(case["loss"].item(), rel=1e-4)
    # What fp16 embeddings leave: 1.1e-4 in a term of same_views_reverse, 1.06e-3 in the gradient of saturated_forward.
    assert out.prior.item() == pytest.approx(case["prior_term"].item(), rel=2e-4, abs=1e-6)
    assert out.invariance.item() == pytest.approx(case["invariance_term"].item(), rel=2e-4, abs=1e-6)
    assert torch.isfinite(found).all()
    assert (found - exact).norm() <= (1.2e-3 if name == "saturated_forward" else 1e-3) * exact.norm()


@pytest.mark.parametrize(
    ("n", "f", "c", "options"),
    [
        (1, 3, 2, {}),
        (1, 3, 2, {"prior": "forward"}),
        (5, 40, 300, {"beta": 0.3}),
        (70, 100, 600, {"plan": "stored"}),
        # Three ranges, the last neither a multiple of 1024 nor of 128.
        (33, 64, 2200, {"plan": "streaming", "prior": "forward"}),
    ],
)
def test_dense_codes_of_any_shape(narrow_ranges, poisoned, n, f, c, options) -> None:
    h1, h2 = embeddings(n, f)
    tau = temperature(f, c, max(1, f // 32))  # sigma_z about 2 whatever f
    out, expected = assert_close_to_reference(h1, h2, RademacherCodes(f, c), tau, **options)
    assert out.codes_used.item() == expected.codes_used.item()


@pytest.mark.parametrize(
    ("n", "f", "c", "prior"),
    [
        (7, 8, 64, "reverse"),
        (19, 64, 320, "reverse"),
        (35, 128, 128, "forward"),
        (5, 512, 1024, "reverse"),
        (2, 2048, 2048, "forward"),
    ],
)
def test_hadamard_codes(poisoned, n, f, c, prior) -> None:
    h1, h2 = embeddings(n, f)
    out, expected = assert_close_to_reference(
        h1, h2, HadamardCodes(f, c), temperature(f, c, max(1, f // 32)), prior=prior
    )
    assert out.codes_used.item() == expected.codes_used.item()


@pytest.mark.parametrize(("spread", "limit"), [(4, 1e-3), (23, 4e-3)])
@pytest.mark.parametrize("kind", [RademacherCodes, HadamardCodes])
def test_gradient_error_by_the_spread_of_the_logits(kind, spread, limit) -> None:
    """Relative to float64, at the start of a usual run and far beyond freezing."""
    h1, h2 = embeddings(16, 256)
    tau = (torch.cat((h1, h2)).square().mean().sqrt() * 256**0.5 / spread).item()
    codes = kind(256, 1024).to(DEVICE)
    _, found = evaluate(h1, h2, codes, tau, implementation="triton")
    _, exact = evaluate(h1.double(), h2.double(), codes, tau, implementation="reference")
    assert (found - exact).norm() <= limit * exact.norm()


def test_columns_of_a_block_split_over_programs(monkeypatch) -> None:
    """Few blocks on a large GPU: each program takes some of the first product's columns."""
    monkeypatch.setattr(loss, "device_facts", lambda device: launch.Facts("H100", (9, 0), 132))
    assert plan.hadamard_plan(6, 1024, 2048, (9, 0), 132).width < 32
    h1, h2 = embeddings(6, 1024)
    assert_close_to_reference(h1, h2, HadamardCodes(1024, 2048), temperature(1024, 2048, 32))


@pytest.mark.parametrize(("f", "name", "strip"), [(100, "stored", 64), (64, "streaming", 16)])
def test_codes_expanded_before_the_products(monkeypatch, poisoned, narrow_ranges, f, name, strip) -> None:
    """Many images on Hopper: two chunks of each range, the last neither whole nor a multiple of 128."""
    monkeypatch.setattr(loss, "device_facts", lambda device: launch.Facts("H100", (9, 0), 132))
    monkeypatch.setattr(loss, "EXPANDED_CODES", 512)
    monkeypatch.setattr(logits, "EXPANDED_CODES", 512)
    monkeypatch.setattr(plan, "EXPANDED_ROWS", {9: 80})
    monkeypatch.setattr(plan, "LEAST_STRIP", strip)
    chosen = plan.dense_plan(43, f, 1100, name == "stored", None, (9, 0), 132)
    assert chosen.library and chosen.logits.expanded and chosen.strip == strip
    h1, h2 = embeddings(43, f)
    assert_close_to_reference(h1, h2, RademacherCodes(f, 1100), temperature(f, 1100, f // 32), plan=name)


@pytest.mark.parametrize("tiles", [shape for shapes in tuning.ALTERNATIVES.values() for shape in shapes[1:]], ids=str)
def test_tuning_takes_the_fastest_and_changes_nothing_else(monkeypatch, tiles) -> None:
    h1, h2 = embeddings(5, 64)
    codes = RademacherCodes(64, 300)
    tried = []

    def milliseconds(h1, h2, words, shape):
        tried.append(shape)
        return 1.0 if shape == tiles else 2.0

    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "TUNING", True)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    capability = launch.device_facts(DEVICE).capability
    monkeypatch.setitem(tuning.ALTERNATIVES, capability[0], [tiles])
    usual = plan.logits_tiles(5, capability)
    for _ in range(2):
        assert_close_to_reference(h1, h2, codes, 2.0)
    assert sorted(tried) == sorted({usual, tiles}) and set(tuning._fastest.values()) == {tiles}


@pytest.mark.parametrize("plan", ["stored", "streaming"])
@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_wherever_the_logits_lie(plan, prior) -> None:
    """Logits up to 1000, all of them negative, equal views, equal codes: finite, and the loss is the reference's."""
    generator = torch.Generator().manual_seed(5)
    words = torch.where(torch.rand(64, 150, generator=generator) < 0.5, -1.0, 1.0)
    words[0] = 1.0
    words[:, 40:80] = words[:, :40]  # duplicated codes
    codes = RademacherCodes.from_dense(words).to(DEVICE)
    sharp = [(x * 1000 / 64).to(DEVICE) for x in (words[:, [3, 9, 100]].T, words[:, [3, 9, 101]].T)]
    negative = [h - 600 * torch.eye(1, 64, device=DEVICE) for h in embeddings(3, 64)]
    equal = [embeddings(3, 64)[0]] * 2
    for h1, h2 in (sharp, negative, equal):
        out, found = evaluate(h1, h2, codes, 1.0, implementation="triton", plan=plan, prior=prior)
        expected, exact = evaluate(h1.double(), h2.double(), codes, 1.0, implementation="reference", prior=prior)
        assert torch.isfinite(found).all()
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3, abs=1e-4)
        assert (found - exact).norm() <= 4e-3 * exact.norm() + 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_embeddings_of_any_size(scale) -> None:
    """fp16 ends at 65504 and at 6e-8: rows are scaled to fit."""
    h1, h2 = embeddings(4, 48)
    codes = RademacherCodes(48, 200).to(DEVICE)
    out, found = evaluate(h1 * scale, h2 * scale, codes, 3.0 * scale, implementation="triton")
    expected, exact = evaluate(h1.double(), h2.double(), codes, 3.0, implementation="reference")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    assert (found * scale - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codes", [RademacherCodes(64, 200), HadamardCodes(64, 128)], ids=["rademacher", "hadamard"])
def test_what_is_not_finite_gives_a_loss_that_is_not(codes, bad) -> None:
    h1, h2 = embeddings(3, 64)
    h2[1, 5] = bad
    out = falcon_loss(h1.requires_grad_(), h2, codes.to(DEVICE), 2.0, implementation="triton")
    assert not torch.isfinite(out.loss)
    assert not torch.isfinite(torch.autograd.grad(out.loss, h1)[0]).all()


def test_both_plans_and_every_run_give_the_same_bits(narrow_ranges) -> None:
    h1, h2 = embeddings(9, 64)
    codes = RademacherCodes(64, 700).to(DEVICE)
    stored, streamed, again = (
        evaluate(h1, h2, codes, 1.7, implementation="triton", plan=plan) for plan in ("stored", "streaming", "stored")
    )
    assert torch.equal(stored[1], again[1]) and all(torch.equal(a, b) for a, b in zip(stored[0], again[0], strict=True))
    torch.testing.assert_close(stored[1], streamed[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype) -> None:
    h1, h2 = (h.to(dtype) for h in embeddings(6, 64))
    codes = RademacherCodes(64, 200).to(DEVICE)
    a = h1.clone().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = falcon_loss(a, h2, codes, 2.0, implementation="triton")
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and a.grad.dtype == dtype
    expected, exact = evaluate(h1.double(), h2.double(), codes, 2.0, implementation="reference")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    assert (a.grad.double() - exact[:6]).norm() <= 2e-3 * exact[:6].norm() + 1e-2 * (dtype == torch.bfloat16)


def test_the_gradient_of_the_loss_is_multiplied_in() -> None:
    h1, h2 = embeddings(6, 64)
    codes = RademacherCodes(64, 200).to(DEVICE)
    _, once = evaluate(h1, h2, codes, 2.0, implementation="triton")
    _, scaled = evaluate(h1, h2, codes, 2.0, factor=-1024.0, implementation="triton")  # GradScaler's, a power of two
    assert torch.equal(scaled, -1024.0 * once)


def test_rows_of_a_larger_matrix_and_columns_of_one() -> None:
    """Not contiguous: read where they are, or copied where a row's numbers do not lie side by side."""
    h1, h2 = embeddings(6, 64)
    codes = RademacherCodes(64, 200).to(DEVICE)
    expected = falcon_loss(h1, h2, codes, 2.0, implementation="triton")
    wide = torch.cat((h1, h2), 1)
    tall = torch.cat((h1, h2)).T.contiguous().T
    for a, b in ((wide[:, :64], wide[:, 64:]), (tall[:6], tall[6:])):
        assert not a.is_contiguous()
        assert torch.equal(falcon_loss(a, b, codes, 2.0, implementation="triton").loss, expected.loss)


def test_only_the_loss_carries_gradient_and_only_where_wanted() -> None:
    h1, h2 = embeddings(4, 32)
    codes = RademacherCodes(32, 100).to(DEVICE)
    out = falcon_loss(h1.requires_grad_(), h2, codes, 2.0, implementation="triton")
    assert [x.requires_grad for x in out] == [True, False, False, False]
    with torch.no_grad():
        assert not falcon_loss(h1, h2, codes, 2.0, implementation="triton").loss.requires_grad


def test_terms_and_options_that_do_not_fit() -> None:
    h1, h2 = embeddings(4, 32)
    codes = RademacherCodes(32, 100).to(DEVICE)
    with pytest.raises(ValueError, match="budget"):
        falcon_loss(h1, h2, codes, 2.0, implementation="triton", memory_budget=1000)
    with pytest.raises(ValueError, match="auto or streaming"):
        falcon_loss(h1, h2, HadamardCodes(32, 64).to(DEVICE), 2.0, implementation="triton", plan="stored")
    with pytest.raises(ValueError, match="float64"):
        falcon_loss(h1.double(), h2.double(), codes, 2.0, implementation="triton")


# ---- what PyTorch sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_hadamard", [False, True])
def test_opcheck(is_hadamard) -> None:
    from falcon_fast.kernels.gpu.loss.operator import gradient_op, loss_op

    codes = (HadamardCodes if is_hadamard else RademacherCodes)(32, 64).to(DEVICE)
    h1, h2 = (h.requires_grad_() for h in embeddings(4, 32))
    arguments = (h1, h2, codes.words, *LossSpec(64, is_hadamard, 2.0).flat())
    torch.library.opcheck(loss_op, arguments)
    outputs = [x.detach() for x in loss_op(*arguments)]
    torch.library.opcheck(gradient_op, (*outputs[4:], torch.tensor(2.0, device=DEVICE), torch.float32))


def test_compiles_without_a_break_to_the_same_bits() -> None:
    codes = RademacherCodes(32, 100).to(DEVICE)
    h1, h2 = embeddings(4, 32)

    def step(a, b):
        return falcon_loss(a * 1.0, b, codes, 2.0, implementation="triton").loss * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        a, b = h1.clone().requires_grad_(), h2.clone().requires_grad_()
        value = function(a, b)
        results.append((value, *torch.autograd.grad(value, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    "codes", [RademacherCodes(256, 4096), HadamardCodes(256, 4096)], ids=["rademacher", "hadamard"]
)
def test_captured_as_a_cuda_graph(codes) -> None:
    codes = codes.to(DEVICE)
    h1, h2 = (h.requires_grad_() for h in embeddings(64, 256))

    def step():
        loss = falcon_loss(h1, h2, codes, 5.0, implementation="triton").loss
        return loss, *torch.autograd.grad(loss, (h1, h2))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [x.detach().clone() for x in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


# ---- what the host does, traced on tensors without memory ---------------------------------------------------------------


def trace(n, f, c, kind="rademacher", capability=(9, 0), processors=132, plan="auto", budget=None, prior="reverse"):
    """The launches of forward and backward, and the peak of the bytes allocated for them."""
    is_hadamard = kind == "hadamard"
    words = torch.empty(c // f if is_hadamard else c, -(-f // 32), dtype=torch.int32, device="meta")
    h1, h2 = (torch.empty(n, f, device="meta") for _ in range(2))
    held, peak = 0, 0
    empty = torch.empty

    def counted(*arguments, **options):
        nonlocal held, peak
        x = empty(*arguments, **options)
        size = x.numel() * x.element_size()
        held += size
        peak = max(peak, held)

        def released():
            nonlocal held
            held -= size

        weakref.finalize(x, released)
        return x

    with pytest.MonkeyPatch.context() as patch, launch.recording(capability, processors) as launches:
        patch.setattr(torch, "empty", counted)
        spec = LossSpec(c, is_hadamard, 13.9, prior=prior, plan=plan, memory_budget=budget)
        _, parts = loss.falcon_loss_parts(h1, h2, words, spec)
        formed = peak
        gradient.combine(parts.parts, parts.quantum, torch.ones((), device="meta"), torch.float32)
    return launches, formed


def test_eight_launches_at_the_published_size() -> None:
    assert len(trace(64, 2048, 16384)[0]) <= 8
    assert len(trace(64, 2048, 16384, "hadamard")[0]) <= 8


@pytest.mark.parametrize(
    ("n", "f", "c", "kind", "name"),
    [
        (64, 2048, 16384, "rademacher", "stored"),
        (1024, 2048, 65536, "rademacher", "stored"),
        (1024, 2048, 65536, "rademacher", "streaming"),
        (1024, 2048, 524288, "rademacher", "streaming"),
        (256, 512, 100000, "rademacher", "stored"),
        (1024, 2048, 524288, "hadamard", "auto"),
        (64, 128, 16384, "hadamard", "auto"),
    ],
)
def test_the_plan_says_what_is_held(n, f, c, kind, name) -> None:
    _, held = trace(n, f, c, kind, plan=name)
    facts = ((9, 0), 132)
    stated = (
        plan.hadamard_plan(n, f, c, *facts)
        if kind == "hadamard"
        else plan.dense_plan(n, f, c, name == "stored", None, *facts)
    )
    assert 0.7 * stated.peak <= held <= stated.peak


def test_half_a_million_codes_stream_through_half_a_gigabyte() -> None:
    packed = 2048 * 524288 // 8
    _, held = trace(1024, 2048, 524288, plan="streaming")
    assert held + packed <= 512 * 2**20
    spec = LossSpec(524288, False, 13.9, memory_budget=2**29 - packed)
    assert loss._chosen(1024, 2048, spec, torch.device("cpu")).stored is False


# ---- kernels that are wrong must be found out -----------------------------------------------------------------------------

# What is wrong: the file, the right source and the wrong one.
MUTANTS = {
    "views swapped in the gradient": ("gradient.py", "b_free1, b_y2, b_p2, log_c", "b_free1, b_y1, b_p2, log_c"),
    "invariance's other half forgotten": ("gradient.py", "b_other_y) - beta * b_other_p", "b_other_y)"),
    "a forgotten": ("gradient.py", "beta - tl.load(p_a + o, mask=m_row, other=0.0) + beta * b_x", "beta + beta * b_x"),
    "x forgotten": ("gradient.py", "other=0.0) + beta * b_x", "other=0.0)"),
    "a tile's maximum for the row's": (
        "gradient.py",
        "b_shift1 = tl.load(p_tile_max + o_max",
        "b_shift1 = tl.load(p_max + o_row",
    ),
    "sums merged without their maxima": (
        "rows.py",
        "tl.sum(tl.exp2(b_shift1) * b_part1, 0)",
        "tl.sum(b_part1, 0)",
    ),
    "cross sums merged without the other's": ("rows.py", "tl.where(m, b_shift2 * b_part1, 0.0)", "0.0"),
    "columns past the last code counted": ("logits.py", 'b_u = tl.where(m_code[None, :], b_u, float("-inf"))', ""),
    "rows past the last image counted": (
        "columns.py",
        "b_log_p = tl.where(m_row[:, None], b_log_p",
        "tl.where(m_row[:, None], b_log_p",
    ),
    "mean over the wrong number of rows": (
        "columns.py",
        "math.log2(n * spec.world_size)",
        "math.log2(n * spec.world_size + 1)",
    ),
    "bits in another order": ("tiles.py", "(o_position % 32) // 2 + (o_position % 2) * 16", "o_position % 32"),
    "one split of the product lost": ("gradient.py", "for _ in range(splits):", "for _ in range(1):"),
    "quantum of the other view": (
        "gradient.py",
        "p_quantum + i_view * n + o_row",
        "p_quantum + (1 - i_view) * n + o_row",
    ),
    "a block's signs not flipped back": (
        "hadamard.py",
        "b_sign = tl.where(b_flips < 0, -1.0, 1.0)",
        "b_sign = tl.where(b_flips < 0, 1.0, 1.0)",
    ),
    "way back not transposed": ("transform.py", "b_t.reshape(ROWS, B, A).permute(0, 2, 1)", "b_t"),
    "running cross sum not moved": ("hadamard.py", "b_before1 * (b_cross1 + b_moved1)", "b_before1 * b_cross1"),
}


def errors_of(loss_module, gradient_module, codes, n) -> list[float]:
    """Relative errors of loss and gradient, by the functions of these modules."""
    codes = codes.to(DEVICE)
    h1, h2 = embeddings(n, codes.f, scale=0.7)
    tau = temperature(codes.f, codes.c, codes.f // 32)
    is_hadamard = isinstance(codes, HadamardCodes)
    readings, parts = loss_module.falcon_loss_parts(h1, h2, codes.words, LossSpec(codes.c, is_hadamard, tau))
    one = torch.ones((), device=DEVICE)
    found = torch.cat(gradient_module.combine(parts.parts, parts.quantum, one, torch.float32)).double()
    expected, exact = evaluate(h1.double(), h2.double(), codes, tau, implementation="reference")
    return [abs(readings.loss.item() / expected.loss.item() - 1), ((found - exact).norm() / exact.norm()).item()]


def smooth_case(loss_module, gradient_module, is_hadamard: bool) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        if not is_hadamard:  # two splits of the product, 17 tiles, ragged everywhere
            return errors_of(loss_module, gradient_module, RademacherCodes(40, 2100), 5)
        # On a GPU of one processor one program goes over all the blocks.
        patch.setattr(loss_module, "device_facts", lambda device: launch.Facts("A100", (8, 0), 1))
        return errors_of(loss_module, gradient_module, HadamardCodes(256, 1024), 3)


@pytest.mark.parametrize("is_hadamard", [False, True])
def test_smooth_cases_are_right(is_hadamard) -> None:
    assert max(smooth_case(loss, gradient, is_hadamard)) < 1e-3


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_found_out(tmp_path, monkeypatch, name) -> None:
    file, right, wrong = MUTANTS[name]
    package = f"mutant_{list(MUTANTS).index(name)}"
    shutil.copytree(PACKAGE, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / package).rglob("*.py"):
        source = path.read_text()
        if path.name == file:
            assert right in source
            source = source.replace(right, wrong)
        path.write_text(source.replace("falcon_fast.kernels.gpu", package))
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        mutant, its_gradient = (importlib.import_module(f"{package}.loss.{module}") for module in ("loss", "gradient"))
        errors = smooth_case(mutant, its_gradient, file in ("hadamard.py", "transform.py"))
        assert not all(error < 3e-3 for error in errors), errors
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            del sys.modules[module]
