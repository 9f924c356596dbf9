"""The gradient: dZ, which replaces the stored logits, its product with the codes, and the factor known in the backward pass.

    2 N dZ_1 = P_1 g_1 + P_1 (beta - a_1 + beta x_1 - beta y_2) - beta P_2        dH_1 = dZ_1 W^T / tau,  view 2 by symmetry

dZ replaces the logits in memory, in fp16 and in units of the row's quantum (finish.finish). When the parts of the product are
added up, they are multiplied by the quantum and by the gradient of the loss itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch, multiply
from falcon_fast.kernels.gpu.loss.columns import ColumnState, Scales, prior_gradient
from falcon_fast.kernels.gpu.loss.expand import expand_codes
from falcon_fast.kernels.gpu.loss.plan import TILE, ProductTiles
from falcon_fast.kernels.gpu.loss.rows import RowState
from falcon_fast.kernels.gpu.tiles import LN_2, expand_signs, feature_of

DZ_ROWS = 32
COMBINED_ROWS, COMBINED_COLUMNS = 4, 512


@triton.jit
def view_gradient(b_log_p, b_p, b_log_pbar, b_free, b_other_y, b_other_p, log_c, beta, FORWARD: tl.constexpr):
    """Return 2 N dZ of one view; `free` is beta - a + beta x of a row."""
    b_prior = prior_gradient(b_log_p, b_p, b_log_pbar, log_c, FORWARD)
    return b_prior + b_p * (b_free - beta * LN_2 * b_other_y) - beta * b_other_p


@triton.jit
def logit_gradients(
    b_y1, b_y2, b_log_s1, b_log_s2, b_free1, b_free2, b_log_pbar1, b_log_pbar2, log_c, beta, FORWARD: tl.constexpr
):
    """Return 2 N dZ of both views from y (log 2 units). All arguments broadcast together."""
    b_log_p1 = b_y1 - b_log_s1
    b_log_p2 = b_y2 - b_log_s2
    b_p1 = tl.exp2(b_log_p1)
    b_p2 = tl.exp2(b_log_p2)
    b_dz1 = view_gradient(b_log_p1, b_p1, b_log_pbar1, b_free1, b_y2, b_p2, log_c, beta, FORWARD)
    b_dz2 = view_gradient(b_log_p2, b_p2, b_log_pbar2, b_free2, b_y1, b_p1, log_c, beta, FORWARD)
    return b_dz1, b_dz2


@triton.jit
def row_terms(p_sum, p_cross, p_a, p_quantum, o, m_row, n, beta):
    """Return log2 s, beta - a + beta x, and the units per 2 N dZ, of the rows at offsets `o` of the (2, n) arrays."""
    b_sum = tl.load(p_sum + o, mask=m_row, other=1.0)
    b_x = LN_2 * tl.load(p_cross + o, mask=m_row, other=0.0) / b_sum
    b_free = beta - tl.load(p_a + o, mask=m_row, other=0.0) + beta * b_x
    return tl.log2(b_sum), b_free, tl.load(p_quantum + 2 * n + o, mask=m_row, other=0.0)


@triton.jit
def dz_kernel(
    p_d,  # fp16 [2, n, width], overwritten
    p_tile_max,  # [2, tiles, n]
    p_max,  # [2, n], and so on
    p_sum,
    p_cross,
    p_a,
    p_quantum,  # [2, 2, n]
    p_log_pbar,  # [2, padded_c], at the range's first code
    n,
    count,
    width,
    tiles,
    padded_c,
    log_c,
    beta,
    FORWARD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_tile, i_rows = tl.program_id(0), tl.program_id(1)
    o_row = i_rows * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_code = i_tile * TILE + tl.arange(0, TILE)
    m_code = o_code < count
    b_log_s1, b_free1, b_units1 = row_terms(p_sum, p_cross, p_a, p_quantum, o_row, m_row, n, beta)
    b_log_s2, b_free2, b_units2 = row_terms(p_sum, p_cross, p_a, p_quantum, n + o_row, m_row, n, beta)
    o_max = i_tile.to(tl.int64) * n + o_row
    b_shift1 = tl.load(p_tile_max + o_max, mask=m_row, other=0.0) - tl.load(p_max + o_row, mask=m_row, other=0.0)
    b_shift2 = tl.load(p_tile_max + tl.cast(tiles, tl.int64) * n + o_max, mask=m_row, other=0.0)
    b_shift2 -= tl.load(p_max + n + o_row, mask=m_row, other=0.0)
    p_1 = p_d + o_row[:, None].to(tl.int64) * width + o_code[None, :]
    p_2 = p_1 + tl.cast(n, tl.int64) * width
    b_y1 = tl.load(p_1, mask=m_row[:, None], other=0.0).to(tl.float32) + b_shift1[:, None]
    b_y2 = tl.load(p_2, mask=m_row[:, None], other=0.0).to(tl.float32) + b_shift2[:, None]
    b_dz1, b_dz2 = logit_gradients(
        b_y1,
        b_y2,
        b_log_s1[:, None],
        b_log_s2[:, None],
        b_free1[:, None],
        b_free2[:, None],
        tl.load(p_log_pbar + o_code, mask=m_code, other=0.0)[None, :],
        tl.load(p_log_pbar + padded_c + o_code, mask=m_code, other=0.0)[None, :],
        log_c,
        beta,
        FORWARD,
    )
    # Columns past the last code: their P is 0, but the forward prior divides 0 by 0 there.
    b_dz1 = tl.where(m_code[None, :], b_dz1 * b_units1[:, None], 0.0)
    b_dz2 = tl.where(m_code[None, :], b_dz2 * b_units2[:, None], 0.0)
    tl.store(p_1, b_dz1.to(tl.float16), mask=m_row[:, None])
    tl.store(p_2, b_dz2.to(tl.float16), mask=m_row[:, None])


def dz_in_place(
    d: torch.Tensor,
    tile_maximum: torch.Tensor,
    rows: RowState,
    quantum: torch.Tensor,
    state: ColumnState,
    first: int,
    count: int,
    scales: Scales,
) -> None:
    """Replace the logits d (2, N, width) of the codes [first, first + count) by dZ, in units of the quanta of the rows."""
    _, n, width = d.shape
    launch(
        dz_kernel,
        (width // TILE, ceil_div(n, DZ_ROWS)),
        d,
        tile_maximum,
        rows.maximum,
        rows.sum,
        rows.cross,
        rows.a,
        quantum,
        state.log_pbar[:, first:],
        n,
        count,
        width,
        tile_maximum.shape[1],
        state.log_pbar.shape[1],
        scales.log_c,
        scales.beta,
        FORWARD=scales.forward,
        TILE=TILE,
        ROWS=DZ_ROWS,
        num_warps=8,
    )


@triton.jit
def product_kernel(
    p_dz,  # fp16 [rows, width]
    p_words,  # int32 [count, words_per_code]
    p_out,  # [splits, rows, f]
    rows,
    count,
    width,
    f,
    words_per_code,
    split_codes,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i_rows, i_features, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_row = i_rows * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_word = i_features * (FEATURES // 32) + tl.arange(0, FEATURES // 32)
    m_word = o_word < words_per_code
    begin = i_split * split_codes
    end = tl.minimum(begin + split_codes, width)
    o_code = begin + tl.arange(0, DEPTH)
    p_a = p_dz + o_row[:, None].to(tl.int64) * width + o_code[None, :]
    p_b = p_words + o_code[:, None].to(tl.int64) * words_per_code + o_word[None, :]
    b_dh = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(begin, end, DEPTH):
        b_dz = tl.load(p_a, mask=m_row[:, None], other=0.0)
        m_code = start + tl.arange(0, DEPTH) < count
        b_words = tl.load(p_b, mask=m_code[:, None] & m_word[None, :], other=0)
        b_dh = tl.dot(b_dz, expand_signs(b_words), b_dh)
        p_a += DEPTH
        p_b += DEPTH * words_per_code
    o_feature = feature_of(i_features * FEATURES + tl.arange(0, FEATURES))
    p_dh = p_out + (i_split.to(tl.int64) * rows + o_row)[:, None] * f + o_feature[None, :]
    m_out = m_row[:, None] & (o_feature < f)[None, :]
    if ADD:
        b_dh += tl.load(p_dh, mask=m_out, other=0.0)
    tl.store(p_dh, b_dh, mask=m_out)


def packed_product(dz: torch.Tensor, words: torch.Tensor, out: torch.Tensor, tiles: ProductTiles, add: bool) -> None:
    """Compute out (splits, rows, f) = dz (rows, width) times the codes `words`, split by codes, or add it to out if `add`."""
    rows, width = dz.shape
    splits, _, f = out.shape
    split_codes = ceil_div(ceil_div(width, splits), tiles.depth) * tiles.depth
    launch(
        product_kernel,
        (ceil_div(rows, tiles.rows), ceil_div(f, tiles.features), splits),
        dz,
        words,
        out,
        rows,
        words.shape[0],
        width,
        f,
        words.shape[1],
        split_codes,
        ADD=add,
        ROWS=tiles.rows,
        FEATURES=tiles.features,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def library_product(
    dz: torch.Tensor, words: torch.Tensor, expanded: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """Do the same by torch's matrix product, on codes expanded into `expanded`, fp16 (at least count, f); out: (1, rows, f)."""
    count = words.shape[0]
    expand_codes(words, expanded[:count], ordered=True)
    multiply(dz[:, :count], expanded[:count], out[0], add)


@triton.jit
def combine_kernel(
    p_parts,  # [splits, 2 n, f]
    p_quantum,  # [2 n]
    p_grad,  # of the loss
    p_g1,
    p_g2,
    n,
    f,
    splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_view = tl.program_id(1)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    b_factor = tl.load(p_quantum + i_view * n + o_row, mask=m_row, other=0.0) * tl.load(p_grad).to(tl.float32)
    if i_view == 0:
        p_out = p_g1
    else:
        p_out = p_g2
    for start in range(0, f, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = m_row[:, None] & (o < f)[None, :]
        p_part = p_parts + (i_view * n + o_row)[:, None].to(tl.int64) * f + o[None, :]
        b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for _ in range(splits):
            b_sum += tl.load(p_part, mask=m, other=0.0)
            p_part += 2 * tl.cast(n, tl.int64) * f
        b_sum *= b_factor[:, None]
        tl.store(p_out + o_row[:, None].to(tl.int64) * f + o[None, :], b_sum.to(p_g1.dtype.element_ty), mask=m)


def combine(
    parts: torch.Tensor, quantum: torch.Tensor, grad_loss: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (N, f) of both views in `dtype`: the sum of the parts (splits, 2 N, f) times quantum and grad_loss."""
    splits, rows, f = parts.shape
    n = rows // 2
    g1, g2 = (torch.empty(n, f, dtype=dtype, device=parts.device) for _ in range(2))
    launch(
        combine_kernel,
        (ceil_div(n, COMBINED_ROWS), 2),
        parts,
        quantum,
        grad_loss,
        g1,
        g2,
        n,
        f,
        splits,
        ROWS=COMBINED_ROWS,
        BLOCK=COMBINED_COLUMNS,
        num_warps=4,
    )
    return g1, g2
