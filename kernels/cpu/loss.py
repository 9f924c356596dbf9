"""The loss and its gradient on the CPU, in three sweeps over the codes that never hold the N x c matrices.

With y_v = Z_v - max_j Z_v (row by row), s_v = sum_j exp(y_v) and P_v = exp(y_v - ln s_v), views v = 1, 2:

1. rows: the maxima, ln s_v, and x_1 = E_{P_1}[y_2], x_2 = E_{P_2}[y_1]; C_12 = mean_i(ln s_1 - x_2), C_21 = mean_i(ln s_2 - x_1);
2. columns: t_j = max_i ln P_ij and ln pbar_j = t_j + ln sum_i exp(ln P_ij - t_j) - ln N, hence the prior, E_j = exp(t_j) and
   q_j = E_j ln(c pbar_j) (reverse) or -exp(t_j - ln pbar_j) / c (forward), so that with e_ij = exp(ln P_ij - t_j), which
   cannot underflow where it matters, P_ij = e_ij E_j and P_ij g_j = e_ij q_j; and a_i = sum_j e_ij q_j;
3. gradient: dL/dZ_1 = 1/(2N) (e_1 q_1 + P_1 (beta - a_1 + beta x_1 - beta y_2) - beta P_2), view 2 by symmetry, and dH = dZ W^T / tau.

The gradient is formed in the forward pass, kept in float32 and multiplied by the loss's own gradient in the backward pass.
Where the extension is built the sweeps run in C++ (level.hpp), otherwise in PyTorch (fallback.py), strip by strip of codes.
A dense product takes the embeddings and dZ as 16-bit fixed point (rows, or rows of 128 codes, to one scale; the codes are
-1 and +1 and the sums exact) where the processor has such an instruction and the rounding cannot be felt, else as float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from falcon_fast.kernels.cpu import fallback
from falcon_fast.kernels.cpu.extension import Compiled, cpu_extension

DEFAULT_BUDGET = 256 * 2**20
TILE = 128  # codes under one maximum; strips are multiples of it
STRIP_BYTES = 4 * 2**20  # both views' float32 logits of one strip: stays in the last cache
WIDEST_STRIP = 4096
HADAMARD_SEGMENT = 2048  # a row's logits of both views are 16 KiB: first cache
SMALLEST_FWHT = 16  # the widest vector

# Root mean square error that rounding the embeddings to 16 bits may leave in a logit; the gradient's relative error is about
# half of it. At the published temperature it is 1e-5 sigma_z, the logits' spread: 2e-4 at N = 1024, f = 512.
INT16_LOGIT_ERROR = 5e-4


class Dictionary(NamedTuple):
    """Codes as packed signs: int32 (c, ceil(f/32)), or for Hadamard codes (c/f, ceil(f/32)), one row a block."""

    words: torch.Tensor
    f: int
    c: int
    hadamard: bool


class Objective(NamedTuple):
    """tau, beta, prior (`reverse` or `forward`), and the group whose mean assignment counts (None: this process)."""

    tau: float
    beta: float
    prior: str
    group: dist.ProcessGroup | None


class Columns:
    """Per view and code, (2, c up to a multiple of 128) float32: peak t, ln sum_i P, weight E, q."""

    def __init__(self, c: int) -> None:
        width = _padded(c)
        self.peak, self.log_sum, self.weight, self.q = (torch.zeros(2, width) for _ in range(4))


def _padded(c: int) -> int:
    return -(-c // TILE) * TILE


def _log_sum_over(group: dist.ProcessGroup | None, log_sum: torch.Tensor) -> None:
    """In place: ln of the sum over the group's processes (all-reduce of the maximum, then of the sum)."""
    if group is None:
        return
    maximum = log_sum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    total = torch.exp(log_sum - maximum)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    log_sum.copy_(torch.log(total) + maximum)


# ---- plans ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the dense sweeps treat the logits: kept in 2 bytes or formed anew, `width` codes at a time; peak memory in bytes."""

    stored: bool
    width: int
    peak: int


def dense_plan(n: int, f: int, c: int, plan: str, memory_budget: int | None, threads: int = 1) -> Plan:
    """The plan for `n` rows, within `memory_budget` bytes beyond inputs and dictionary (None: 256 MiB where it can be kept).

    Depends on nothing that may differ between the processes of a group or after a resume but the number of threads, which
    moves the peak by 128 KiB each. Raises ValueError where the budget cannot be kept.
    """
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    padded_f, padded_c = -(-f // 64) * 64, _padded(c)
    fixed = 2 * n * padded_f * (4 + 4 + 4) + 2 * padded_c * 4 * 4 + threads * 128 * 1024 + 2 * n * 200
    per_code = 2 * n * (4 + 2)
    if cpu_extension is None:  # unpacked codes, and the temporaries of eager arithmetic
        per_code = 2 * n * 4 * 8 + 2 * f * 4 + f * 8
    copy = 2 * n * (2 * padded_c + padded_c // TILE * 8)
    width = min(WIDEST_STRIP, padded_c, max(4 * TILE, STRIP_BYTES // (8 * n) // TILE * TILE))

    stored = plan == "stored" or (plan == "auto" and fixed + copy + per_code * width <= budget)
    held = fixed + (copy if stored else 0)
    if held + per_code * width > budget:
        width = max(TILE, (budget - held) // per_code // TILE * TILE)
    peak = held + per_code * width
    if memory_budget is not None and peak > memory_budget:
        what = "the stored plan" if stored else "the loss"
        raise ValueError(
            f"{what} needs about {peak / 2**20:.1f} MiB for N = {n}, f = {f} and c = {c}, over the budget of "
            f"{memory_budget / 2**20:.1f} MiB: raise it, or lower the batch or the number of codes"
        )
    return Plan(stored, width, peak)


# ---- dictionaries ---------------------------------------------------------------------------------------------------


class _Dense:
    """A dense dictionary's two products, by the extension."""

    def __init__(self, h: torch.Tensor, tau: float, dictionary: Dictionary, threads: int) -> None:
        words = self.words = dictionary.words.contiguous()
        _, n, f = h.shape
        self.threads, self.ops = threads, Compiled(cpu_extension)
        peaks = h.abs().amax(dim=2).view(-1)
        rounding = peaks.max().item() / 32767 / math.sqrt(12) * math.sqrt(f) / tau
        self.int16 = bool(self.ops.fast_int16()) and rounding <= INT16_LOGIT_ERROR
        if self.int16:
            a = torch.zeros(2 * n, words.shape[1] * 32, dtype=torch.int16)
            inverse = torch.where(peaks > 0, 32767 / peaks, 0)
            a[:, :f] = (h.view(2 * n, f) * inverse[:, None]).round_()
            self.scale = peaks * (1 / (32767 * tau))
        else:
            a = torch.zeros(2 * n, words.shape[1] * 32)
            a[:, :f] = h.view(2 * n, f)
            self.scale = torch.full((2 * n,), 1 / tau)
        self.a = a.view(torch.int32)
        self.f = f
        self.dh: torch.Tensor | None = None

    def logits(self, z: torch.Tensor, first: int, count: int) -> None:
        self.ops.dense_logits(z, self.a, self.scale, self.words, first, count, self.int16, self.threads)

    def add_gradient(self, dz: torch.Tensor, first: int, count: int) -> None:
        if self.dh is None:
            self.dh = torch.zeros(dz.shape[0] * dz.shape[1], -(-self.f // 64) * 64)
        self.ops.dense_gradient(dz, self.words, first, count, self.dh, self.int16, self.threads)

    def gradient(self, n: int) -> torch.Tensor:
        assert self.dh is not None
        return self.dh.view(2, n, -1)[:, :, : self.f]


class _DenseInTorch:
    """The same in PyTorch: codes unpacked strip by strip."""

    def __init__(self, h: torch.Tensor, tau: float, dictionary: Dictionary, threads: int) -> None:
        del threads
        self.h, self.dictionary, self.ops = h / tau, dictionary, fallback
        self.dh = torch.zeros_like(h)

    def _codes(self, first: int, count: int) -> torch.Tensor:
        return fallback.unpack(self.dictionary.words[first : first + count], self.dictionary.f)

    def logits(self, z: torch.Tensor, first: int, count: int) -> None:
        z[:, :, count:] = fallback.ABSENT
        z[:, :, :count] = self.h @ self._codes(first, count).T

    def add_gradient(self, dz: torch.Tensor, first: int, count: int) -> None:
        self.dh += dz[:, :, :count] @ self._codes(first, count)

    def gradient(self, n: int) -> torch.Tensor:
        del n
        return self.dh


class _HadamardInTorch(_DenseInTorch):
    """Blocks of Hadamard codes by the fast transform in PyTorch; strips are multiples of the block."""

    def logits(self, z: torch.Tensor, first: int, count: int) -> None:
        flipped = self.h[:, :, None, :] * self._signs(first, count)  # (2, N, blocks, f)
        z[:, :, count:] = fallback.ABSENT
        z[:, :, :count] = fallback.walsh_hadamard(flipped).flatten(2)

    def add_gradient(self, dz: torch.Tensor, first: int, count: int) -> None:
        blocks = dz[:, :, :count].unflatten(2, (-1, self.dictionary.f))
        self.dh += (fallback.walsh_hadamard(blocks) * self._signs(first, count)).sum(2)

    def _signs(self, first: int, count: int) -> torch.Tensor:
        f = self.dictionary.f
        return fallback.unpack(self.dictionary.words[first // f : (first + count) // f], f)


# ---- sweeps ---------------------------------------------------------------------------------------------------------


class _Strips:
    """The three sweeps, strip by strip; the logits kept in 2 bytes, or formed anew in each."""

    def __init__(self, dense: _Dense | _DenseInTorch, n: int, c: int, plan: Plan, threads: int) -> None:
        self.dense, self.ops, self.n, self.c, self.plan, self.threads = dense, dense.ops, n, c, plan, threads
        self.strip = torch.empty(2 * n * min(plan.width, _padded(c)))
        if plan.stored:
            self.stored = torch.empty(2 * n, _padded(c), dtype=torch.uint16)
            self.tiles = torch.empty(2 * n, _padded(c) // TILE, 2)

    def _ranges(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        for first in range(0, self.c, self.plan.width):
            count = min(self.plan.width, self.c - first)
            width = _padded(count)
            yield self.strip[: 2 * self.n * width].view(2, self.n, width), first, count

    def _logits(self, z: torch.Tensor, first: int, count: int) -> None:
        if self.plan.stored:
            self.ops.strip_decode(z, self.stored, self.tiles, first, count, self.threads)
        else:
            self.dense.logits(z, first, count)

    def rows(self, state: torch.Tensor) -> None:
        for z, first, count in self._ranges():
            self.dense.logits(z, first, count)
            self.ops.strip_rows(z, first, state, self.threads)
            if self.plan.stored:
                self.ops.strip_encode(z, self.stored, self.tiles, first, self.threads)

    def columns(
        self, terms: torch.Tensor, columns: Columns, a: torch.Tensor, objective: Objective, log_rows: float
    ) -> list[float]:
        sums = [0.0, 0.0]
        forward = objective.prior == "forward"
        for z, first, count in self._ranges():
            self._logits(z, first, count)
            self.ops.strip_columns(z, terms, columns.peak, columns.log_sum, first, self.threads)
            # Strip by strip, so that a strip's logits serve for a as well: they cost more than the call.
            _log_sum_over(objective.group, columns.log_sum[:, first : first + count])
            strip_sums = self.ops.prior_columns(
                columns.peak,
                columns.log_sum,
                log_rows,
                self.c,
                forward,
                first,
                z.shape[2],
                columns.weight,
                columns.q,
            )
            sums = [total + part for total, part in zip(sums, strip_sums, strict=True)]
            self.ops.strip_prior(z, columns.q, first, a, self.threads)
        return sums

    def gradient(self, terms: torch.Tensor, columns: Columns, beta: float, factor: float) -> torch.Tensor:
        for z, first, count in self._ranges():
            self._logits(z, first, count)
            self.ops.strip_gradient(
                z, terms, columns.peak, columns.weight, columns.q, first, beta, factor, self.threads
            )
            self.dense.add_gradient(z, first, count)
        return self.dense.gradient(self.n)


class _Hadamard:
    """The three sweeps by the extension's fast transform, everything formed anew."""

    def __init__(self, h: torch.Tensor, tau: float, dictionary: Dictionary, threads: int) -> None:
        self.ops, self.threads = Compiled(cpu_extension), threads
        self.c = dictionary.c
        self.arguments = (h / tau, dictionary.words.contiguous(), max(HADAMARD_SEGMENT, dictionary.f))

    def rows(self, state: torch.Tensor) -> None:
        self.ops.hadamard_rows(*self.arguments, state, self.threads)

    def columns(
        self, terms: torch.Tensor, columns: Columns, a: torch.Tensor, objective: Objective, log_rows: float
    ) -> list[float]:
        forward, alone = objective.prior == "forward", objective.group is None
        outputs = (columns.peak, columns.log_sum, columns.weight, columns.q)
        sums = self.ops.hadamard_columns(*self.arguments, terms, *outputs, a, log_rows, forward, alone, self.threads)
        if not alone:
            _log_sum_over(objective.group, columns.log_sum[:, : self.c])
            width = columns.peak.shape[1]
            sums = self.ops.prior_columns(
                columns.peak, columns.log_sum, log_rows, self.c, forward, 0, width, columns.weight, columns.q
            )
            self.ops.hadamard_prior(*self.arguments, terms, columns.peak, columns.weight, columns.q, a, self.threads)
        return sums

    def gradient(self, terms: torch.Tensor, columns: Columns, beta: float, factor: float) -> torch.Tensor:
        dh = torch.zeros_like(self.arguments[0])
        column_terms = (columns.peak, columns.weight, columns.q)
        self.ops.hadamard_gradient(*self.arguments, terms, *column_terms, beta, factor, dh, self.threads)
        return dh


def _sweeps(
    h: torch.Tensor, tau: float, dictionary: Dictionary, plan: str, memory_budget: int | None
) -> _Strips | _Hadamard:
    _, n, f = h.shape
    c, threads = dictionary.c, torch.get_num_threads()
    if dictionary.hadamard and f < SMALLEST_FWHT and cpu_extension is not None:
        dictionary = Dictionary(fallback.dense_hadamard(dictionary.words, f, c), f, c, False)
    if not dictionary.hadamard:
        chosen = dense_plan(n, f, c, plan, memory_budget, threads)
        kind = _DenseInTorch if cpu_extension is None else _Dense
        return _Strips(kind(h, tau, dictionary, threads), n, c, chosen, threads)
    if plan == "stored":
        raise ValueError("Hadamard codes are formed anew faster than read back: choose the plan auto or streaming")
    segment = max(HADAMARD_SEGMENT, f)
    if cpu_extension is None:
        segment = max(f, STRIP_BYTES // (8 * n) // segment * segment)
    temporaries = 1 if cpu_extension is not None else 8
    peak = 2 * n * (12 * f + 4 * segment * temporaries + 200) + 2 * _padded(c) * 16 + threads * segment * 16
    if memory_budget is not None and peak > memory_budget:
        raise ValueError(
            f"the loss needs about {peak / 2**20:.1f} MiB for N = {n}, f = {f} and c = {c}, over the budget of "
            f"{memory_budget / 2**20:.1f} MiB: raise it, or lower the batch or the number of codes"
        )
    if cpu_extension is None:
        return _Strips(_HadamardInTorch(h, tau, dictionary, threads), n, c, Plan(False, segment, peak), threads)
    return _Hadamard(h, tau, dictionary, threads)


def _count_used(arguments: torch.Tensor, c: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return torch.tensor(torch.unique(arguments).numel())
    used = torch.zeros(c, dtype=torch.int32)
    used[arguments] = 1
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    return used.sum()


def loss_and_gradient(
    h: torch.Tensor,
    dictionary: Dictionary,
    objective: Objective,
    plan: str,
    memory_budget: int | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss, prior, invariance, codes in use and dL/dH (2, N, f) (or None) of float32 embeddings h (2, N, f)."""
    n, c = h.shape[1], dictionary.c
    sweeps = _sweeps(h, objective.tau, dictionary, plan, memory_budget)

    state = torch.zeros(n, 8, dtype=torch.float64)
    sweeps.rows(state)
    maxima, sums, cross, arguments = state.T.unflatten(0, (4, 2))  # each (2, N)
    terms = torch.zeros(2, n, 4)
    terms[..., 0], terms[..., 1], terms[..., 2] = maxima, sums.log(), cross / sums
    invariance = 0.5 * (sums.log() - (cross / sums).flip(0)).sum().item() / n

    columns, a = Columns(c), torch.zeros(2, n, dtype=torch.float64)
    world = 1 if objective.group is None else dist.get_world_size(objective.group)
    prior = 0.5 * sum(sweeps.columns(terms, columns, a, objective, math.log(n * world)))
    if objective.prior == "forward":
        prior -= math.log(c)
    terms[..., 3] = a

    gradient = None
    if with_gradient:
        gradient = sweeps.gradient(terms, columns, objective.beta, 1 / (2 * n * objective.tau))
    values = (torch.tensor(x) for x in (prior + objective.beta * invariance, prior, invariance))
    return (*values, _count_used(arguments.long().flatten(), c, objective.group), gradient)


class _CpuLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h1: torch.Tensor, h2: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
        h = torch.stack((h1, h2)).float()
        *outputs, gradient = loss_and_gradient(h, *settings)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.gradient, ctx.dtype = gradient, h1.dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        g1, g2 = ((grad_loss * g).to(ctx.dtype) for g in ctx.gradient)
        return g1, g2, None, None, None, None, None


def cpu_loss(
    h1: torch.Tensor,
    h2: torch.Tensor,
    dictionary: Dictionary,
    objective: Objective,
    plan: str,
    memory_budget: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (differentiable once), prior, invariance and codes in use, of embeddings (N, f) in any precision up to float32.

    The dense plans: `stored`, `streaming`, or `auto`, stored where it fits the budget. The public door, `falcon_loss`, checks
    the arguments.
    """
    with_gradient = torch.is_grad_enabled() and (h1.requires_grad or h2.requires_grad)
    loss, prior, invariance, used = _CpuLoss.apply(
        h1, h2, dictionary, objective, plan, memory_budget, with_gradient
    )
    return loss, prior, invariance, used
