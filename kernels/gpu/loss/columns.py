"""Column statistics: the mean assignment of the batch, the prior, and a, the term of each row's gradient that comes from it.

Everything is in the log domain, in float32 and in units of log 2: log2 pbar_j = logsum2_i(log2 P_ij) - log2 N is computed
online over blocks of rows (each element of a block has its own running sum, and they are added up once: 0.32 ms instead of 0.51
for 1024 images and 65536 codes on an H100). g_j = ln(c pbar_j) (reverse prior) or -1 / (c pbar_j) (forward prior), and a_i =
sum_j P_ij g_j. P g is computed as P times a finite number (reverse) or as -exp2(log2 P_ij - log2 pbar_j) / c (forward): no
division by an underflowed number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from falcon_fast.kernels.collectives import log_sum_over
from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.loss.plan import TILE
from falcon_fast.kernels.gpu.loss.rows import RowState
from falcon_fast.kernels.gpu.tiles import LN_2
from falcon_fast.kernels.spec import LossSpec

BLOCK = 4096  # logits at a time


class Scales(NamedTuple):
    """The settings of a loss as the kernels take them: log2 of c, log2 of the number of rows of all processes, and the rest."""

    log_c: float
    log_rows: float
    beta: float
    tau: float
    forward: bool

    @staticmethod
    def of(n: int, spec: LossSpec) -> Scales:
        return Scales(math.log2(spec.c), math.log2(n * spec.world_size), spec.beta, spec.tau, spec.forward)


class ColumnState:
    """The results of the sweep over the columns: log2 pbar (2, c rounded up to a multiple of 128), and per strip the prior and
    the number of codes in use.

    For a group, `used` holds one flag per code instead, and the caller reduces the flags over the processes.
    """

    def __init__(self, c: int, strip: int, grouped: bool, device: torch.device) -> None:
        padded_c = ceil_div(c, TILE) * TILE
        self.strip, self.strips = strip, ceil_div(c, strip)
        self.log_pbar = torch.empty(2, padded_c, dtype=torch.float32, device=device)
        self.prior = torch.empty(2, self.strips, dtype=torch.float32, device=device)
        self.used = torch.empty(padded_c if grouped else self.strips, dtype=torch.int32, device=device)

    def reduce_log_pbar(self, group: dist.ProcessGroup, first: int, count: int) -> None:
        """Replace this process's share of log2 pbar by that of the group, for the codes [first, first + count)."""
        here = self.log_pbar[:, first : first + count]
        here.copy_(log_sum_over(group, here, base=2))


@triton.jit
def prior_of(b_log_pbar, log_c, FORWARD: tl.constexpr):
    """Return a code's term of the prior from log2 pbar: pbar ln(c pbar), or -ln(c pbar) / c."""
    b_ratio = LN_2 * (b_log_pbar + log_c)
    if FORWARD:
        return -tl.exp2(-log_c) * b_ratio
    return tl.exp2(b_log_pbar) * b_ratio


@triton.jit
def prior_gradient(b_log_p, b_p, b_log_pbar, log_c, FORWARD: tl.constexpr):
    """Return P g from log2 P, P and log2 pbar."""
    if FORWARD:
        return -tl.exp2(b_log_p - b_log_pbar - log_c)
    return b_p * (LN_2 * (b_log_pbar + log_c))


@triton.jit
def log_assignments(p_d, p_tile_max, p_max, p_sum, o_row, m_row, o_code, i_view, i_tile, n, width, tiles):
    """Return log2 P, float32 [rows, codes], of rows of a view and codes of one tile; absent rows give arbitrary finite values."""
    o_state = i_view * n + o_row
    p_tile = p_tile_max + tl.cast(i_view * tiles + i_tile, tl.int64) * n + o_row
    b_shift = tl.load(p_tile, mask=m_row, other=0.0) - tl.load(p_max + o_state, mask=m_row, other=0.0)
    b_shift -= tl.log2(tl.load(p_sum + o_state, mask=m_row, other=1.0))
    p_logits = p_d + o_state[:, None].to(tl.int64) * width + o_code[None, :]
    return tl.load(p_logits, mask=m_row[:, None], other=0.0).to(tl.float32) + b_shift[:, None]


@triton.jit
def accumulated(b_top, b_total, b_x):
    """Add a term x to each running log-sum-exp (maximum, sum of exponentials relative to it) by one exponential. A NaN stays."""
    b_e = tl.exp2(-tl.abs(b_x - b_top))
    b_up = b_x > b_top
    return tl.where(b_up, b_x, b_top), tl.where(b_up, b_total * b_e + 1.0, b_total + b_e)


@triton.jit
def columns_kernel(
    p_d,  # fp16 [2, n, width]
    p_tile_max,  # [2, tiles, n]
    p_max,  # [2, n]
    p_sum,  # [2, n]
    p_argmax,  # int32 [2, n]
    p_log_pbar,  # [2, padded_c], at the range's first code
    p_prior,  # partial prior [2, strips of c], at the range's first strip
    p_used,  # codes in use [strips of c], likewise; or, for a group, a flag a code [padded_c]
    p_rows,  # partial a [strips, 2, n]
    n,
    count,
    first,
    width,
    tiles,
    padded_c,
    all_strips,
    log_rows,
    log_c,
    FORWARD: tl.constexpr,
    SUMS: tl.constexpr,
    TERMS: tl.constexpr,
    STRIP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_strip, i_view = tl.program_id(0), tl.program_id(1)
    o_code = i_strip * STRIP + tl.arange(0, STRIP)
    m_code = o_code < count
    i_tile = i_strip * STRIP // TILE
    p_log = p_log_pbar + i_view * padded_c + o_code
    if SUMS:
        # Finite, so that the first term and the terms of absent rows (-inf) need no special case.
        b_tops = tl.full((ROWS, STRIP), -3.0e38, tl.float32)
        b_totals = tl.zeros((ROWS, STRIP), tl.float32)
        for start in range(0, n, ROWS):
            o_row = start + tl.arange(0, ROWS)
            m_row = o_row < n
            b_log_p = log_assignments(
                p_d, p_tile_max, p_max, p_sum, o_row, m_row, o_code, i_view, i_tile, n, width, tiles
            )
            b_log_p = tl.where(m_row[:, None], b_log_p, float("-inf"))
            b_tops, b_totals = accumulated(b_tops, b_totals, b_log_p)
        b_top = tl.max(b_tops, 0)
        b_total = tl.sum(b_totals * tl.exp2(b_tops - b_top[None, :]), 0)
        b_log_pbar = b_top + tl.log2(b_total) - log_rows
        tl.store(p_log, b_log_pbar, mask=m_code)
        if i_view == 0:
            b_hits = tl.zeros((ROWS, STRIP), tl.int32)
            for start in range(0, 2 * n, ROWS):
                o_row = start + tl.arange(0, ROWS)
                b_at = tl.load(p_argmax + o_row, mask=o_row < 2 * n, other=-1)
                b_hits |= (b_at[:, None] == (first + o_code)[None, :]).to(tl.int32)
            b_used = tl.max(b_hits, 0)
            if TERMS:
                tl.store(p_used + i_strip, tl.sum(b_used, 0))
            else:
                tl.store(p_used + o_code, b_used, mask=m_code)
    else:
        b_log_pbar = tl.load(p_log, mask=m_code, other=0.0)
    if TERMS:
        b_term = tl.where(m_code, prior_of(b_log_pbar, log_c, FORWARD), 0.0)
        tl.store(p_prior + i_view * all_strips + i_strip, tl.sum(b_term, 0))
        for start in range(0, n, ROWS):
            o_row = start + tl.arange(0, ROWS)
            m_row = o_row < n
            b_log_p = log_assignments(
                p_d, p_tile_max, p_max, p_sum, o_row, m_row, o_code, i_view, i_tile, n, width, tiles
            )
            b_pg = prior_gradient(b_log_p, tl.exp2(b_log_p), b_log_pbar[None, :], log_c, FORWARD)
            b_a = tl.sum(tl.where(m_code[None, :], b_pg, 0.0), 1)
            tl.store(p_rows + i_strip.to(tl.int64) * 2 * n + i_view * n + o_row, b_a, mask=m_row)


def columns(
    d: torch.Tensor,
    tile_maximum: torch.Tensor,
    rows: RowState,
    state: ColumnState,
    partial: torch.Tensor,
    first: int,
    count: int,
    scales: Scales,
    sums: bool,
    terms: bool,
) -> None:
    """Compute log2 pbar (`sums`), the prior and a (`terms`) of the columns [first, first + count) with logits d (2, N, width).

    partial: a of each strip, (strips, 2, N). With `sums` alone, log2 pbar is the share of this process, normalised by the rows
    of all processes; that of the group is the log-sum-exp of the shares. `used` then holds flags; with both, counts; with
    `terms` alone it is not touched.
    """
    _, n, width = d.shape
    strip = state.strip
    launch(
        columns_kernel,
        (ceil_div(count, strip), 2),
        d,
        tile_maximum,
        rows.maximum,
        rows.sum,
        rows.argmax,
        state.log_pbar[:, first:],
        state.prior[:, first // strip :],
        state.used[first if sums and not terms else first // strip :],
        partial,
        n,
        count,
        first,
        width,
        tile_maximum.shape[1],
        state.log_pbar.shape[1],
        state.strips,
        scales.log_rows,
        scales.log_c,
        FORWARD=scales.forward,
        SUMS=sums,
        TERMS=terms,
        STRIP=strip,
        TILE=TILE,
        ROWS=BLOCK // strip,
        num_warps=8,
    )
