"""Reductions over two processes, against the same numbers put together in one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from falcon_fast.kernels.collectives import count_flagged, log_sum_over

from ..processes import in_processes

# What the processes hold; exp of the first column underflows in float32 and in float64.
SHARES = [[-900.0, 0.5, 3.0], [-902.0, 0.25, -3.0]]
FLAGS = [[0, 1, 1, 0], [0, 0, 1, 1]]


def _reduced(rank: int, world: int):
    group = dist.group.WORLD
    x = torch.tensor(SHARES[rank], dtype=torch.float64)
    y = x.clone().requires_grad_()
    found = log_sum_over(group, y)
    (gradient,) = torch.autograd.grad(found.sum(), y)
    used = count_flagged(torch.tensor(FLAGS[rank], dtype=torch.int32), group)
    plain = log_sum_over(group, x)
    return plain.numpy(), log_sum_over(group, x, base=2).numpy(), found.detach().numpy(), gradient.numpy(), used.item()


def test_log_sums_and_flags_over_a_group(tmp_path):
    shares = torch.tensor(SHARES, dtype=torch.float64)
    expected = shares.logsumexp(0)
    expected_2 = (shares * torch.log(torch.tensor(2.0, dtype=torch.float64))).logsumexp(0) / torch.log(
        torch.tensor(2.0, dtype=torch.float64)
    )
    for rank, (plain, base_2, differentiable, gradient, used) in enumerate(in_processes(_reduced, 2, tmp_path)):
        torch.testing.assert_close(torch.from_numpy(plain), expected)
        torch.testing.assert_close(torch.from_numpy(base_2), expected_2)
        torch.testing.assert_close(torch.from_numpy(differentiable), expected)
        # Every process sums its own result, so a share's gradient comes once from each of the two.
        torch.testing.assert_close(torch.from_numpy(gradient), 2 * torch.exp(shares[rank] - expected))
        assert used == 3


def test_alone_the_flags_are_counted_as_they_are():
    assert count_flagged(torch.tensor([0, 1, 1, 0]), None).item() == 2
