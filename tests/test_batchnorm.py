from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from falcon_fast.batchnorm import has_batchnorm, per_view_batchnorm


def run_together(module, views):
    module = per_view_batchnorm(copy.deepcopy(module))
    x = torch.cat(views).requires_grad_()
    y = module(x)
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


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(5), (7, 5)),
        (lambda: nn.BatchNorm2d(5), (7, 5, 4, 3)),
        (lambda: nn.BatchNorm2d(5, momentum=None), (7, 5, 4, 3)),
        (lambda: nn.BatchNorm2d(5, affine=False), (7, 5, 4, 3)),
        (timm_batchnorm_act, (7, 5, 4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (7, 5, 8, 8)),
    ],
)
def test_as_if_the_views_had_passed_one_after_the_other(make, shape):
    module = make()
    # Different statistics in the two views: a shared BatchNorm would be far off.
    views = [torch.randn(shape), 3 * torch.randn(shape) + 2]
    together, apart = run_together(module, views), run_apart(module, views)
    torch.testing.assert_close(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1])
    states = together[2].state_dict(), apart[2].state_dict()
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key])
    for mine, theirs in zip(together[2].parameters(), apart[2].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


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


def test_compiles_without_a_break():
    module = per_view_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4)
    torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(module[1].running_mean, eager[1].running_mean)
