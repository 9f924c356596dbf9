"""The loss's three sweeps over the codes (rows, columns, gradient; see loss.py), by the extension or in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from falcon_fast.kernels.cpu import fallback
from falcon_fast.kernels.cpu.extension import Compiled, cpu_extension
from falcon_fast.kernels.cpu.plan import TILE, Plan, dense_plan, hadamard_plan, own_products, padded

SMALLEST_FWHT = 16  # the widest vector

# Root mean square error that rounding the embeddings to 16 bits may leave in a logit; the gradient's relative error is about
# half of it. At the published temperature it is 1e-5 sigma_z, the logits' spread: 2e-4 at N = 1024, f = 512.
INT16_LOGIT_ERROR = 5e-4


Views = tuple[torch.Tensor, torch.Tensor]  # the embeddings of each, float32 (N, f), contiguous


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
    """Per view and code, (2, c up to a multiple of 128) float32: peak t, ln sum_i P, weight (E or ln(c pbar)), q."""

    def __init__(self, c: int) -> None:
        width = padded(c)
        self.peak, self.log_sum, self.weight, self.q = (torch.zeros(2, width) for _ in range(4))


def _log_sum_over(group: dist.ProcessGroup | None, log_sum: torch.Tensor) -> None:
    """In place: ln of the sum over the group's processes (all-reduce of the maximum, then of the sum)."""
    if group is None:
        return
    maximum = log_sum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    total = torch.exp(log_sum - maximum)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    log_sum.copy_(torch.log(total) + maximum)


class _Dense:
    """A dense dictionary's two products, by the extension: where it has AVX-512 VNNI, 4 (int16) or 2 times torch's float32."""

    def __init__(self, views: Views, tau: float, dictionary: Dictionary, threads: int) -> None:
        words = self.words = dictionary.words.contiguous()
        n, f = views[0].shape
        self.threads, self.ops = threads, Compiled(cpu_extension)
        peaks = torch.cat([h.abs().amax(dim=1) for h in views])
        rounding = peaks.max().item() / 32767 / math.sqrt(12) * math.sqrt(f) / tau
        self.int16 = rounding <= INT16_LOGIT_ERROR
        a = torch.zeros(2, n, words.shape[1] * 32, dtype=torch.int16 if self.int16 else torch.float32)
        if self.int16:
            inverse = torch.where(peaks > 0, 32767 / peaks, 0).view(2, n, 1)
            for view, h in enumerate(views):
                a[view, :, :f] = (h * inverse[view]).round_()
            self.scale = peaks * (1 / (32767 * tau))
        else:
            for view, h in enumerate(views):
                a[view, :, :f] = h
            self.scale = torch.full((2 * n,), 1 / tau)
        self.a = a.view(2 * n, -1).view(torch.int32)
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
        return self.dh[:, : self.f].contiguous().view(2, n, self.f)


class _DenseInTorch:
    """The same by torch's float32 product, on codes unpacked strip by strip: below AVX-512 it is faster than ours."""

    def __init__(self, views: Views, tau: float, dictionary: Dictionary, threads: int) -> None:
        del threads
        self.h, self.dictionary = torch.stack(views).div_(tau), dictionary
        self.ops: Any = fallback if cpu_extension is None else Compiled(cpu_extension)
        self.dh = torch.zeros_like(self.h)

    def _codes(self, first: int, count: int) -> torch.Tensor:
        words = self.dictionary.words[first : first + count]
        if cpu_extension is None:
            return fallback.unpack(words, self.dictionary.f)
        signs = torch.empty(count, self.dictionary.f)
        self.ops.unpack_signs(words, signs)
        return signs

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


class _Strips:
    """The three sweeps, strip by strip; the logits kept in 2 bytes, or formed anew in each."""

    def __init__(self, dense: _Dense | _DenseInTorch, tau: float, n: int, c: int, plan: Plan, threads: int) -> None:
        self.dense, self.ops, self.plan, self.threads = dense, dense.ops, plan, threads
        self.tau, self.n, self.c = tau, n, c
        self.strip = torch.empty(2 * n * min(plan.width, padded(c)))
        if plan.stored:
            self.stored = torch.empty(2 * n, padded(c), dtype=torch.uint16)
            self.tiles = torch.empty(2 * n, padded(c) // TILE, 2)

    def _ranges(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        for first in range(0, self.c, self.plan.width):
            count = min(self.plan.width, self.c - first)
            width = padded(count)
            yield self.strip[: 2 * self.n * width].view(2, self.n, width), first, count

    def _logits(self, z: torch.Tensor, first: int, count: int) -> None:
        if self.plan.stored:
            self.ops.strip_decode(z, self.stored, self.tiles, first, count, self.threads)
        else:
            self.dense.logits(z, first, count)

    def rows(self, state: torch.Tensor) -> None:
        for z, first, count in self._ranges():
            self.dense.logits(z, first, count)
            if self.plan.stored:
                # From here on the logits are what was stored: the gradient is then exact for logits off by 1e-4, where
                # statistics of other logits would leave differences of large numbers.
                self.ops.strip_encode(z, self.stored, self.tiles, first, self.threads)
                self.ops.strip_decode(z, self.stored, self.tiles, first, count, self.threads)
            self.ops.strip_rows(z, first, state, self.threads)

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

    def gradient(self, terms: torch.Tensor, columns: Columns, objective: Objective) -> torch.Tensor:
        """(2, N, f) float32, contiguous."""
        forward, factor = objective.prior == "forward", 1 / (2 * self.n * self.tau)
        for z, first, count in self._ranges():
            self._logits(z, first, count)
            self.ops.strip_gradient(
                z, terms, columns.peak, columns.weight, columns.q, first, objective.beta, factor, forward, self.threads
            )
            self.dense.add_gradient(z, first, count)
        return self.dense.gradient(self.n)


class _Hadamard:
    """The three sweeps by the extension's fast transform, everything formed anew."""

    def __init__(self, views: Views, tau: float, dictionary: Dictionary, plan: Plan, threads: int) -> None:
        self.ops, self.threads = Compiled(cpu_extension), threads
        self.c = dictionary.c
        self.arguments = (*views, 1 / tau, dictionary.words.contiguous(), plan.width)

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

    def gradient(self, terms: torch.Tensor, columns: Columns, objective: Objective) -> torch.Tensor:
        """(2, N, f) float32, contiguous."""
        forward = objective.prior == "forward"
        factor = 1 / (2 * self.arguments[0].shape[0])  # the other 1 / tau is in the diagonals
        dh = torch.zeros(2, *self.arguments[0].shape)
        column_terms = (columns.peak, columns.weight, columns.q)
        self.ops.hadamard_gradient(
            *self.arguments, terms, *column_terms, objective.beta, factor, forward, dh[0], dh[1], self.threads
        )
        return dh


def sweeps_for(
    views: Views, tau: float, dictionary: Dictionary, plan: str, memory_budget: int | None
) -> _Strips | _Hadamard:
    """The sweeps for the views' embeddings. Raises ValueError where the plan or the budget does not fit."""
    n, f = views[0].shape
    c, threads = dictionary.c, torch.get_num_threads()
    if dictionary.hadamard and plan == "stored":
        raise ValueError("Hadamard codes are formed anew faster than read back: choose the plan auto or streaming")
    if dictionary.hadamard and f < SMALLEST_FWHT and cpu_extension is not None:
        dictionary = Dictionary(fallback.dense_hadamard(dictionary.words, f, c), f, c, False)
    if not dictionary.hadamard:
        chosen = dense_plan(n, f, c, plan, memory_budget)
        kind = _Dense if own_products() else _DenseInTorch
        return _Strips(kind(views, tau, dictionary, threads), tau, n, c, chosen, threads)
    chosen = hadamard_plan(n, f, c, memory_budget)
    if cpu_extension is None:
        return _Strips(_HadamardInTorch(views, tau, dictionary, threads), tau, n, c, chosen, threads)
    return _Hadamard(views, tau, dictionary, chosen, threads)
