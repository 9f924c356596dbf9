"""The loss for Hadamard codes: every sweep computes the logits again by a fast transform (transform.py); none are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.collectives import count_flagged
from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.loss.columns import (
    ColumnState,
    Scales,
    accumulated,
    prior_gradient,
    prior_of,
)
from falcon_fast.kernels.gpu.loss.embeddings import cast_embeddings
from falcon_fast.kernels.gpu.loss.finish import Parts, Readings, finish
from falcon_fast.kernels.gpu.loss.gradient import logit_gradients, row_terms
from falcon_fast.kernels.gpu.loss.logits import TileStatistics
from falcon_fast.kernels.gpu.loss.plan import HadamardPlan
from falcon_fast.kernels.gpu.loss.rows import RowState, merge_rows
from falcon_fast.kernels.gpu.loss.transform import back, block_flips, flipped_rows, transformed
from falcon_fast.kernels.gpu.tiles import hadamard_columns, hadamard_matrix
from falcon_fast.kernels.spec import LossSpec

# Units that the largest |dZ| of a row may take: the first product of the transform back adds up to 64 of them in fp16.
TARGET = 512.0


@triton.jit
def rows_kernel(
    p_h,  # fp16 [2, padded_n, F]
    p_scale,  # [2, padded_n]
    p_words,  # int32 [blocks, F / 32]
    p_tile_max,  # [2, splits, n]
    p_tile_sum,
    p_tile_cross,
    p_tile_argmax,
    n,
    padded_n,
    blocks,
    blocks_per_split,
    splits,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    F: tl.constexpr = A * B
    i_rows, i_split = tl.program_id(0), tl.program_id(1)
    o_row = i_rows * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    b_h_b = hadamard_matrix(B)
    b_h_a = hadamard_matrix(A)
    o_place = tl.arange(0, F)
    b_scale1 = tl.load(p_scale + o_row, mask=m_row, other=0.0)
    b_scale2 = tl.load(p_scale + padded_n + o_row, mask=m_row, other=0.0)
    b_max1 = tl.full((ROWS,), float("-inf"), tl.float32)
    b_max2 = tl.full((ROWS,), float("-inf"), tl.float32)
    b_sum1 = tl.zeros((ROWS,), tl.float32)
    b_sum2 = tl.zeros((ROWS,), tl.float32)
    b_cross1 = tl.zeros((ROWS,), tl.float32)
    b_cross2 = tl.zeros((ROWS,), tl.float32)
    b_at1 = tl.full((ROWS,), 2147483647, tl.int32)
    b_at2 = tl.full((ROWS,), 2147483647, tl.int32)
    for i_block in range(i_split * blocks_per_split, tl.minimum((i_split + 1) * blocks_per_split, blocks)):
        b_flips = block_flips(p_words, i_block, F)
        b_x1 = flipped_rows(p_h, o_row, m_row, b_flips, ROWS, F)
        b_x2 = flipped_rows(p_h + tl.cast(padded_n, tl.int64) * F, o_row, m_row, b_flips, ROWS, F)
        b_z1 = transformed(b_x1, b_h_b, b_h_a, ROWS, A, B, B) * b_scale1[:, None]
        b_z2 = transformed(b_x2, b_h_b, b_h_a, ROWS, A, B, B) * b_scale2[:, None]
        b_top1 = tl.max(b_z1, 1)
        b_top2 = tl.max(b_z2, 1)
        b_new1 = tl.maximum(b_max1, b_top1)
        b_new2 = tl.maximum(b_max2, b_top2)
        b_found1 = i_block * F + tl.min(tl.where(b_z1 == b_top1[:, None], o_place[None, :], F), 1)
        b_found2 = i_block * F + tl.min(tl.where(b_z2 == b_top2[:, None], o_place[None, :], F), 1)
        b_at1 = tl.where(b_top1 > b_max1, b_found1, b_at1)
        b_at2 = tl.where(b_top2 > b_max2, b_found2, b_at2)
        b_y1 = b_z1 - b_new1[:, None]
        b_y2 = b_z2 - b_new2[:, None]
        b_before1 = tl.exp2(b_max1 - b_new1)
        b_before2 = tl.exp2(b_max2 - b_new2)
        # In the first block this is -inf - (-inf), and there is no sum to move.
        b_moved1 = tl.where(b_sum1 > 0, (b_max2 - b_new2) * b_sum1, 0.0)
        b_moved2 = tl.where(b_sum2 > 0, (b_max1 - b_new1) * b_sum2, 0.0)
        b_e = tl.exp2(b_y1)
        b_cross1 = b_before1 * (b_cross1 + b_moved1) + tl.sum(b_e * b_y2, 1)
        b_sum1 = b_before1 * b_sum1 + tl.sum(b_e, 1)
        b_e = tl.exp2(b_y2)
        b_cross2 = b_before2 * (b_cross2 + b_moved2) + tl.sum(b_e * b_y1, 1)
        b_sum2 = b_before2 * b_sum2 + tl.sum(b_e, 1)
        b_max1 = b_new1
        b_max2 = b_new2
    o_1 = i_split.to(tl.int64) * n + o_row
    o_2 = o_1 + tl.cast(splits, tl.int64) * n
    tl.store(p_tile_max + o_1, b_max1, mask=m_row)
    tl.store(p_tile_max + o_2, b_max2, mask=m_row)
    tl.store(p_tile_sum + o_1, b_sum1, mask=m_row)
    tl.store(p_tile_sum + o_2, b_sum2, mask=m_row)
    tl.store(p_tile_cross + o_1, b_cross1, mask=m_row)
    tl.store(p_tile_cross + o_2, b_cross2, mask=m_row)
    tl.store(p_tile_argmax + o_1, b_at1, mask=m_row)
    tl.store(p_tile_argmax + o_2, b_at2, mask=m_row)


@triton.jit
def columns_kernel(
    p_h,
    p_scale,
    p_words,
    p_max,  # [2, n]
    p_sum,  # [2, n]
    p_argmax,  # int32 [2, n]
    p_log_pbar,  # [2, padded_c]
    p_prior,  # [2, strips]
    p_used,  # int32 [strips]; or, for a group, a flag a code [padded_c]
    p_rows,  # partial a [strips, 2, n]
    n,
    padded_n,
    padded_c,
    strips,
    log_rows,
    log_c,
    FORWARD: tl.constexpr,
    SUMS: tl.constexpr,
    TERMS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    F: tl.constexpr = A * B
    i_strip, i_view = tl.program_id(0), tl.program_id(1)
    i_block, i_part = i_strip // (B // WIDTH), i_strip % (B // WIDTH)
    b_h_b = hadamard_columns(i_part * WIDTH, B, WIDTH)
    b_h_a = hadamard_matrix(A)
    o_place = i_strip * (WIDTH * A) + tl.arange(0, WIDTH * A)
    b_flips = block_flips(p_words, i_block, F)
    p_view = p_h + i_view * tl.cast(padded_n, tl.int64) * F
    p_log = p_log_pbar + i_view * padded_c + o_place
    if SUMS:
        b_tops = tl.full((ROWS, WIDTH * A), -3.0e38, tl.float32)
        b_totals = tl.zeros((ROWS, WIDTH * A), tl.float32)
        for start in range(0, n, ROWS):
            o_row = start + tl.arange(0, ROWS)
            m_row = o_row < n
            o = i_view * n + o_row
            b_shift = tl.load(p_max + o, mask=m_row, other=0.0) + tl.log2(tl.load(p_sum + o, mask=m_row, other=1.0))
            b_scale = tl.load(p_scale + i_view * padded_n + o_row, mask=m_row, other=0.0)
            b_x = flipped_rows(p_view, o_row, m_row, b_flips, ROWS, F)
            b_z = transformed(b_x, b_h_b, b_h_a, ROWS, A, B, WIDTH)
            b_log_p = tl.where(m_row[:, None], b_z * b_scale[:, None] - b_shift[:, None], float("-inf"))
            b_tops, b_totals = accumulated(b_tops, b_totals, b_log_p)
        b_top = tl.max(b_tops, 0)
        b_total = tl.sum(b_totals * tl.exp2(b_tops - b_top[None, :]), 0)
        b_log_pbar = b_top + tl.log2(b_total) - log_rows
        tl.store(p_log, b_log_pbar)
        if i_view == 0:
            b_used = tl.zeros((WIDTH * A,), tl.int32)
            for start in range(0, 2 * n, ROWS):
                o_row = start + tl.arange(0, ROWS)
                b_at = tl.load(p_argmax + o_row, mask=o_row < 2 * n, other=-1)
                b_used = tl.maximum(b_used, tl.max((b_at[:, None] == o_place[None, :]).to(tl.int32), 0))
            if TERMS:
                tl.store(p_used + i_strip, tl.sum(b_used, 0))
            else:
                tl.store(p_used + o_place, b_used)
    else:
        b_log_pbar = tl.load(p_log)
    if TERMS:
        tl.store(p_prior + i_view * strips + i_strip, tl.sum(prior_of(b_log_pbar, log_c, FORWARD), 0))
        for start in range(0, n, ROWS):
            o_row = start + tl.arange(0, ROWS)
            m_row = o_row < n
            o = i_view * n + o_row
            b_shift = tl.load(p_max + o, mask=m_row, other=0.0) + tl.log2(tl.load(p_sum + o, mask=m_row, other=1.0))
            b_scale = tl.load(p_scale + i_view * padded_n + o_row, mask=m_row, other=0.0)
            b_x = flipped_rows(p_view, o_row, m_row, b_flips, ROWS, F)
            b_z = transformed(b_x, b_h_b, b_h_a, ROWS, A, B, WIDTH)
            b_log_p = b_z * b_scale[:, None] - b_shift[:, None]
            b_pg = prior_gradient(b_log_p, tl.exp2(b_log_p), b_log_pbar[None, :], log_c, FORWARD)
            tl.store(p_rows + i_strip.to(tl.int64) * 2 * n + o, tl.sum(b_pg, 1), mask=m_row)


@triton.jit
def gradient_kernel(
    p_h,
    p_scale,
    p_words,
    p_max,  # [2, n], and so on
    p_sum,
    p_cross,
    p_a,
    p_quantum,  # [2, 2, n]
    p_log_pbar,  # [2, padded_c]
    p_parts,  # [splits, 2 n, F]
    n,
    padded_n,
    padded_c,
    blocks,
    blocks_per_split,
    log_c,
    beta,
    FORWARD: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    F: tl.constexpr = A * B
    i_rows, i_split = tl.program_id(0), tl.program_id(1)
    o_row = i_rows * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    b_h_b = hadamard_matrix(B)
    b_h_a = hadamard_matrix(A)
    b_scale1 = tl.load(p_scale + o_row, mask=m_row, other=0.0)
    b_scale2 = tl.load(p_scale + padded_n + o_row, mask=m_row, other=0.0)
    b_max1 = tl.load(p_max + o_row, mask=m_row, other=0.0)
    b_max2 = tl.load(p_max + n + o_row, mask=m_row, other=0.0)
    b_log_s1, b_free1, b_units1 = row_terms(p_sum, p_cross, p_a, p_quantum, o_row, m_row, n, beta)
    b_log_s2, b_free2, b_units2 = row_terms(p_sum, p_cross, p_a, p_quantum, n + o_row, m_row, n, beta)
    b_dh1 = tl.zeros((ROWS, F), tl.float32)
    b_dh2 = tl.zeros((ROWS, F), tl.float32)
    for i_block in range(i_split * blocks_per_split, tl.minimum((i_split + 1) * blocks_per_split, blocks)):
        b_flips = block_flips(p_words, i_block, F)
        b_x1 = flipped_rows(p_h, o_row, m_row, b_flips, ROWS, F)
        b_x2 = flipped_rows(p_h + tl.cast(padded_n, tl.int64) * F, o_row, m_row, b_flips, ROWS, F)
        b_y1 = transformed(b_x1, b_h_b, b_h_a, ROWS, A, B, B) * b_scale1[:, None] - b_max1[:, None]
        b_y2 = transformed(b_x2, b_h_b, b_h_a, ROWS, A, B, B) * b_scale2[:, None] - b_max2[:, None]
        p_log = p_log_pbar + i_block * F + tl.arange(0, F)
        b_dz1, b_dz2 = logit_gradients(
            b_y1,
            b_y2,
            b_log_s1[:, None],
            b_log_s2[:, None],
            b_free1[:, None],
            b_free2[:, None],
            tl.load(p_log)[None, :],
            tl.load(p_log + padded_c)[None, :],
            log_c,
            beta,
            FORWARD,
        )
        b_sign = tl.where(b_flips < 0, -1.0, 1.0)
        b_dh1 += back(b_dz1 * b_units1[:, None], b_h_b, b_h_a, ROWS, A, B) * b_sign[None, :]
        b_dh2 += back(b_dz2 * b_units2[:, None], b_h_b, b_h_a, ROWS, A, B) * b_sign[None, :]
    p_out = p_parts + (i_split.to(tl.int64) * 2 * n + o_row)[:, None] * F + tl.arange(0, F)[None, :]
    tl.store(p_out, b_dh1, mask=m_row[:, None])
    tl.store(p_out + tl.cast(n, tl.int64) * F, b_dh2, mask=m_row[:, None])


def hadamard_loss(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, spec: LossSpec, plan: HadamardPlan
) -> tuple[Readings, Parts | None]:
    """Return loss and gradient parts of embeddings (N, f) for the packed signs `words` (c/f, ceil(f/32)) of the blocks."""
    n, f = h1.shape
    c, group, device, blocks = spec.c, spec.group, h1.device, spec.c // f
    scales = Scales.of(n, spec)
    h, scale, norm = cast_embeddings(h1, h2, spec.tau, n, f, paired=False)
    shape = {"A": plan.a, "B": plan.b}

    rows = RowState.empty(n, device)
    statistics = TileStatistics(n, plan.splits, device)
    maxima = torch.empty(2, plan.splits, n, dtype=torch.float32, device=device)
    per_split = -(-blocks // plan.splits)
    launch(
        rows_kernel,
        (ceil_div(n, plan.rows), plan.splits),
        h,
        scale,
        words,
        maxima,
        statistics.sum,
        statistics.cross,
        statistics.argmax,
        n,
        n,
        blocks,
        per_split,
        plan.splits,
        **shape,
        ROWS=plan.rows,
        num_warps=plan.warps,
        num_stages=1,
    )
    merge_rows(maxima, statistics, rows, fresh=True)

    state = ColumnState(c, plan.width * plan.a, group is not None, device)
    partial = torch.empty(state.strips, 2, n, dtype=torch.float32, device=device)

    def columns(sums: bool, terms: bool) -> None:
        launch(
            columns_kernel,
            (state.strips, 2),
            h,
            scale,
            words,
            rows.maximum,
            rows.sum,
            rows.argmax,
            state.log_pbar,
            state.prior,
            state.used,
            partial,
            n,
            n,
            state.log_pbar.shape[1],
            state.strips,
            scales.log_rows,
            scales.log_c,
            FORWARD=scales.forward,
            SUMS=sums,
            TERMS=terms,
            **shape,
            WIDTH=plan.width,
            ROWS=plan.column_rows,
            num_warps=plan.column_warps,
            num_stages=1,
        )

    if group is None:
        columns(sums=True, terms=True)
    else:
        columns(sums=True, terms=False)
        state.reduce_log_pbar(group, 0, c)
        columns(sums=False, terms=True)
    quantum, readings = torch.empty(2, 2, n, dtype=torch.float32, device=device), Readings.empty(device)
    finish(
        partial,
        rows,
        norm,
        state,
        quantum,
        readings,
        scales,
        fresh=True,
        last=True,
        grouped=group is not None,
        paired=False,
        target=TARGET,
    )
    if group is not None:
        readings = readings._replace(codes_used=count_flagged(state.used[:c], group))
    if not spec.with_gradient:
        return readings, None

    parts = torch.empty(plan.gradient_splits, 2 * n, f, dtype=torch.float32, device=device)
    launch(
        gradient_kernel,
        (ceil_div(n, plan.gradient_rows), plan.gradient_splits),
        h,
        scale,
        words,
        rows.maximum,
        rows.sum,
        rows.cross,
        rows.a,
        quantum,
        state.log_pbar,
        parts,
        n,
        n,
        state.log_pbar.shape[1],
        blocks,
        -(-blocks // plan.gradient_splits),
        scales.log_c,
        scales.beta,
        FORWARD=scales.forward,
        **shape,
        ROWS=plan.gradient_rows,
        num_warps=plan.warps,
        num_stages=1,
    )
    return readings, Parts(parts, quantum)
