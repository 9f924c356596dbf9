"""From tiles of stored logits to the loss: row statistics merged, column statistics, and what the gradient needs of each row.

Everything is float32, in units of log 2 and in the log domain. With M_v = max_j u_v, s_v = sum_j exp2(u_v - M_v) and
y_v = u_v - M_v, views v = 1, 2, and log2 P_v = y_v - log2 s_v:

    rows      x_1 = E_{P_1}[y_2], x_2 = E_{P_2}[y_1];  C_12 = ln 2 mean_i(log2 s_1 - x_2), C_21 likewise
    columns   log2 pbar_j = logsum2_i(log2 P_ij) - log2 N, online over blocks of rows; g_j = ln(c pbar_j) (reverse prior)
              or -1 / (c pbar_j) (forward), and P_ij g_j is formed as P_ij times a finite number (reverse) or as
              -exp2(log2 P_ij - log2 pbar_j) / c (forward), which cannot divide what has underflowed
    finish    a_v = sum_j P_ij g_j, the loss and its terms, and a bound of |dZ| in each row, by which the gradient is scaled
              to fit fp16 (its product with the codes runs on the tensor cores)

Merges go over fixed partial results in a fixed order: no atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from falcon_fast.kernels.gpu.launch import launch
from falcon_fast.kernels.gpu.logits import TileStatistics
from falcon_fast.kernels.gpu.plan import STRIP, TILE
from falcon_fast.kernels.gpu.tiles import LN_2, paired_row

MERGED_ROWS = 8
MERGED_TILES = 64
COLUMN_ROWS = 64
FINISHED_ROWS = 16


class RowState(NamedTuple):
    """Per view and row (2, N): M, s, sum_j exp2(y_v) y_other (x is it over s), argmax (int32), and a."""

    maximum: torch.Tensor
    sum: torch.Tensor
    cross: torch.Tensor
    argmax: torch.Tensor
    prior: torch.Tensor

    @staticmethod
    def empty(n: int, device: torch.device) -> RowState:
        maximum, total, cross, prior = (torch.empty(2, n, device=device) for _ in range(4))
        return RowState(maximum, total, cross, torch.empty(2, n, dtype=torch.int32, device=device), prior)


@triton.jit
def merge_rows_kernel(
    p_tile_max,  # [2, tiles, n], and so on
    p_tile_sum,
    p_tile_cross,
    p_tile_argmax,
    p_max,  # [2, n], and so on
    p_sum,
    p_cross,
    p_argmax,
    n,
    tiles,
    FRESH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    view = tl.cast(tiles, tl.int64) * n
    b_max1 = tl.full((ROWS,), float("-inf"), tl.float32)
    b_max2 = tl.full((ROWS,), float("-inf"), tl.float32)
    if not FRESH:
        b_max1 = tl.load(p_max + o_row, mask=m_row, other=0.0)
        b_max2 = tl.load(p_max + n + o_row, mask=m_row, other=0.0)
    b_old1 = b_max1
    b_old2 = b_max2
    for start in range(0, tiles, TILES):
        o_tile = start + tl.arange(0, TILES)
        o = o_tile[:, None].to(tl.int64) * n + o_row[None, :]
        m = (o_tile < tiles)[:, None] & m_row[None, :]
        b_max1 = tl.maximum(b_max1, tl.max(tl.load(p_tile_max + o, mask=m, other=float("-inf")), 0))
        b_max2 = tl.maximum(b_max2, tl.max(tl.load(p_tile_max + view + o, mask=m, other=float("-inf")), 0))

    b_sum1 = tl.zeros((ROWS,), tl.float32)
    b_sum2 = tl.zeros((ROWS,), tl.float32)
    b_cross1 = tl.zeros((ROWS,), tl.float32)
    b_cross2 = tl.zeros((ROWS,), tl.float32)
    b_at1 = tl.full((ROWS,), 2147483647, tl.int32)
    b_at2 = tl.full((ROWS,), 2147483647, tl.int32)
    if not FRESH:
        b_before1 = tl.load(p_sum + o_row, mask=m_row, other=0.0)
        b_before2 = tl.load(p_sum + n + o_row, mask=m_row, other=0.0)
        b_sum1 = tl.exp2(b_old1 - b_max1) * b_before1
        b_sum2 = tl.exp2(b_old2 - b_max2) * b_before2
        b_crossed1 = tl.load(p_cross + o_row, mask=m_row, other=0.0) + (b_old2 - b_max2) * b_before1
        b_crossed2 = tl.load(p_cross + n + o_row, mask=m_row, other=0.0) + (b_old1 - b_max1) * b_before2
        b_cross1 = tl.exp2(b_old1 - b_max1) * b_crossed1
        b_cross2 = tl.exp2(b_old2 - b_max2) * b_crossed2
        b_at1 = tl.where(b_old1 == b_max1, tl.load(p_argmax + o_row, mask=m_row, other=0), b_at1)
        b_at2 = tl.where(b_old2 == b_max2, tl.load(p_argmax + n + o_row, mask=m_row, other=0), b_at2)
    for start in range(0, tiles, TILES):
        o_tile = start + tl.arange(0, TILES)
        o = o_tile[:, None].to(tl.int64) * n + o_row[None, :]
        m = (o_tile < tiles)[:, None] & m_row[None, :]
        b_shift1 = tl.load(p_tile_max + o, mask=m, other=float("-inf")) - b_max1[None, :]
        b_shift2 = tl.load(p_tile_max + view + o, mask=m, other=float("-inf")) - b_max2[None, :]
        b_part1 = tl.load(p_tile_sum + o, mask=m, other=0.0)
        b_part2 = tl.load(p_tile_sum + view + o, mask=m, other=0.0)
        b_mixed1 = tl.load(p_tile_cross + o, mask=m, other=0.0) + tl.where(m, b_shift2 * b_part1, 0.0)
        b_mixed2 = tl.load(p_tile_cross + view + o, mask=m, other=0.0) + tl.where(m, b_shift1 * b_part2, 0.0)
        b_sum1 += tl.sum(tl.exp2(b_shift1) * b_part1, 0)
        b_sum2 += tl.sum(tl.exp2(b_shift2) * b_part2, 0)
        b_cross1 += tl.sum(tl.exp2(b_shift1) * b_mixed1, 0)
        b_cross2 += tl.sum(tl.exp2(b_shift2) * b_mixed2, 0)
        b_found1 = tl.load(p_tile_argmax + o, mask=m, other=2147483647)
        b_found2 = tl.load(p_tile_argmax + view + o, mask=m, other=2147483647)
        b_at1 = tl.minimum(b_at1, tl.min(tl.where(b_shift1 == 0, b_found1, 2147483647), 0))
        b_at2 = tl.minimum(b_at2, tl.min(tl.where(b_shift2 == 0, b_found2, 2147483647), 0))
    tl.store(p_max + o_row, b_max1, mask=m_row)
    tl.store(p_max + n + o_row, b_max2, mask=m_row)
    tl.store(p_sum + o_row, b_sum1, mask=m_row)
    tl.store(p_sum + n + o_row, b_sum2, mask=m_row)
    tl.store(p_cross + o_row, b_cross1, mask=m_row)
    tl.store(p_cross + n + o_row, b_cross2, mask=m_row)
    tl.store(p_argmax + o_row, b_at1, mask=m_row)
    tl.store(p_argmax + n + o_row, b_at2, mask=m_row)


def merge_rows(maxima: torch.Tensor, tiles: TileStatistics, rows: RowState, fresh: bool) -> None:
    """Merge the maxima (2, tiles, N) and statistics of a range's tiles into the rows' (overwritten where `fresh`)."""
    _, count, n = maxima.shape
    launch(
        merge_rows_kernel,
        (triton.cdiv(n, MERGED_ROWS),),
        maxima,
        tiles.sum,
        tiles.cross,
        tiles.argmax,
        rows.maximum,
        rows.sum,
        rows.cross,
        rows.argmax,
        n,
        count,
        FRESH=fresh,
        ROWS=MERGED_ROWS,
        TILES=MERGED_TILES,
        num_warps=4,
    )


@triton.jit
def prior_of(b_log_pbar, log_c, FORWARD: tl.constexpr):
    """A code's term of the prior, from log2 pbar: pbar ln(c pbar), or -ln(c pbar) / c."""
    b_ratio = LN_2 * (b_log_pbar + log_c)
    if FORWARD:
        return -tl.exp2(-log_c) * b_ratio
    return tl.exp2(b_log_pbar) * b_ratio


@triton.jit
def prior_gradient(b_log_p, b_p, b_log_pbar, log_c, FORWARD: tl.constexpr):
    """P g, from log2 P, P and log2 pbar."""
    if FORWARD:
        return -tl.exp2(b_log_p - b_log_pbar - log_c)
    return b_p * (LN_2 * (b_log_pbar + log_c))


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
    i_strip = tl.program_id(0)
    o_code = i_strip * STRIP + tl.arange(0, STRIP)
    m_code = o_code < count
    i_tile = i_strip * STRIP // TILE
    b_used = tl.zeros((STRIP,), tl.int32)
    for i_view in tl.static_range(2):
        p_log = p_log_pbar + i_view * padded_c + o_code
        o_view = i_view * n
        if SUMS:
            b_top = tl.full((STRIP,), float("-inf"), tl.float32)
            b_total = tl.zeros((STRIP,), tl.float32)
            for start in range(0, n, ROWS):
                o_row = start + tl.arange(0, ROWS)
                m_row = o_row < n
                o_state = o_view + o_row
                b_shift = tl.load(
                    p_tile_max + tl.cast(i_view * tiles + i_tile, tl.int64) * n + o_row, mask=m_row, other=0.0
                )
                b_shift -= tl.load(p_max + o_state, mask=m_row, other=0.0)
                b_shift -= tl.log2(tl.load(p_sum + o_state, mask=m_row, other=1.0))
                b_d = tl.load(
                    p_d + o_state[:, None].to(tl.int64) * width + o_code[None, :], mask=m_row[:, None], other=0.0
                )
                b_log_p = b_d.to(tl.float32) + b_shift[:, None]
                b_log_p = tl.where(m_row[:, None], b_log_p, float("-inf"))
                b_new = tl.maximum(b_top, tl.max(b_log_p, 0))
                b_total = b_total * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_log_p - b_new[None, :]), 0)
                b_top = b_new
                b_at = tl.load(p_argmax + o_state, mask=m_row, other=-1)
                b_hit = (b_at[:, None] == (first + o_code)[None, :]).to(tl.int32)
                b_used = tl.maximum(b_used, tl.max(b_hit, 0))
            b_log_pbar = b_top + tl.log2(b_total) - log_rows
            tl.store(p_log, b_log_pbar, mask=m_code)
        else:
            b_log_pbar = tl.load(p_log, mask=m_code, other=0.0)
        if TERMS:
            b_term = tl.where(m_code, prior_of(b_log_pbar, log_c, FORWARD), 0.0)
            tl.store(p_prior + i_view * all_strips + i_strip, tl.sum(b_term, 0))
            for start in range(0, n, ROWS):
                o_row = start + tl.arange(0, ROWS)
                m_row = o_row < n
                o_state = o_view + o_row
                b_shift = tl.load(
                    p_tile_max + tl.cast(i_view * tiles + i_tile, tl.int64) * n + o_row, mask=m_row, other=0.0
                )
                b_shift -= tl.load(p_max + o_state, mask=m_row, other=0.0)
                b_shift -= tl.log2(tl.load(p_sum + o_state, mask=m_row, other=1.0))
                b_d = tl.load(
                    p_d + o_state[:, None].to(tl.int64) * width + o_code[None, :], mask=m_row[:, None], other=0.0
                )
                b_log_p = b_d.to(tl.float32) + b_shift[:, None]
                b_pg = prior_gradient(b_log_p, tl.exp2(b_log_p), b_log_pbar[None, :], log_c, FORWARD)
                b_a = tl.sum(tl.where(m_code[None, :], b_pg, 0.0), 1)
                tl.store(p_rows + i_strip.to(tl.int64) * 2 * n + o_state, b_a, mask=m_row)
    if SUMS and TERMS:
        tl.store(p_used + i_strip, tl.sum(b_used, 0))
    elif SUMS:
        tl.store(p_used + o_code, b_used, mask=m_code)


@triton.jit
def row_bound(
    p_sum,
    p_cross,
    p_norm,
    b_a,
    o_row,
    m_row,
    i_view,
    n,
    padded_n,
    log_c,
    log_rows,
    beta,
    tau,
    FORWARD: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """A bound of 2 N |dZ_ij| over the codes j, for rows of a view.

    |dZ| 2 N <= P (|g - a| + beta (1 + |x| + |y of the other view|)) + beta P_other, and every P is at most 1 / s. A logit is at
    most the L1 norm over tau. P |g| <= P (ln c + ln N + 1) for the reverse prior (pbar >= P / N, and p ln(1/p) has its maximum
    at 1/e), and <= N / c for the forward one. A bound a thousand times too large costs nothing: fp16 has 30 binades.
    """
    o = i_view * n + o_row
    o_other = (1 - i_view) * n + o_row
    b_peak = 1.0 / tl.load(p_sum + o, mask=m_row, other=1.0)
    b_peak_other = 1.0 / tl.load(p_sum + o_other, mask=m_row, other=1.0)
    b_x = LN_2 * tl.load(p_cross + o, mask=m_row, other=0.0) * b_peak
    o_norm = (1 - i_view) * padded_n + o_row
    if PAIRED:
        o_norm = paired_row(1 - i_view, o_row)
    b_range = 2.0 / tau * tl.load(p_norm + o_norm, mask=m_row, other=0.0)
    b_free = tl.abs(b_a) + beta * (1.0 + tl.abs(b_x) + b_range)
    if FORWARD:
        b_bound = tl.exp2(log_rows - log_c) + b_peak * b_free
    else:
        b_bound = b_peak * (LN_2 * (log_c + log_rows) + 1.0 + b_free)
    return b_bound + beta * b_peak_other


@triton.jit
def store_readings(
    p_sum,
    p_cross,
    p_prior,
    p_used,
    p_loss,
    p_prior_term,
    p_invariance,
    p_codes_used,
    n,
    all_strips,
    beta,
    COUNT: tl.constexpr,
):
    """The loss and its terms from the codes' partial sums and the rows, by one program."""
    prior = 0.0
    for start in range(0, 2 * all_strips, 1024):
        o_term = start + tl.arange(0, 1024)
        prior += 0.5 * tl.sum(tl.load(p_prior + o_term, mask=o_term < 2 * all_strips, other=0.0), 0)
    invariance = 0.0
    for start in range(0, n, 256):
        o_row = start + tl.arange(0, 256)
        m = o_row < n
        b_sum1 = tl.load(p_sum + o_row, mask=m, other=1.0)
        b_sum2 = tl.load(p_sum + n + o_row, mask=m, other=1.0)
        b_cross = tl.load(p_cross + o_row, mask=m, other=0.0) / b_sum1
        b_cross += tl.load(p_cross + n + o_row, mask=m, other=0.0) / b_sum2
        invariance += tl.sum(tl.log2(b_sum1) + tl.log2(b_sum2) - b_cross, 0)
    invariance *= 0.5 * LN_2 / n
    tl.store(p_prior_term, prior)
    tl.store(p_invariance, invariance)
    tl.store(p_loss, prior + beta * invariance)
    if COUNT:
        used = 0
        for start in range(0, all_strips, 1024):
            o_strip = start + tl.arange(0, 1024)
            used += tl.sum(tl.load(p_used + o_strip, mask=o_strip < all_strips, other=0), 0)
        tl.store(p_codes_used, tl.cast(used, tl.int64))


@triton.jit
def finish_kernel(
    p_partial,  # a of a range's strips [strips, 2, n]
    p_a,  # [2, n]
    p_sum,
    p_cross,
    p_norm,  # L1 norms of the embeddings [2 padded_n]
    p_quantum,  # [2, 2, n]: what one unit of a row's fp16 dZ is worth in dH tau, and units per 2 N dZ
    p_prior,  # [2, all_strips]
    p_used,  # int32 [all_strips]
    p_loss,
    p_prior_term,
    p_invariance,
    p_codes_used,
    n,
    padded_n,
    strips,
    all_strips,
    log_c,
    log_rows,
    beta,
    tau,
    FORWARD: tl.constexpr,
    FRESH: tl.constexpr,
    LAST: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRED: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block, i_view = tl.program_id(0), tl.program_id(1)
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o = i_view * n + o_row
    b_a = tl.zeros((ROWS,), tl.float32)
    for start in range(0, strips, BLOCK):
        o_strip = start + tl.arange(0, BLOCK)
        m = (o_strip < strips)[:, None] & m_row[None, :]
        b_a += tl.sum(tl.load(p_partial + o_strip[:, None].to(tl.int64) * 2 * n + o[None, :], mask=m, other=0.0), 0)
    if not FRESH:
        b_a += tl.load(p_a + o, mask=m_row, other=0.0)
    tl.store(p_a + o, b_a, mask=m_row)
    if LAST:
        b_bound = row_bound(
            p_sum, p_cross, p_norm, b_a, o_row, m_row, i_view, n, padded_n, log_c, log_rows, beta, tau, FORWARD, PAIRED
        )
        tl.store(p_quantum + o, b_bound / (TARGET * 2.0 * n * tau), mask=m_row)
        tl.store(p_quantum + 2 * n + o, TARGET / b_bound, mask=m_row)
        if i_block == 0 and i_view == 0:
            store_readings(
                p_sum,
                p_cross,
                p_prior,
                p_used,
                p_loss,
                p_prior_term,
                p_invariance,
                p_codes_used,
                n,
                all_strips,
                beta,
                COUNT,
            )


class Scales(NamedTuple):
    """The settings of a loss as the kernels take them; `log_rows` is of the rows of all processes, whose mean counts."""

    log_c: float
    log_rows: float
    beta: float
    tau: float
    forward: bool

    @staticmethod
    def of(n: int, c: int, tau: float, beta: float, prior: str, world_size: int) -> Scales:
        return Scales(math.log2(c), math.log2(n * world_size), beta, tau, prior == "forward")


class ColumnState:
    """What the sweep over the columns leaves: log2 pbar (2, c up to a multiple of 128), partial priors and codes in use by strip.

    For a group, `used` holds a flag a code instead, which the caller reduces over the processes.
    """

    def __init__(self, c: int, strip: int, grouped: bool, device: torch.device) -> None:
        padded_c = triton.cdiv(c, TILE) * TILE
        self.strip, self.strips = strip, triton.cdiv(c, strip)
        self.log_pbar = torch.empty(2, padded_c, device=device)
        self.prior = torch.empty(2, self.strips, device=device)
        self.used = torch.empty(padded_c if grouped else self.strips, dtype=torch.int32, device=device)


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
    """The columns [first, first + count) of the logits d (2, N, width): log2 pbar (`sums`), the prior and a (`terms`).

    partial: a of each strip, (strips, 2, N). With `sums` alone log2 pbar is this process's, less log2 of all rows; the group's
    is a log-sum-exp of those. `used` is then flags; with both it is counts; with `terms` alone it is not touched.
    """
    _, n, width = d.shape
    launch(
        columns_kernel,
        (triton.cdiv(count, STRIP),),
        d,
        tile_maximum,
        rows.maximum,
        rows.sum,
        rows.argmax,
        state.log_pbar[:, first:],
        state.prior[:, first // STRIP :],
        state.used[first if sums and not terms else first // STRIP :],
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
        STRIP=STRIP,
        TILE=TILE,
        ROWS=COLUMN_ROWS,
        num_warps=8,
    )


class Readings(NamedTuple):
    """0-d tensors: loss, prior, invariance (float32) and codes in use (int64)."""

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor

    @staticmethod
    def empty(device: torch.device) -> Readings:
        loss, prior, invariance = (torch.empty((), device=device) for _ in range(3))
        return Readings(loss, prior, invariance, torch.empty((), dtype=torch.int64, device=device))


def finish(
    partial: torch.Tensor,
    rows: RowState,
    norm: torch.Tensor,
    state: ColumnState,
    quantum: torch.Tensor,
    readings: Readings,
    scales: Scales,
    *,
    fresh: bool,
    last: bool,
    grouped: bool,
    paired: bool,
    target: float,
) -> None:
    """Add a range's partial a (strips, 2, N) to the rows'; after the last range also the readings and the rows' quanta.

    quantum (2, 2, N): what one unit of a row's fp16 dZ is worth in dH, and how many units 2 N dZ = 1 is: the largest |dZ| of a
    row takes at most `target` units.
    """
    strips, _, n = partial.shape
    launch(
        finish_kernel,
        (triton.cdiv(n, FINISHED_ROWS), 2),
        partial,
        rows.prior,
        rows.sum,
        rows.cross,
        norm,
        quantum,
        state.prior,
        state.used,
        *readings,
        n,
        norm.shape[0] // 2,
        strips,
        state.strips,
        scales.log_c,
        scales.log_rows,
        scales.beta,
        scales.tau,
        FORWARD=scales.forward,
        FRESH=fresh,
        LAST=last,
        COUNT=not grouped,
        PAIRED=paired,
        TARGET=target,
        ROWS=FINISHED_ROWS,
        BLOCK=64,
        num_warps=4,
    )


class Parts(NamedTuple):
    """A gradient before it is put together: parts (splits, 2 N, f) float32 and the rows' quanta (2, 2, N); see `combine`."""

    parts: torch.Tensor
    quantum: torch.Tensor


def log_sum_over(group: dist.ProcessGroup, log_sum: torch.Tensor) -> None:
    """In place: log2 of the sum over the group's processes of 2^log_sum (all-reduce of the maximum, then of the sum)."""
    maximum = log_sum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    total = torch.exp2(log_sum - maximum)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    torch.add(torch.log2(total), maximum, out=log_sum)


def count_used(used: torch.Tensor, c: int, group: dist.ProcessGroup) -> torch.Tensor:
    """How many codes any process of the group uses, from a flag a code."""
    flags = used[:c]
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return flags.sum()
