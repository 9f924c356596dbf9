"""Logits of a dense dictionary for a range of codes, with their row statistics.

One program computes the logits of both views of a block of images and codes in one accumulator (rows in the paired order). For
each row and tile of 128 codes it then computes, in units of log 2,

    m = max_j u_ij                d_ij = fp16(u_ij - m), the stored logit
    s = sum_j exp2(d_ij)          x_1 = sum_j exp2(d_1) d_2, x_2 = sum_j exp2(d_2) d_1          argmax_j

The statistics are those of the stored logits, not of the exact ones: everything after is then exact for logits that are off by
half a unit in the last place of fp16, while mixing the two would leave differences of large numbers. A tile spans 128 codes: with
512 the distances to the maximum, and so the errors of fp16, are large enough to double the error of the gradient.

Codes are expanded from their bits between the products or, for many images on Hopper, to fp16 in memory beforehand. Expanding
through shared memory costs as much as the product: 2.03 ms for 1024 images, f = 2048 and 65536 codes on an H100 (270 TFLOP/s),
compared with 1.05 ms including 0.10 ms of expanding (525 TFLOP/s). With expanded codes as the left operand, from registers, it
takes 1.02 ms, but triton 3.6 then writes the signs of the next step into registers that unfinished products still read: one of
seven block shapes gave wrong logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.loss.expand import expand_codes
from falcon_fast.kernels.gpu.loss.plan import EXPANDED_CODES, TILE, LogitsTiles
from falcon_fast.kernels.gpu.tiles import ABSENT, expand_signs, not_below, split_views


@triton.jit
def logits_kernel(
    p_h,  # fp16 [2 padded_n, padded_f], paired
    p_scale,  # [2 padded_n]
    p_codes,  # int32 [codes, words_per_code], from the range's first code; or fp16 [codes, padded_f], from code `skipped` of it
    p_d,  # fp16 [2, n, width]
    p_max,  # [2, tiles, n]
    p_sum,  # [2, tiles, n]
    p_cross,  # [2, tiles, n]
    p_argmax,  # int32 [2, tiles, n]
    n,
    count,  # codes in the range
    first,  # the range's first code
    skipped,
    padded_f,
    words_per_code,
    width,
    tiles,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPANDED: tl.constexpr,
    TILE: tl.constexpr,
    STORE: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    TILES: tl.constexpr = CODES // TILE
    # Programs with the same codes follow one another: the codes are then in the cache, and the embeddings are there anyway.
    i_rows, i_codes = tl.program_id(0), skipped // CODES + tl.program_id(1)
    o_both = i_rows * (2 * ROWS) + tl.arange(0, 2 * ROWS)
    o_code = i_codes * CODES + tl.arange(0, CODES)
    o_depth = tl.arange(0, DEPTH)
    o_word = tl.arange(0, DEPTH // 32)
    p_a = p_h + o_both[:, None].to(tl.int64) * padded_f + o_depth[None, :]
    if EXPANDED:
        p_b = p_codes + (o_code - skipped)[None, :].to(tl.int64) * padded_f + o_depth[:, None]
    else:
        p_b = p_codes + o_code[:, None].to(tl.int64) * words_per_code + o_word[None, :]
    m_code = o_code < count
    b_u = tl.zeros((2 * ROWS, CODES), tl.float32)
    for start in range(0, padded_f, DEPTH):
        b_h = tl.load(p_a)
        if EXPANDED:
            b_u = tl.dot(b_h, tl.load(p_b), b_u)
            p_b += DEPTH
        else:
            b_words = tl.load(p_b, mask=m_code[:, None] & (start // 32 + o_word < words_per_code)[None, :], other=0)
            b_u = tl.dot(b_h, expand_signs(b_words).trans(), b_u)
            p_b += DEPTH // 32
        p_a += DEPTH
    b_u *= tl.load(p_scale + o_both)[:, None]
    b_u = tl.where(m_code[None, :], b_u, float("-inf"))

    b_u1, b_u2 = split_views(b_u, ROWS, CODES)
    b_u1 = b_u1.reshape(ROWS, TILES, TILE)
    b_u2 = b_u2.reshape(ROWS, TILES, TILE)
    b_max1 = tl.max(b_u1, 2)
    b_max2 = tl.max(b_u2, 2)
    b_d1 = not_below(b_u1 - b_max1[:, :, None], ABSENT).to(tl.float16)
    b_d2 = not_below(b_u2 - b_max2[:, :, None], ABSENT).to(tl.float16)

    o_row = i_rows * ROWS + tl.arange(0, ROWS)
    if STORE:
        p_out = p_d + o_row[:, None].to(tl.int64) * width + o_code[None, :]
        m_out = (o_row < n)[:, None] & (o_code < width)[None, :]
        tl.store(p_out, b_d1.reshape(ROWS, CODES), mask=m_out)
        tl.store(p_out + tl.cast(n, tl.int64) * width, b_d2.reshape(ROWS, CODES), mask=m_out)

    o_tile = i_codes * TILES + tl.arange(0, TILES)
    m_tile = (o_row < n)[:, None] & (o_tile < tiles)[None, :]
    o_1 = o_tile[None, :].to(tl.int64) * n + o_row[:, None]
    o_2 = o_1 + tl.cast(tiles, tl.int64) * n
    tl.store(p_max + o_1, b_max1, mask=m_tile)
    tl.store(p_max + o_2, b_max2, mask=m_tile)
    if STATISTICS:
        o_column = tl.arange(0, TILE)
        o_first = first + o_tile[None, :] * TILE
        b_y1 = b_d1.to(tl.float32)
        b_y2 = b_d2.to(tl.float32)
        # The lowest code at the maximum: two operations per logit cheaper than an argmax.
        b_at1 = tl.min(tl.where(b_y1 == 0, o_column[None, None, :], TILE), 2)
        b_at2 = tl.min(tl.where(b_y2 == 0, o_column[None, None, :], TILE), 2)
        tl.store(p_argmax + o_1, o_first + b_at1, mask=m_tile)
        tl.store(p_argmax + o_2, o_first + b_at2, mask=m_tile)
        b_e = tl.exp2(b_y1)
        tl.store(p_sum + o_1, tl.sum(b_e, 2), mask=m_tile)
        tl.store(p_cross + o_1, tl.sum(b_e * b_y2, 2), mask=m_tile)
        b_e = tl.exp2(b_y2)
        tl.store(p_sum + o_2, tl.sum(b_e, 2), mask=m_tile)
        tl.store(p_cross + o_2, tl.sum(b_e * b_y1, 2), mask=m_tile)


class TileStatistics:
    """Per view, tile of a range of codes and row: sum, cross sum and argmax, (2, tiles, N) each."""

    def __init__(self, n: int, tiles: int, device: torch.device) -> None:
        self.sum, self.cross = (torch.empty(2, tiles, n, dtype=torch.float32, device=device) for _ in range(2))
        self.argmax = torch.empty(2, tiles, n, dtype=torch.int32, device=device)


def dense_logits(
    h: torch.Tensor,
    scale: torch.Tensor,
    words: torch.Tensor,
    expanded: torch.Tensor | None,
    first: int,
    d: torch.Tensor | None,
    maxima: torch.Tensor,
    statistics: TileStatistics | None,
    tiles: LogitsTiles,
) -> None:
    """Compute the logits of the codes `words` (count, words per code), the first of which is code `first`.

    h, scale: from `cast_embeddings`, paired.  expanded: memory for the expanded codes if `tiles.expanded`, fp16 (codes, padded
    f), for `plan.EXPANDED_CODES` codes or for all of them, in whole blocks.  The maxima (2, tiles, N) are written, and, unless
    they are None, d (2, N, width) and `statistics`.
    """
    count, words_per_code = words.shape
    _, count_tiles, n = maxima.shape
    width = count_tiles * TILE
    at_once = EXPANDED_CODES if tiles.expanded else width
    for at in range(0, width, at_once):
        if tiles.expanded:
            assert expanded is not None
            chunk = words[at : at + at_once]
            expand_codes(chunk, expanded[: chunk.shape[0]], ordered=False)
        launch(
            logits_kernel,
            (ceil_div(n, tiles.rows), ceil_div(min(at_once, width - at), tiles.codes)),
            h,
            scale,
            expanded if tiles.expanded else words,
            h if d is None else d,
            maxima,
            maxima if statistics is None else statistics.sum,
            maxima if statistics is None else statistics.cross,
            words if statistics is None else statistics.argmax,
            n,
            count,
            first,
            at,
            h.shape[1],
            words_per_code,
            width,
            count_tiles,
            ROWS=tiles.rows,
            CODES=tiles.codes,
            DEPTH=tiles.depth,
            EXPANDED=tiles.expanded,
            TILE=TILE,
            STORE=d is not None,
            STATISTICS=statistics is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
