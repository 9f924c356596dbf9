"""The Triton kernels of the projector against torch.nn in float64: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from falcon_fast import FalconProjector
from falcon_fast.models.batchnorm import per_view_batchnorm, sync_batchnorm

pytest.importorskip("triton")

from falcon_fast.kernels.gpu import resources
from falcon_fast.kernels.gpu.projector import batchnorm, projector

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGE = Path(projector.__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def split(monkeypatch):
    """Parts of 64 rows, merged by a kernel of their own, at these sizes too."""
    monkeypatch.setattr(batchnorm, "MOST_ROWS_AT_ONCE", 0)
    monkeypatch.setattr(batchnorm, "SHORTEST_SPLIT", 32)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not initialised holds NaN."""
    empty = torch.empty

    def poisoned_empty(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(math.nan) if x.is_floating_point() and not x.is_meta else x

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def make(d: int, f: int, activation: str = "tanh", views: int = 2, **options) -> FalconProjector:
    """A projector whose scales and shifts are not the initial ones."""
    module = FalconProjector(d, f, activation, temperature_batch=8, implementation="triton", **options)
    with torch.no_grad():
        module.norm.weight.normal_()
        module.norm.bias.normal_()
    return per_view_batchnorm(module, views).to(DEVICE)


class Oracle(nn.Module):
    """The projector in float64 from torch's own layers, the views passing one after the other."""

    def __init__(self, module: FalconProjector) -> None:
        super().__init__()
        norm = module.norm
        self.views = getattr(norm, "num_views", 1)
        self.linear = copy.deepcopy(module.linear).double()
        self.norm = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, True, norm.track_running_stats).double()
        self.norm.load_state_dict({name: x.double() for name, x in norm.state_dict().items()})
        self.norm.to(DEVICE)
        self.row_norm = module.row_norm

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.linear(features)
        y = torch.cat([self.norm(v) for v in x.chunk(self.views)]) if self.norm.training else self.norm(x)
        return torch.tanh(y) if self.row_norm is None else F.normalize(y, dim=1) * self.row_norm


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-6) -> bool:
    exact = exact.double()
    return bool(torch.isfinite(found).all() and (found.double() - exact).norm() <= tolerance * exact.norm() + 1e-12)


def assert_like_torch(module: FalconProjector, rows: int, steps: int = 2) -> None:
    """Embeddings, gradients and running statistics of some steps, on rows whose statistics differ by view.

    The errors are judged by float32's own: two rows' gradient is what is left of numbers a thousand times larger.
    """
    oracle = Oracle(module).train(module.norm.training)
    plain = copy.deepcopy(oracle).float()
    drift = torch.linspace(0.5, 3.0, rows, device=DEVICE)[:, None]

    def compare(name, found, exact, rounded):
        assert torch.isfinite(found).all(), name
        error, unavoidable = (found - exact).norm(), (rounded - exact).norm()
        assert error <= 2e-6 * exact.norm() + 3 * unavoidable, f"{name}: {error}, float32's {unavoidable}"

    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for _ in range(steps):
        x = torch.randn(rows, module.linear.in_features, device=DEVICE) * drift + drift
        g = torch.randn(rows, module.linear.out_features, device=DEVICE)
        results = []
        for network, dtype in ((module, torch.float32), (oracle, torch.float64), (plain, torch.float32)):
            y = x.to(dtype, copy=True).requires_grad_()
            parameters = dict(network.named_parameters())
            h = network(y)
            results.append([h, *torch.autograd.grad(h, (y, *(parameters[name] for name in names)), g.to(dtype))])
        for name, *three in zip(("embeddings", "features", *names), *results, strict=True):
            if name == "linear.bias" and module.norm.training:
                assert not three[0].any() and three[1].abs().max() < 1e-8
            else:
                compare(name, *three)
    for name, buffer in oracle.norm.named_buffers():
        compare(name, *(b.double() for b in (module.norm.get_buffer(name), buffer, plain.norm.get_buffer(name))))


@pytest.mark.parametrize(
    ("rows", "d", "f", "views", "activation"),
    [
        (2, 1, 1, 1, "tanh"),
        (4, 3, 2, 2, "tanh"),
        (4, 3, 2, 2, "l2"),
        (27, 5, 130, 3, "tanh"),
        (150, 6, 20, 1, "tanh"),  # more rows than one block has
        (14, 6, 270, 2, "l2"),
    ],
)
def test_as_torchs_own_layers(poisoned, rows, d, f, views, activation) -> None:
    assert_like_torch(make(d, f, activation, views), rows, steps=1)


@pytest.mark.parametrize(("rows", "f", "views", "activation"), [(260, 70, 2, "tanh"), (130, 9, 1, "l2")])
def test_rows_in_splits(split, poisoned, rows, f, views, activation) -> None:
    """Three a view, the last ragged."""
    assert batchnorm.row_splits(rows // views, f, views, 108) == (3, 64)
    assert_like_torch(make(2, f, activation, views), rows, steps=1)


@pytest.mark.parametrize("activation", ["tanh", "l2"])
def test_evaluation_by_the_running_averages(poisoned, activation) -> None:
    module = make(4, 37, activation)
    module(torch.randn(8, 4, device=DEVICE))
    module.eval()
    before = copy.deepcopy(module.norm.state_dict())
    for rows in (1, 7):  # no two views
        assert_like_torch(module, rows, steps=1)
    assert all(torch.equal(x, before[name]) for name, x in module.norm.state_dict().items())
    with torch.inference_mode():
        assert close(
            module(torch.zeros(3, 4, device=DEVICE)), Oracle(module).eval()(torch.zeros(3, 4).double().to(DEVICE))
        )
    assert module(torch.zeros(0, 4, device=DEVICE)).shape == (0, 37)


@pytest.mark.parametrize(("momentum", "merged"), [(None, False), (None, True), (1, False), (0.0, True)])
def test_the_averages_of_any_momentum(monkeypatch, momentum, merged) -> None:
    if merged:
        monkeypatch.setattr(batchnorm, "MOST_ROWS_AT_ONCE", 0)
        monkeypatch.setattr(batchnorm, "row_splits", lambda n, f, views, processors: (2, 32))
    module = make(3, 5)
    module.norm.momentum = momentum
    assert_like_torch(module, 70 if merged else 12)


def test_averages_that_are_not_tracked() -> None:
    module = FalconProjector(3, 5, implementation="triton")
    module.norm = nn.BatchNorm1d(5, track_running_stats=False)
    module.to(DEVICE)
    assert_like_torch(module, 6)
    assert_like_torch(module.eval(), 6)


def test_frozen_parameters_and_features_without_gradient() -> None:
    module = make(4, 6)
    module.norm.requires_grad_(False)
    assert_like_torch(module, 8)
    module.norm.requires_grad_(True)
    module.linear.requires_grad_(False)
    h = module(torch.randn(8, 4, device=DEVICE))
    h.square().sum().backward()
    assert module.linear.weight.grad is None and module.norm.weight.grad.abs().min() > 0
    with torch.no_grad():
        assert not module(torch.randn(8, 4, device=DEVICE)).requires_grad


@pytest.mark.parametrize("n", [40, 130])
def test_columns_far_from_zero_keep_their_digits(split, monkeypatch, n) -> None:
    """Mean 1e4, deviation 1e-2 (ten units of float32's last place): float32 BatchNorm is wrong by percents, this is not."""
    if n == 40:
        monkeypatch.setattr(batchnorm, "MOST_ROWS_AT_ONCE", n)
    x = (1e4 + 1e-2 * torch.randn(2 * n, 6)).to(DEVICE)
    x[:n, 1] *= -1
    x[0, 2] = 0.0  # the row that is subtracted from all lies far from the others
    x[:, 3] = 1e4  # constant: variance 0
    ones, zeros = torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    averages = batchnorm.Averages(torch.zeros(6).to(DEVICE), torch.ones(6).to(DEVICE), torch.tensor(2).to(DEVICE), 0.1)
    statistics = batchnorm.batch_statistics(x, 2, zeros, averages, 1e-12, None)
    h, _ = projector.normalise(x, statistics, ones, zeros, None, torch.float32)
    norm = nn.BatchNorm1d(6, eps=1e-12).double().to(DEVICE)
    exact = torch.cat([torch.tanh(norm(v)) for v in x.double().chunk(2)])
    assert (h - exact).abs().max() < 1e-5
    torch.testing.assert_close(averages.mean, norm.running_mean.float())
    torch.testing.assert_close(averages.variance, norm.running_var.float(), rtol=1e-5, atol=0)
    with_float32 = torch.cat([torch.tanh(nn.BatchNorm1d(6, eps=1e-12).to(DEVICE)(v)) for v in x.chunk(2)])
    assert (with_float32 - exact).abs().max() > 1e-3


def test_saturated_embeddings_keep_their_gradient() -> None:
    """1 - h^2 of a float16 h is 0 from y = 4.9 on; the gradient comes from y instead."""
    module = make(4, 6, output_dtype=torch.float16)
    with torch.no_grad():
        module.norm.weight.fill_(1e-3)
        module.norm.bias.fill_(6.0)
    oracle = Oracle(module)
    x = torch.randn(8, 4, device=DEVICE, requires_grad=True)
    y = x.detach().double().requires_grad_()
    g = torch.randn(8, 6, device=DEVICE).half()
    h = module(x)
    assert h.dtype == torch.float16 and (h == 1).all()
    found = torch.autograd.grad(h, (x, module.norm.weight, module.norm.bias), g)
    exact = torch.autograd.grad(oracle(y), (y, oracle.norm.weight, oracle.norm.bias), g.double())
    assert all(close(a, b, 1e-4) for a, b in zip(found, exact, strict=True))


def test_rows_of_length_zero() -> None:
    """As in torch.nn.functional.normalize: the direction of nothing is nothing, and its gradient is finite."""
    module = make(4, 6, "l2")
    nn.init.zeros_(module.norm.weight)
    nn.init.zeros_(module.norm.bias)
    h = module(torch.randn(8, 4, device=DEVICE))
    assert not h.any()
    h.backward(torch.randn_like(h))
    oracle = Oracle(module)
    assert torch.isfinite(module.norm.bias.grad).all() and not oracle(torch.randn(8, 4).double().to(DEVICE)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("activation", ["tanh", "l2"])
def test_what_is_not_finite_stays_so(activation, bad) -> None:
    x = torch.randn(6, 4, device=DEVICE)
    x[1, 2] = bad
    assert make(4, 6, activation)(x)[:3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype) -> None:
    """Operands of the product in autocast's dtype, everything after it in float32."""
    module = make(16, 24)
    x = torch.randn(12, 16, device=DEVICE).to(dtype).requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        h = module(x)
    assert h.dtype == torch.float32
    g = torch.randn_like(h)
    found = torch.autograd.grad(h, (x, *module.parameters()), g)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    oracle = Oracle(module)
    with torch.no_grad():
        oracle.linear.weight.copy_(module.linear.weight.to(dtype))
    y = x.detach().double().requires_grad_()
    exact = oracle(y)
    assert close(h, exact, 1e-5)  # nothing but the operands was rounded
    for mine, theirs in zip(found, torch.autograd.grad(exact, (y, *oracle.parameters()), g.double()), strict=True):
        assert not mine.any() or close(mine, theirs, 4 * torch.finfo(dtype).eps)
    # Without autocast the same features are multiplied in float32.
    assert torch.equal(module(x), module(x.float()))


def test_float16_output_is_the_float32_one_rounded() -> None:
    for activation in ("tanh", "l2"):
        module = make(5, 9, activation)
        x = torch.randn(8, 5, device=DEVICE)
        exact = module(x)
        module.output_dtype = torch.float16
        assert torch.equal(module(x), exact.half())
        module.implementation = "torch"
        assert module(x).dtype == torch.float16


def test_gradients_of_any_layout_and_the_same_bits_every_time() -> None:
    module = make(5, 9, "l2")
    x = torch.randn(8, 5, device=DEVICE, requires_grad=True)
    g = torch.randn(8, 9, device=DEVICE)
    wide = torch.cat((g, g), 1)[:, :9]
    found = [torch.autograd.grad(module(x), x, layout)[0] for layout in (g, wide, g.t().contiguous().t())]
    assert all(torch.equal(found[0], other) for other in found)
    assert not torch.autograd.grad(module(x).sum() * 0, x)[0].any()  # an expanded scalar


def test_both_implementations_agree_and_share_their_state() -> None:
    fused = make(5, 9)
    plain = per_view_batchnorm(FalconProjector(5, 9, temperature_batch=8, implementation="torch")).to(DEVICE)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(8, 5, device=DEVICE)
    torch.testing.assert_close(fused(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what auto chooses without a GPU")
def test_auto_takes_torch_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(FalconProjector, "_triton", lambda self, features: pytest.fail("triton ran"))
    FalconProjector(3, 4)(torch.randn(4, 3))


def test_bad_input() -> None:
    module = make(3, 4)
    with pytest.raises(ValueError, match="more than one row"):
        module(torch.randn(2, 3, device=DEVICE))
    with pytest.raises(ValueError, match="2 views"):
        module(torch.randn(5, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"matrix \(N, 3\)"):
        module(torch.randn(4, 2, device=DEVICE))
    assert module.norm.num_batches_tracked == 0
    module.norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match="not a BatchNorm"):
        module(torch.randn(4, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"meta.*NVIDIA"):
        make(3, 4)(torch.randn(4, 3, device="meta"))
    with pytest.raises(ValueError, match="auto, torch, triton"):
        FalconProjector(3, 4, implementation="cuda")
    with pytest.raises(ValueError, match="float32 or float16"):
        FalconProjector(3, 4, output_dtype=torch.bfloat16)


# ---- what PyTorch sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_norm", [None, 2.0])
def test_opcheck(row_norm) -> None:
    from falcon_fast.kernels.gpu.projector import operator

    module = make(3, 6)
    features = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    weight, bias, gamma, beta = module.parameters()
    detached = [t.detach() for t in (features, weight, bias, gamma, beta)]
    product = (*detached[:2], torch.float32)
    x = operator.product_op(*product)
    averages = (torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE), torch.tensor(2, device=DEVICE), 0.1)
    statistics = operator.batch_statistics_op(x, 2, detached[2], *averages, 1e-5, "")
    arguments = (features, weight, bias, gamma, beta, x, statistics, row_norm, torch.float32, torch.float32, "")
    torch.library.opcheck(operator.projector_op, arguments)
    h, length = operator.projector_op(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))
    saved = (*detached[:2], *detached[3:], x, statistics, length)
    torch.library.opcheck(
        operator.gradient_op, (torch.randn_like(h), *saved, row_norm, torch.float32, "", row_norm is None, True)
    )
    if row_norm is None:
        torch.library.opcheck(operator.product_op, product)
        torch.library.opcheck(operator.batch_statistics_op, (x, 2, detached[2], *averages, 1e-5, ""))
        torch.library.opcheck(operator.batch_statistics_op, (x, 1, detached[2], None, None, None, None, 1e-5, ""))
        torch.library.opcheck(operator.running_statistics_op, (*averages[:2], detached[2], 1e-5))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break_to_the_same_bits(training) -> None:
    eager = make(3, 6, "l2").train(training)
    compiled = copy.deepcopy(eager)
    results = []
    features = torch.randn(8, 3, device=DEVICE)
    for module, run in ((eager, eager), (compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))):
        outcome = []
        for _ in range(2):
            x = features.clone().requires_grad_()
            h = run(x * 1.0)
            outcome += [h, *torch.autograd.grad(h.square().sum() + h[0].sum(), (x, *module.parameters()))]
        results.append([*outcome, *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("activation", ["tanh", "l2"])
@pytest.mark.parametrize("rows", [256, 2048])
def test_captured_as_a_cuda_graph(activation, rows) -> None:
    module = make(64, 256, activation)
    x = torch.randn(rows, 64, device=DEVICE, requires_grad=True)

    def step():
        with torch.autocast("cuda", dtype=torch.float16):
            h = module(x)
        return h, *torch.autograd.grad(h.square().sum(), (x, *module.parameters()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [t.detach().clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    assert module.norm.num_batches_tracked == 4  # capturing runs nothing


# ---- statistics shared by the processes of a group --------------------------------------------------------------------------

# Rows a view of process 0 and 1, activation. 70 rows: two splits, which are merged before the processes' parts are.
GROUP_CASES = [(2, 5, "tanh"), (1, 3, "l2"), (70, 40, "tanh")]
GROUP_D, GROUP_F = 3, 10


def _group_case(case: int):
    """One big batch (both processes' view 1, then view 2), its gradient, and the rows of each process."""
    first, second, activation = GROUP_CASES[case]
    torch.manual_seed(case)
    n = first + second
    module = FalconProjector(GROUP_D, GROUP_F, activation, temperature_batch=8, implementation="triton")
    module.norm.weight.data.normal_()
    x = torch.randn(2 * n, GROUP_D) * torch.linspace(1, 3, 2 * n)[:, None] + 1
    of_rank = [torch.cat([torch.arange(*bounds) + v * n for v in range(2)]) for bounds in ((0, first), (first, n))]
    return module, x, torch.randn(2 * n, GROUP_F), of_rank


def _rank_steps(rank: int, world: int, store: str, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    batchnorm.SHORTEST_SPLIT = 32
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = []
    for case in range(len(GROUP_CASES)):
        module, x, g, of_rank = _group_case(case)
        if case == 0:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        else:
            sync_batchnorm(module, dist.group.WORLD)
        per_view_batchnorm(module)
        x = x[of_rank[rank]].requires_grad_()
        h = module(x)
        gradients = torch.autograd.grad(h, (x, *module.parameters()), g[of_rank[rank]])
        buffers = [buffer.numpy() for buffer in module.buffers()]
        results.append([h.detach().numpy(), *(gradient.numpy() for gradient in gradients), *buffers])
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPU tensors, in the interpreter")
def test_a_process_group_is_one_big_batch(tmp_path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_rank_steps, args=(r, 2, str(tmp_path / "store"), queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
    for case in range(len(GROUP_CASES)):
        module, x, g, of_rank = _group_case(case)
        oracle = Oracle(per_view_batchnorm(module))
        y = x.double().requires_grad_()
        h = oracle(y)
        dx, dweight, _, dgamma, dbeta = torch.autograd.grad(h, (y, *oracle.parameters()), g.double())
        mine = [[torch.from_numpy(value) for value in found[rank][case]] for rank in range(2)]
        for rank in range(2):
            assert close(mine[rank][0], h[of_rank[rank]], 5e-6) and close(mine[rank][1], dx[of_rank[rank]], 5e-6)
            assert not mine[rank][3].any()
            for buffer, name in zip(
                mine[rank][6:], ("running_mean", "running_var", "num_batches_tracked"), strict=True
            ):
                assert close(buffer, oracle.norm.get_buffer(name), 5e-6), name
        for at, whole in ((2, dweight), (4, dgamma), (5, dbeta)):  # parts, which data parallel training averages
            assert close(mine[0][at] + mine[1][at], whole, 5e-6)


# ---- what the host does, traced on tensors without memory ---------------------------------------------------------------


def trace(rows: int, f: int, row_norm: float | None = None, training: bool = True):
    return resources.projector_launches((rows, f, row_norm, torch.float16, training), 90)


@pytest.mark.parametrize(
    ("rows", "f", "row_norm", "forward", "backward"),
    [
        (128, 2048, None, 2, 2),  # the published size
        (1024, 2048, None, 2, 2),
        (2048, 2048, None, 3, 2),
        (128, 128, 4.0, 2, 3),
        (8192, 4096, 4.0, 3, 3),
    ],
)
def test_launches(rows, f, row_norm, forward, backward) -> None:
    assert [len(part) for part in trace(rows, f, row_norm)] == [forward, backward]
    assert len(trace(rows, f, row_norm, training=False)[0]) == 2


def test_large_batches_fill_the_gpu() -> None:
    """At least three programs a processor, none without rows."""
    for rows, f in ((2048, 2048), (8192, 512), (8192, 4096)):
        n = rows // 2
        splits, split_rows = batchnorm.row_splits(n, f, 2, 132)
        assert math.prod(trace(rows, f)[0][0].grid) >= min(3 * 132, 2 * math.ceil(f / 64) * batchnorm.MOST_SPLITS)
        assert (splits - 1) * split_rows < n <= splits * split_rows


# In a process of its own: under TRITON_INTERPRET kernels are Python functions, which nothing compiles.
PROGRAM = """
import json, sys
from falcon_fast.kernels.gpu import resources
for found in resources.projector_resources(int(sys.argv[1]), getattr(resources, sys.argv[2])):
    print(json.dumps(found._asdict()), flush=True)
"""


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        (80, "PROJECTOR_SHAPES"),
        *(
            pytest.param(architecture, shapes, marks=pytest.mark.slow)
            for architecture in (80, 90, 100)
            for shapes in ("PROJECTOR_SHAPES", "MORE_PROJECTOR_SHAPES")
            if (architecture, shapes) != (80, "PROJECTOR_SHAPES")
        ),
    ],
)
def test_compiled_ahead_of_time_without_spills(architecture, shapes) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", PROGRAM, str(architecture), shapes]
    output = subprocess.run(arguments, env=environment, text=True, stdout=subprocess.PIPE, check=True).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    assert len(kernels) >= 9
    for kernel in kernels:
        what = f"{kernel['name']} {kernel['constants']} with {kernel['warps']} warps"
        assert kernel["stack"] == 0 and not {"LDL", "STL"} & kernel["instructions"].keys(), f"{what} spills"
        assert not {"ATOM", "ATOMG", "RED"} & kernel["instructions"].keys(), f"{what} is not deterministic"
        assert kernel["shared"] <= resources.SHARED_LIMIT[architecture], what


# ---- kernels that are wrong must be found out -----------------------------------------------------------------------------

MUTANTS = {
    "view 1's statistics for both": ("projector.py", "p = p_statistics + i_view * f + o", "p = p_statistics + o"),
    "dgamma of one view": ("projector.py", "b_dgamma += b_cross_sum", "b_dgamma = b_cross_sum"),
    "the mean's gradient forgotten": ("projector.py", "(b_dy - b_dy_mean[None, :] - ", "(b_dy - "),
    "the variance's gradient forgotten": ("projector.py", " - b_normal * b_cross_mean[None, :]", ""),
    "one split's sums lost": ("projector.py", "for _ in range(splits):", "for _ in range(1):"),
    "the projection forgotten": ("projector.py", "b_factor[:, None] * b_g - b_pull[:, None] * b_y", "b_factor[:, None] * b_g"),
    "rows past the last counted": ("batchnorm.py", "b_delta = tl.where(m, b_x - b_mean, 0.0)", "b_delta = b_x - b_mean"),
    "slots merged without their distance": ("batchnorm.py", "b_square + b_count[:, None] * b_away * b_away", "b_square"),
    "parts merged without their distance": ("batchnorm.py", " + b_away * b_away * b_count * b_share", ""),
    "biased running variance": ("batchnorm.py", "(b_square / (b_count - 1.0))", "(b_square / b_count)"),
    "averages of the last view": ("batchnorm.py", " + (1.0 - factor) * b_mean", ""),
}  # fmt: skip


def errors_of(batchnorm_module, projector_module, row_norms=(None, 3.0)) -> list[float]:
    """Relative errors of everything for 115 rows a view, the gradient's in two splits, tanh and l2."""
    errors = []
    for row_norm in row_norms:
        generator = torch.Generator().manual_seed(7)
        x = (
            torch.randn(230, 3, generator=generator) * torch.linspace(1, 2, 230)[:, None]
            + torch.linspace(0, 2, 230)[:, None]
        )
        g, gamma = torch.randn(230, 3, generator=generator) + 1.0, torch.tensor([1.0, -0.5, 2.0])
        x, g, gamma, beta = (t.to(DEVICE) for t in (x, g, gamma, torch.tensor([0.1, 0.2, 0.3])))
        norm = nn.BatchNorm1d(3).double().to(DEVICE)
        norm.weight.data.copy_(gamma)
        norm.bias.data.copy_(beta)
        averages = batchnorm_module.Averages(
            torch.zeros(3).to(DEVICE), torch.ones(3).to(DEVICE), torch.tensor(2).to(DEVICE), 0.1
        )
        statistics = batchnorm_module.batch_statistics(x, 2, torch.zeros(3).to(DEVICE), averages, 1e-5, None)
        h, length = projector_module.normalise(x, statistics, gamma, beta, row_norm, torch.float32)
        found = projector_module.gradients(g, x, statistics, gamma, beta, length, row_norm, torch.float32, None)
        y = x.double().requires_grad_()
        z = torch.cat([norm(v) for v in y.chunk(2)])
        exact = torch.tanh(z) if row_norm is None else F.normalize(z, dim=1) * row_norm
        truth = torch.autograd.grad(exact, (y, norm.weight, norm.bias), g.double())
        pairs = [(h, exact), *zip(found[:3], truth, strict=True)]
        pairs += [(averages.mean, norm.running_mean), (averages.variance, norm.running_var)]
        errors += [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    return errors


@pytest.mark.parametrize("merged", [False, True])
def test_smooth_case_is_right(split, monkeypatch, merged) -> None:
    if not merged:
        monkeypatch.setattr(batchnorm, "MOST_ROWS_AT_ONCE", 512)
    assert max(errors_of(batchnorm, projector)) < 5e-6


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_found_out(tmp_path, monkeypatch, name) -> None:
    file, right, wrong = MUTANTS[name]
    package = f"projector_mutant_{list(MUTANTS).index(name)}"
    shutil.copytree(PACKAGE, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / package).rglob("*.py"):
        source = path.read_text()
        if path.name == file:
            assert right in source
            source = source.replace(right, wrong)
        path.write_text(source.replace("falcon_fast.kernels.gpu", package))
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        mutant, its_projector = (
            importlib.import_module(f"{package}.projector.{module}") for module in ("batchnorm", "projector")
        )
        monkeypatch.setattr(mutant, "MOST_ROWS_AT_ONCE", 0 if name.startswith(("parts", "rows")) else 512)
        monkeypatch.setattr(mutant, "SHORTEST_SPLIT", 32)
        errors = errors_of(mutant, its_projector, (3.0,) if "projection" in name else (None,))
        assert not all(error < 1e-4 for error in errors), errors
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            del sys.modules[module]
