"""Row statistics: the statistics of the tiles of codes are merged into those of all codes.

In units of log 2, with M_v = max_j u_v, y_v = u_v - M_v, s_v = sum_j exp2(y_v) and log2 P_v = y_v - log2 s_v, views v = 1, 2,

    x_1 = E_{P_1}[y_2], x_2 = E_{P_2}[y_1];        C_12 = ln 2 mean_i(log2 s_1 - x_2), C_21 likewise.

Fixed partial results are merged in a fixed order, without atomics: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.loss.logits import TileStatistics

MERGED_ROWS = 8
MERGED_TILES = 64


class RowState(NamedTuple):
    """Per view and row, (2, N) float32: M, s, sum_j exp2(y_v) y_other (x is this over s), argmax (int32), a = sum_j P g."""

    maximum: torch.Tensor
    sum: torch.Tensor
    cross: torch.Tensor
    argmax: torch.Tensor
    a: torch.Tensor

    @staticmethod
    def empty(n: int, device: torch.device) -> RowState:
        maximum, total, cross, a = (torch.empty(2, n, dtype=torch.float32, device=device) for _ in range(4))
        return RowState(maximum, total, cross, torch.empty(2, n, dtype=torch.int32, device=device), a)


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
    """Merge maxima (2, tiles, N) and statistics of the tiles of a range into those of the rows, or set them if `fresh`."""
    _, count, n = maxima.shape
    launch(
        merge_rows_kernel,
        (ceil_div(n, MERGED_ROWS),),
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
