"""The three sweeps of the loss over the codes (rows, columns, gradient; see loss.py), by the extension or in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from falcon_fast.kernels.collectives import log_sum_over
from falcon_fast.kernels.cpu import fallback
from falcon_fast.kernels.cpu.extension import StripKernels, compiled, cpu_extension
from falcon_fast.kernels.cpu.plan import TILE, Plan, dense_plan, hadamard_plan, own_products, padded
from falcon_fast.kernels.signs import unpack_signs
from falcon_fast.kernels.spec import LossSpec

SMALLEST_FWHT = 16  # the widest vector

# Root mean square error that rounding the embeddings to 16 bits may leave in a logit; the relative error of the gradient is about
# half of it. At the published temperature it is 1e-5 sigma_z, the spread of the logits: 2e-4 at N = 1024, f = 512.
INT16_LOGIT_ERROR = 5e-4


Views = tuple[torch.Tensor, torch.Tensor]  # the embeddings of each view, float32 (N, f), contiguous


class Columns:
    """Per view and code, (2, c rounded up to a multiple of 128) float32: peak t, ln sum_i P, weight (E or ln(c pbar)), q."""

    def __init__(self, c: int) -> None:
        width = padded(c)
        self.peak, self.log_sum, self.weight, self.q = (torch.zeros(2, width, dtype=torch.float32) for _ in range(4))


class _Dense:
    """The two products of a dense dictionary by the extension.

    Where the processor has AVX-512 VNNI they are 4 times (int16) or 2 times (float32) as fast as torch's float32.
    """

    def __init__(self, views: Views, words: torch.Tensor, tau: float, threads: int) -> None:
        words = self.words = words.contiguous()
        n, f = views[0].shape
        extension = compiled()
        self.extension, self.threads = extension, threads
        self.ops: StripKernels[torch.Tensor] = extension
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
            self.scale = torch.full((2 * n,), 1 / tau, dtype=torch.float32)
        self.a = a.view(2 * n, -1).view(torch.int32)
        self.f = f
        self.dh: torch.Tensor | None = None

    def logits(self, z: torch.Tensor, first: int, count: int) -> None:
        self.extension.dense_logits(z, self.a, self.scale, self.words, first, count, self.int16, self.threads)

    def add_gradient(self, dz: torch.Tensor, first: int, count: int) -> None:
        if self.dh is None:
            self.dh = torch.zeros(dz.shape[0] * dz.shape[1], -(-self.f // 64) * 64, dtype=torch.float32)
        self.extension.dense_gradient(dz, self.words, first, count, self.dh, self.int16, self.threads)

    def gradient(self, n: int) -> torch.Tensor:
        assert self.dh is not None
        return self.dh[:, : self.f].contiguous().view(2, n, self.f)


class _DenseInTorch:
    """The same by torch's float32 product, on codes that are unpacked strip by strip; faster than ours below AVX-512."""

    def __init__(self, views: Views, words: torch.Tensor, tau: float, threads: int) -> None:
        del threads
        self.h, self.words, self.f = torch.stack(views).div_(tau), words, views[0].shape[1]
        self.ops: StripKernels[torch.Tensor] = fallback if cpu_extension is None else compiled()
        self.dh = torch.zeros_like(self.h)

    def _codes(self, first: int, count: int) -> torch.Tensor:
        return unpack_signs(self.words[first : first + count], self.f)

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
        blocks = dz[:, :, :count].unflatten(2, (-1, self.f))
        self.dh += (fallback.walsh_hadamard(blocks) * self._signs(first, count)).sum(2)

    def _signs(self, first: int, count: int) -> torch.Tensor:
        return unpack_signs(self.words[first // self.f : (first + count) // self.f], self.f)


class _Strips:
    """The three sweeps, strip by strip; the logits are kept in 2 bytes each, or computed again in every sweep."""

    def __init__(self, dense: _Dense | _DenseInTorch, n: int, spec: LossSpec, plan: Plan, threads: int) -> None:
        self.dense, self.ops, self.plan, self.threads = dense, dense.ops, plan, threads
        self.spec, self.n, self.c = spec, n, spec.c
        self.strip = torch.empty(2 * n * min(plan.width, padded(self.c)), dtype=torch.float32)
        if plan.stored:
            self.stored = torch.empty(2 * n, padded(self.c), dtype=torch.uint16)
            self.tiles = torch.empty(2 * n, padded(self.c) // TILE, 2, dtype=torch.float32)

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
                # From here on the logits are the stored ones. The gradient is then exact for logits that are off by 1e-4; with
                # statistics of other logits it would contain differences of large numbers.
                self.ops.strip_encode(z, self.stored, self.tiles, first, self.threads)
                self.ops.strip_decode(z, self.stored, self.tiles, first, count, self.threads)
            self.ops.strip_rows(z, first, state, self.threads)

    def columns(self, terms: torch.Tensor, columns: Columns, a: torch.Tensor, log_rows: float) -> list[float]:
        sums = [0.0, 0.0]
        group = self.spec.group
        for z, first, count in self._ranges():
            self._logits(z, first, count)
            self.ops.strip_columns(z, terms, columns.peak, columns.log_sum, first, self.threads)
            if group is not None:
                # Strip by strip, so that the logits of a strip serve for a as well: they cost more than the call.
                here = columns.log_sum[:, first : first + count]
                here.copy_(log_sum_over(group, here))
            strip_sums = self.ops.prior_columns(
                columns.peak,
                columns.log_sum,
                log_rows,
                self.c,
                self.spec.forward,
                first,
                z.shape[2],
                columns.weight,
                columns.q,
            )
            sums = [total + part for total, part in zip(sums, strip_sums, strict=True)]
            self.ops.strip_prior(z, columns.q, first, a, self.threads)
        return sums

    def gradient(self, terms: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Return dL/dH (2, N, f), float32, contiguous."""
        beta, forward, factor = self.spec.beta, self.spec.forward, 1 / (2 * self.n * self.spec.tau)
        for z, first, count in self._ranges():
            self._logits(z, first, count)
            self.ops.strip_gradient(
                z, terms, columns.peak, columns.weight, columns.q, first, beta, factor, forward, self.threads
            )
            self.dense.add_gradient(z, first, count)
        return self.dense.gradient(self.n)


class _Hadamard:
    """The three sweeps by the fast transform of the extension; the logits are computed again in each."""

    def __init__(self, views: Views, words: torch.Tensor, spec: LossSpec, plan: Plan, threads: int) -> None:
        self.ops, self.threads, self.spec = compiled(), threads, spec
        self.arguments = (*views, 1 / spec.tau, words.contiguous(), plan.width)

    def rows(self, state: torch.Tensor) -> None:
        self.ops.hadamard_rows(*self.arguments, state, self.threads)

    def columns(self, terms: torch.Tensor, columns: Columns, a: torch.Tensor, log_rows: float) -> list[float]:
        c, forward, group = self.spec.c, self.spec.forward, self.spec.group
        outputs = (columns.peak, columns.log_sum, columns.weight, columns.q)
        sums = self.ops.hadamard_columns(
            *self.arguments, terms, *outputs, a, log_rows, forward, group is None, self.threads
        )
        if group is not None:
            whole = columns.log_sum[:, :c]
            whole.copy_(log_sum_over(group, whole))
            width = columns.peak.shape[1]
            sums = self.ops.prior_columns(
                columns.peak, columns.log_sum, log_rows, c, forward, 0, width, columns.weight, columns.q
            )
            self.ops.hadamard_prior(*self.arguments, terms, columns.peak, columns.weight, columns.q, a, self.threads)
        return sums

    def gradient(self, terms: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Return dL/dH (2, N, f), float32, contiguous."""
        beta, forward = self.spec.beta, self.spec.forward
        factor = 1 / (2 * self.arguments[0].shape[0])  # the other 1 / tau is in the diagonals
        dh = torch.zeros(2, *self.arguments[0].shape, dtype=torch.float32)
        column_terms = (columns.peak, columns.weight, columns.q)
        self.ops.hadamard_gradient(
            *self.arguments, terms, *column_terms, beta, factor, forward, dh[0], dh[1], self.threads
        )
        return dh


def sweeps_for(views: Views, words: torch.Tensor, spec: LossSpec) -> _Strips | _Hadamard:
    """Return the sweeps for the embeddings of the views and the dictionary's packed signs.

    Raises ValueError if the plan or the budget does not fit.
    """
    n, f = views[0].shape
    c, threads, is_hadamard = spec.c, torch.get_num_threads(), spec.is_hadamard
    if is_hadamard and spec.plan == "stored":
        raise ValueError(
            "logits of Hadamard codes are not stored, as computing them again is faster than reading them: choose the plan "
            "auto or streaming"
        )
    if is_hadamard and f < SMALLEST_FWHT and cpu_extension is not None:
        words, is_hadamard = fallback.dense_hadamard(words, f, c), False
    if not is_hadamard:
        chosen = dense_plan(n, f, c, spec.plan, spec.memory_budget)
        kind = _Dense if own_products() else _DenseInTorch
        return _Strips(kind(views, words, spec.tau, threads), n, spec, chosen, threads)
    chosen = hadamard_plan(n, f, c, spec.memory_budget)
    if cpu_extension is None:
        return _Strips(_HadamardInTorch(views, words, spec.tau, threads), n, spec, chosen, threads)
    return _Hadamard(views, words, spec, chosen, threads)
