"""The public door: what it refuses, what it converts, and how it behaves in a process group."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from falcon_fast import FalconLoss, FalconLossOutput, HadamardCodes, RademacherCodes, falcon_loss
from falcon_fast.kernels import why_no_triton


@pytest.fixture
def case():
    h1, h2 = torch.randn(6, 32).tanh(), torch.randn(6, 32).tanh()
    return h1, h2, RademacherCodes(32, 64), 2.0


def test_a_compiled_function_may_call_it(case):
    h1, h2, codes, tau = case
    h1.requires_grad_()

    def twice(a, b):
        return 2 * falcon_loss(a * 1.0, b, codes, tau).loss

    eager, compiled = twice(h1, h2), torch.compile(twice, backend="aot_eager")(h1, h2)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, h1), torch.autograd.grad(eager, h1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("c", [5, 64, 200, 256])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_what_is_not_finite_gives_a_loss_that_is_not(implementation, c, bad):
    for rows in (slice(None), slice(3, 4)):
        h1, h2 = torch.randn(6, 32).tanh(), torch.randn(6, 32).tanh()
        h2[rows, 1] = bad
        out = falcon_loss(h1.requires_grad_(), h2, RademacherCodes(32, c), 2.0, implementation=implementation)
        assert not torch.isfinite(out.loss)
        assert not torch.isfinite(torch.autograd.grad(out.loss, h1)[0]).all()


def test_module_equals_function(case):
    h1, h2, codes, tau = case
    module = FalconLoss(codes, tau, beta=0.5, prior="forward")
    out = module(h1, h2)
    assert isinstance(out, FalconLossOutput)
    assert all(
        torch.equal(a, b) for a, b in zip(out, falcon_loss(h1, h2, codes, tau, beta=0.5, prior="forward"), strict=True)
    )
    assert not module.state_dict()


def test_terms_are_unweighted_and_codes_used_counts_both_views():
    codes = RademacherCodes(64, 32, seed=1)
    w = codes.dense().T
    h1, h2 = w[[0, 0, 3]], w[[5, 0, 3]]
    out = falcon_loss(h1, h2, codes, 0.5, beta=3.0)
    assert out.codes_used.item() == 3 and out.codes_used.dtype == torch.int64 and out.codes_used.dim() == 0
    torch.testing.assert_close(out.loss, out.prior + 3.0 * out.invariance)
    alone = falcon_loss(h1, h2, codes, 0.5, beta=0.0)
    torch.testing.assert_close(alone.loss, out.prior)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_only_the_loss_carries_gradient(case, implementation):
    h1, h2, codes, tau = case
    out = falcon_loss(h1.requires_grad_(), h2, codes, tau, implementation=implementation)
    assert [x.requires_grad for x in out] == [True, False, False, False]


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype, implementation):
    h1, h2, codes, tau = case
    a, b = h1.to(dtype).requires_grad_(), h2.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = falcon_loss(a, b, codes, tau, implementation=implementation)
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, falcon_loss(a.float(), b.float(), codes, tau, implementation=implementation).loss)
    out.loss.backward()
    assert a.grad is not None and a.grad.dtype == dtype


def test_hadamard_codes_go_through_the_same_door(case):
    h1, h2, _, tau = case
    codes = HadamardCodes(32, 64, seed=2)
    same = RademacherCodes.from_dense(codes.dense())
    torch.testing.assert_close(falcon_loss(h1, h2, codes, tau), falcon_loss(h1, h2, same, tau), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h1, h2, codes: falcon_loss(h1[:5], h2, codes, 1.0), "one shape"),
        (lambda h1, h2, codes: falcon_loss(h1[0], h2[0], codes, 1.0), "matrices"),
        (lambda h1, h2, codes: falcon_loss(h1.long(), h2.long(), codes, 1.0), "floating"),
        (lambda h1, h2, codes: falcon_loss(h1.double(), h2, codes, 1.0), "one floating"),
        (lambda h1, h2, codes: falcon_loss(h1[:0], h2[:0], codes, 1.0), "no rows"),
        (lambda h1, h2, codes: falcon_loss(h1[:, :16], h2[:, :16], codes, 1.0), "width"),
        (lambda h1, h2, codes: falcon_loss(h1.to("meta"), h2.to("meta"), codes, 1.0), "device"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 0.0), "temperature"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, float("nan")), "temperature"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, beta=-1.0), "beta"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, prior="both"), "prior"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, plan="magic"), "plan"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, implementation="magic"), "reference"),
        (lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, memory_budget=1000), "budget"),
        (
            lambda h1, h2, codes: falcon_loss(h1, h2, codes, 1.0, memory_budget=1000, implementation="reference"),
            "budget",
        ),
    ],
)
def test_bad_input_is_one_clear_error(case, change, word):
    h1, h2, codes, _ = case
    with pytest.raises(ValueError, match=word) as caught:
        change(h1, h2, codes)
    assert "\n" not in str(caught.value)


def _rank_gradient(rank: int, world: int, store: str, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = []
    for dtype, codes, options in GROUP_CASES:
        h1, h2 = _global_case()
        share = slice(rank * 4, rank * 4 + 4)
        a, b = (h[share].to(dtype).requires_grad_() for h in (h1, h2))
        out = falcon_loss(a, b, codes(), 1.3, beta=0.7, group=dist.group.WORLD, **options)
        results.append(
            (out.prior.item(), out.codes_used.item(), *(g.numpy() for g in torch.autograd.grad(out.loss, (a, b))))
        )
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


def _global_case():
    generator = torch.Generator().manual_seed(3)
    h1, h2 = (torch.randn(8, 32, generator=generator, dtype=torch.float64).tanh() for _ in range(2))
    return h1, h2


def _rademacher():
    return RademacherCodes(32, 1500)


def _hadamard():
    return HadamardCodes(32, 160)


# In float64 the reference, in float32 the CPU's kernels and, in Triton's interpreter, the GPU's.
TRITON = [{"implementation": "triton"}] if why_no_triton(torch.device("cpu")) is None else []
GROUP_CASES = [
    (dtype, codes, {"prior": prior} | plan)
    for prior in ("reverse", "forward")
    for dtype, codes, plan in (
        (torch.float64, _rademacher, {}),
        (torch.float32, _rademacher, {"plan": "stored"}),
        (torch.float32, _rademacher, {"plan": "streaming"}),
        (torch.float32, _hadamard, {}),
        *((torch.float32, codes, options) for codes in (_rademacher, _hadamard) for options in TRITON),
    )
]


def test_a_process_group_shares_the_mean_assignment(tmp_path):
    """Two processes of 4 rows have the prior of one with 8, and half their gradients' sum is its gradient (what DDP forms)."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (2, str(tmp_path / "store"), queue)
    processes = [context.Process(target=_rank_gradient, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
    h1, h2 = _global_case()
    for case, (dtype, codes, options) in enumerate(GROUP_CASES):
        a, b = h1.clone().requires_grad_(), h2.clone().requires_grad_()
        out = falcon_loss(a, b, codes(), 1.3, beta=0.7, prior=options["prior"], implementation="reference")
        expected = torch.autograd.grad(out.loss, (a, b))
        exact = dtype == torch.float64
        for rank in range(2):
            value, used, *gradients = found[rank][case]
            assert value == pytest.approx(out.prior.item(), rel=1e-12 if exact else 1e-4)
            assert used == out.codes_used.item()
            for mine, whole in zip(gradients, expected, strict=True):
                # Mean over processes of per-row gradients that live in different processes: half of each.
                share = whole[rank * 4 : rank * 4 + 4]
                assert (torch.from_numpy(mine) / 2 - share).norm() <= (1e-9 if exact else 1e-3) * share.norm()
