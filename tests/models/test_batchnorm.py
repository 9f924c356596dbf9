"""BatchNorm per view against two separate passes, and over two processes against one process with the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from falcon_fast.models.batchnorm import has_batchnorm, per_view_batchnorm, sync_batchnorm

from ..processes import in_processes


def run_together(module, views, compiled=False):
    module = per_view_batchnorm(copy.deepcopy(module))
    x = torch.cat(views).requires_grad_()
    torch._dynamo.reset()
    y = (torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else module)(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, module


def run_apart(module, views):
    module = copy.deepcopy(module)
    xs = [view.clone().requires_grad_() for view in views]
    y = torch.cat([module(x) for x in xs])
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), torch.cat([x.grad for x in xs]), module


def timm_batchnorm_act():
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(5), (7, 5)),
        (lambda: nn.BatchNorm2d(5), (7, 5, 4, 3)),
        (lambda: nn.BatchNorm2d(5, track_running_stats=False), (7, 5, 4, 3)),
        (lambda: nn.BatchNorm2d(5, momentum=None), (7, 5, 4, 3)),
        (lambda: nn.BatchNorm2d(5, affine=False), (7, 5, 4, 3)),
        (timm_batchnorm_act, (7, 5, 4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (7, 5, 8, 8)),
    ],
)
def test_as_if_the_views_had_passed_one_after_the_other(make, shape, compiled):
    module = make()
    # Different statistics in the two views: a shared BatchNorm would be far off.
    views = [torch.randn(shape), 3 * torch.randn(shape) + 2]
    together, apart = run_together(module, views, compiled), run_apart(module, views)
    torch.testing.assert_close(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1])
    states = together[2].state_dict(), apart[2].state_dict()
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key])
    for mine, theirs in zip(together[2].parameters(), apart[2].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-5, atol=2e-5)


def test_evaluation_does_not_know_views():
    plain = nn.BatchNorm1d(5).eval()
    plain.running_mean.normal_()
    x = torch.randn(7, 5)  # odd: no two views
    assert torch.equal(per_view_batchnorm(copy.deepcopy(plain))(x), plain(x))


def test_an_odd_training_batch_is_refused():
    with pytest.raises(ValueError, match="2 views"):
        per_view_batchnorm(nn.BatchNorm1d(5))(torch.randn(7, 5))


def test_converting_twice_is_converting_once():
    module = per_view_batchnorm(per_view_batchnorm(nn.BatchNorm1d(3)))
    assert type(module).__name__ == "PerViewBatchNorm1d"


def test_has_batchnorm():
    assert has_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not has_batchnorm(nn.LayerNorm(2))


def test_a_compiled_layer_keeps_the_layout_the_dtype_and_a_variance_far_below_the_mean():
    layer = per_view_batchnorm(nn.BatchNorm2d(4))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=False, backend="aot_eager")
    x = (1000 + torch.randn(64, 4, 8, 8)).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(layer).double()(x.double())
    y = compiled(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, exact.float(), rtol=1e-3, atol=1e-3)
    low = (x - 1000).bfloat16()
    assert compiled(low).dtype == torch.bfloat16
    torch.testing.assert_close(compiled(low), layer(low), rtol=1e-2, atol=2e-2)
    with pytest.raises(Exception, match="more than one value"):  # the compiler wraps it
        compiled(x[:2, :, :1, :1])


def test_a_compiled_layer_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = per_view_batchnorm(Doubled(4)), torch.randn(6, 4)
    expected = copy.deepcopy(module)(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


# ---- over processes ----

WORLD = 2
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "sequence": (lambda: nn.BatchNorm1d(5), (6, 5, 7)),
    "2d": (lambda: nn.BatchNorm2d(5), (6, 5, 4, 3)),
    "cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (6, 5, 4, 3)),
    "no affine": (lambda: nn.BatchNorm2d(5, affine=False), (6, 5, 4, 3)),
    "no buffers": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (6, 5, 4, 3)),
    "timm": (timm_batchnorm_act, (6, 5, 4, 3)),
    "far from zero": (lambda: nn.BatchNorm2d(5), (6, 5, 4, 3)),
    "net": (
        lambda: nn.Sequential(nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                              nn.Linear(216, 4, bias=False), nn.BatchNorm1d(4)),
        (6, 5, 8, 8),
    ),
}  # fmt: skip


def made(name):
    """The layer or net, and two views of a global batch that differ in their statistics, as do the processes' shares."""
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    module, ramp = make(), torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    views = torch.randn(shape) + 0.3 * ramp, 3 * torch.randn(shape) + ramp
    offset = 1000.0 if name == "far from zero" else 0.0
    return module, [view + offset for view in views]


def judged(module, x, share=slice(None)):
    """Everything that a step can see: y, the gradients of x and of the parameters, the buffers. The loss is a mean over rows."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = module(x)
        whole = torch.randn(
            len(y) // 2 * (1 if share == slice(None) else WORLD),
            *y.shape[1:],
            generator=torch.Generator().manual_seed(2),
        )
        weight = torch.cat([whole[share], -2 * whole[share].flip(-1)])
        module.zero_grad()
        x.grad = None
        (y * weight).flatten(1).sum(1).mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return y.detach(), x.grad, gradients, dict(module.named_buffers())


def _synchronized(rank, world):
    results = {}
    for name in LAYERS:
        module, views = made(name)
        share = slice(rank * 3, rank * 3 + 3)
        x = torch.cat([view[share] for view in views])
        sync_batchnorm(per_view_batchnorm(module), dist.group.WORLD)
        y, grad, gradients, buffers = judged(module, x, share)
        for g in gradients.values():
            dist.all_reduce(g)
            g /= world
        results[name] = [
            y.numpy(), grad.numpy(), {k: v.numpy() for k, v in gradients.items()}, {k: v.numpy() for k, v in buffers.items()}
        ]  # fmt: skip
    return results


@pytest.fixture(scope="module")
def synchronized(tmp_path_factory):
    return in_processes(_synchronized, WORLD, tmp_path_factory.mktemp("group"))


def near(mine, theirs, msg):
    mine, theirs = torch.from_numpy(mine).double(), theirs.double()
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm().clamp(min=1e-3), msg


@pytest.mark.parametrize("name", LAYERS)
def test_over_processes_as_one_with_the_whole_batch(synchronized, name):
    module, views = made(name)
    y, grad, gradients, buffers = judged(per_view_batchnorm(module), torch.cat(views))
    for rank, results in enumerate(synchronized):
        mine = results[name]
        rows = torch.cat([torch.arange(rank * 3, rank * 3 + 3) + 6 * view for view in range(2)])
        if name == "far from zero":  # float32 keeps a number near 1000 to 6e-5, in torch's own layer too
            torch.testing.assert_close(torch.from_numpy(mine[0]), y[rows], atol=2e-3, rtol=0)
        else:
            near(mine[0], y[rows], "output")
            near(mine[1] / WORLD, grad[rows], "input gradient")
            for key, value in gradients.items():
                near(mine[2][key], value, key)
        assert mine[3].keys() == buffers.keys()
        for key, value in buffers.items():
            near(mine[3][key], value, key)
            assert (mine[3][key] == synchronized[0][name][3][key]).all()  # the same bits everywhere


def _compiled(rank, world, backend):
    module, views = made("net")
    sync_batchnorm(per_view_batchnorm(module), dist.group.WORLD)
    eager, x = copy.deepcopy(module), torch.cat([view[rank * 3 : rank * 3 + 3] for view in views])
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    expected = judged(eager, x, slice(rank * 3, rank * 3 + 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = judged(compiled, x, slice(rank * 3, rank * 3 + 3))
    torch.testing.assert_close(found[:2], expected[:2], atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(found[2].values(), expected[2].values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(found[3].values(), expected[3].values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    return True


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_over_processes_without_a_break(tmp_path, backend):
    assert in_processes(_compiled, WORLD, tmp_path, backend) == [True, True]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_synchronising_alone_changes_nothing(alone):
    module, views = made("net")
    x = torch.cat(views)
    expected = judged(per_view_batchnorm(copy.deepcopy(module)), x)
    found = judged(per_view_batchnorm(sync_batchnorm(sync_batchnorm(module, alone), alone)), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(module.eval()(x), module(x))
    low = module.train()[1](torch.randn(4, 6, 2, 2, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16


def test_what_cannot_be_synchronised_is_refused(alone):
    class Odd(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(ValueError, match="Odd"):
        sync_batchnorm(nn.Sequential(Odd(3)), alone)
    layer = sync_batchnorm(per_view_batchnorm(nn.BatchNorm1d(3)), alone)
    with pytest.raises(ValueError, match="2 views"):
        layer(torch.randn(3, 3))
    with pytest.raises(Exception, match="more than one value"):  # the compiler wraps it
        layer(torch.randn(2, 3))
