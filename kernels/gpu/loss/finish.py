"""The end of the forward pass: a summed over the codes, the loss and its terms, and a scale for the gradient of each row.

dZ is kept in fp16 for the tensor cores, so each row is scaled by a bound on its largest entry. One launch does all three. With
several ranges of codes each range adds its part of a, and the last one does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.loss.columns import ColumnState, Scales
from falcon_fast.kernels.gpu.loss.rows import RowState
from falcon_fast.kernels.gpu.tiles import LN_2, paired_row

FINISHED_ROWS = 16


class Readings(NamedTuple):
    """0-d tensors: loss, prior, invariance (float32) and codes in use (int64)."""

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor

    @staticmethod
    def empty(device: torch.device) -> Readings:
        loss, prior, invariance = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
        return Readings(loss, prior, invariance, torch.empty((), dtype=torch.int64, device=device))


class Parts(NamedTuple):
    """A gradient before its parts are added up: parts (splits, 2 N, f) float32 and the quanta of the rows (2, 2, N); see
    `combine`."""

    parts: torch.Tensor
    quantum: torch.Tensor


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
    """Return a bound on 2 N |dZ_ij| over the codes j, for rows of a view.

    |dZ| 2 N <= P (|g - a| + beta (1 + |x| + |y of the other view|)) + beta P_other, and every P is at most 1 / s. A logit is at
    most the L1 norm over tau. P |g| <= P (ln c + ln N + 1) for the reverse prior (pbar >= P / N, and p ln(1/p) has its maximum
    at 1/e), and <= N / c for the forward one. A bound that is a thousand times too large does no harm: fp16 has 30 binades.
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
    """Store the loss and its terms, from the partial sums over the codes and the statistics of the rows (one program)."""
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
    """Add the partial a (strips, 2, N) of a range of codes to that of the rows; after the last range, write readings and quantum.

    quantum (2, 2, N): the value in dH of one unit of a row's fp16 dZ, and the number of units of 2 N dZ = 1. The largest |dZ|
    of a row takes at most `target` units.
    """
    strips, _, n = partial.shape
    launch(
        finish_kernel,
        (ceil_div(n, FINISHED_ROWS), 2),
        partial,
        rows.a,
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
