"""The projector after its linear product: one kernel normalises and activates, two (l2: three) compute the gradient.

With the statistics of a row's view (batchnorm.py: mean s + r, q = 1 / sqrt(var + eps), 1 / n):

    x^ = (x - s - r) q        y = gamma x^ + beta        h = tanh(y)  or  h = rho y / max(|y|, 1e-12), |y| over a row's columns

    tanh   dy = g / cosh(y)^2                       l2   dy = R g - K y,   R = rho / |y|,   K = R (y . g) / |y|^2
    dbeta = sum dy        dgamma = sum dy x^        dx = gamma q (dy - (sum dy + x^ sum dy x^) / n),  sums over the view's rows

Only x is kept from the forward pass: computing y again is cheaper than reading it, and 1 / cosh(y)^2 keeps all its digits where
1 - h^2 of a saturated h, especially in fp16, has none. (With running statistics 1 / n is 0, and the last line is gamma q dy.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, device_facts, launch, multiply
from falcon_fast.kernels.gpu.projector.batchnorm import SPLIT_COLUMNS, SPLIT_ROWS, row_splits
from falcon_fast.kernels.gpu.support import INTERPRETING
from falcon_fast.kernels.gpu.tiles import LOG2_E

SHORTEST_ROW = tl.constexpr(1e-12)  # as in torch.nn.functional.normalize
MINUS_TWO_LOG2_E = tl.constexpr(-2.0 * LOG2_E)

STEPS, STEP_ROWS, STEP_COLUMNS = (
    4,
    16,
    128,
)  # per elementwise program: the terms of its columns are read once for 64 rows
GRADIENT_WARPS = 8  # with 4, Triton 3.6 spills 8 bytes on sm_100 (l2, f no multiple of 16)
LINES, LINE_COLUMNS = 8, 256  # per program that goes along rows


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a b in `dtype`, for matrices of one dtype; if `dtype` differs from theirs, the product itself is float32.

    Autocast is off here: it would cast the operands again.
    """
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype if dtype == a.dtype else torch.float32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        multiply(a, b, out, add=False)
    return out.to(dtype)


@triton.jit
def decay(b_y):
    """Return e^(-2 |y|), from which both tanh and its derivative are computed."""
    return tl.exp2(tl.abs(b_y) * MINUS_TWO_LOG2_E)


@triton.jit
def centring(p_statistics, i_view, views, o, m, f):
    """Return s, r and q of a view's columns."""
    p = p_statistics + i_view * f + o
    b_shift = tl.load(p, mask=m, other=0.0)
    b_rest = tl.load(p + views * f, mask=m, other=0.0)
    return b_shift, b_rest, tl.load(p + 2 * views * f, mask=m, other=0.0)


@triton.jit
def normalised(b_x, b_shift, b_rest, b_scale):
    return (b_x - b_shift[None, :] - b_rest[None, :]) * b_scale[None, :]


@triton.jit
def tanh_kernel(
    p_x,  # [views n, f]
    p_statistics,  # [4, views, f]
    p_gamma,  # [f]
    p_beta,
    p_h,  # [views n, f]
    n,
    f,
    views,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_view = tl.program_id(2)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o < f
    b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, m_column, f)
    b_gamma = tl.load(p_gamma + o, mask=m_column, other=0.0)
    b_beta = tl.load(p_beta + o, mask=m_column, other=0.0)
    for i_step in tl.static_range(STEPS):
        o_row = (tl.program_id(0) * STEPS + i_step) * ROWS + tl.arange(0, ROWS)
        m = (o_row < n)[:, None] & m_column[None, :]
        o_x = (i_view * n + o_row)[:, None].to(tl.int64) * f + o[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0)
        b_y = normalised(b_x, b_shift, b_rest, b_scale) * b_gamma[None, :] + b_beta[None, :]
        b_e = decay(b_y)
        b_h = (1.0 - b_e) / (1.0 + b_e)
        tl.store(p_h + o_x, tl.where(b_y < 0, -b_h, b_h).to(p_h.dtype.element_ty), mask=m)


@triton.jit
def l2_kernel(
    p_x,
    p_statistics,
    p_gamma,
    p_beta,
    p_h,
    p_length,  # |y| of the rows [views n]
    n,
    f,
    views,
    row_norm,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_view = tl.program_id(1)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_line = i_view * n + o_row
    b_squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, f, COLUMNS):
        o = start + tl.arange(0, COLUMNS)
        m = m_row[:, None] & (o < f)[None, :]
        b_x = tl.load(p_x + o_line[:, None].to(tl.int64) * f + o[None, :], mask=m, other=0.0)
        b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, o < f, f)
        b_gamma = tl.load(p_gamma + o, mask=o < f, other=0.0)
        b_beta = tl.load(p_beta + o, mask=o < f, other=0.0)
        b_y = normalised(b_x, b_shift, b_rest, b_scale) * b_gamma[None, :] + b_beta[None, :]
        b_squares += b_y * b_y
    b_length = tl.sqrt_rn(tl.sum(b_squares, 1))
    tl.store(p_length + o_line, b_length, mask=m_row)
    b_factor = row_norm / tl.where(b_length < SHORTEST_ROW, SHORTEST_ROW, b_length)  # which keeps a NaN
    for start in range(0, f, COLUMNS):
        o = start + tl.arange(0, COLUMNS)
        m = m_row[:, None] & (o < f)[None, :]
        o_x = o_line[:, None].to(tl.int64) * f + o[None, :]
        b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, o < f, f)
        b_gamma = tl.load(p_gamma + o, mask=o < f, other=0.0)
        b_beta = tl.load(p_beta + o, mask=o < f, other=0.0)
        b_x = tl.load(p_x + o_x, mask=m, other=0.0)
        b_y = normalised(b_x, b_shift, b_rest, b_scale) * b_gamma[None, :] + b_beta[None, :]
        tl.store(p_h + o_x, (b_y * b_factor[:, None]).to(p_h.dtype.element_ty), mask=m)


def normalise(
    x: torch.Tensor,
    statistics: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    row_norm: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h (views n, f) in `dtype` from x, by tanh or, with a row_norm, l2; and the lengths of the rows of y (l2 only)."""
    rows, f = x.shape
    views = statistics.shape[1]
    n = rows // views
    h = torch.empty(rows, f, dtype=dtype, device=x.device)
    length = torch.empty(0 if row_norm is None else rows, dtype=torch.float32, device=x.device)
    if row_norm is None:
        launch(
            tanh_kernel,
            (ceil_div(n, STEPS * STEP_ROWS), ceil_div(f, STEP_COLUMNS), views),
            x,
            statistics,
            gamma,
            beta,
            h,
            n,
            f,
            views,
            STEPS=STEPS,
            ROWS=STEP_ROWS,
            COLUMNS=STEP_COLUMNS,
            num_warps=4,
        )
    else:
        launch(
            l2_kernel,
            (ceil_div(n, LINES), views),
            x,
            statistics,
            gamma,
            beta,
            h,
            length,
            n,
            f,
            views,
            float(row_norm),
            ROWS=LINES,
            COLUMNS=LINE_COLUMNS,
            num_warps=4,
        )
    return h, length


@triton.jit
def pull_kernel(
    p_g,
    p_x,
    p_statistics,
    p_gamma,
    p_beta,
    p_length,
    p_pull,  # R and K of the rows [2, views n]
    n,
    f,
    views,
    stride_g,
    row_norm,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_view = tl.program_id(1)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_line = i_view * n + o_row
    b_products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, f, COLUMNS):
        o = start + tl.arange(0, COLUMNS)
        m = m_row[:, None] & (o < f)[None, :]
        b_x = tl.load(p_x + o_line[:, None].to(tl.int64) * f + o[None, :], mask=m, other=0.0)
        b_g = tl.load(p_g + o_line[:, None].to(tl.int64) * stride_g + o[None, :], mask=m, other=0.0).to(tl.float32)
        b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, o < f, f)
        b_gamma = tl.load(p_gamma + o, mask=o < f, other=0.0)
        b_beta = tl.load(p_beta + o, mask=o < f, other=0.0)
        b_y = normalised(b_x, b_shift, b_rest, b_scale) * b_gamma[None, :] + b_beta[None, :]
        b_products += b_y * b_g
    b_length = tl.load(p_length + o_line, mask=m_row, other=1.0)
    m_short = b_length < SHORTEST_ROW  # its factor is constant
    b_factor = row_norm / tl.where(m_short, SHORTEST_ROW, b_length)
    b_pull = b_factor * tl.sum(b_products, 1) / (b_length * b_length)
    tl.store(p_pull + o_line, b_factor, mask=m_row)
    tl.store(p_pull + views * n + o_line, tl.where(m_short, 0.0, b_pull), mask=m_row)


@triton.jit
def activation_gradient(b_y, b_g, p_pull, o_line, m_row, lines, L2: tl.constexpr):
    """Return dy of a tile; `o_line` are its rows among all `lines`."""
    if L2:
        b_factor = tl.load(p_pull + o_line, mask=m_row, other=0.0)
        b_pull = tl.load(p_pull + lines + o_line, mask=m_row, other=0.0)
        return b_factor[:, None] * b_g - b_pull[:, None] * b_y
    b_e = decay(b_y)
    b_sech = 2.0 / (1.0 + b_e)
    return b_g * (b_e * b_sech * b_sech)


@triton.jit
def gradient_sums_kernel(
    p_g,  # of h [views n, f]
    p_x,
    p_statistics,
    p_gamma,
    p_beta,
    p_pull,
    p_sums,  # sum dy and sum dy x^ [splits, views, 2, f]
    n,
    f,
    views,
    split_rows,
    stride_g,
    L2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_view, i_split = tl.program_id(1), tl.program_id(2)
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o < f
    b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, m_column, f)
    b_gamma = tl.load(p_gamma + o, mask=m_column, other=0.0)
    b_beta = tl.load(p_beta + o, mask=m_column, other=0.0)
    b_dy_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_cross_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = i_split * split_rows
    end = tl.minimum(begin + split_rows, n)
    for start in range(begin, end, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m_row = o_row < end
        m = m_row[:, None] & m_column[None, :]
        o_line = i_view * n + o_row
        b_x = tl.load(p_x + o_line[:, None].to(tl.int64) * f + o[None, :], mask=m, other=0.0)
        b_g = tl.load(p_g + o_line[:, None].to(tl.int64) * stride_g + o[None, :], mask=m, other=0.0).to(tl.float32)
        b_normal = normalised(b_x, b_shift, b_rest, b_scale)
        b_y = b_normal * b_gamma[None, :] + b_beta[None, :]
        b_dy = activation_gradient(b_y, b_g, p_pull, o_line, m_row, views * n, L2)
        b_dy_sum += b_dy  # 0 where masked: g is, and so are R and K
        b_cross_sum += b_dy * b_normal
    p_sum = p_sums + (i_split * views + i_view).to(tl.int64) * 2 * f + o
    tl.store(p_sum, tl.sum(b_dy_sum, 0), mask=m_column)
    tl.store(p_sum + f, tl.sum(b_cross_sum, 0), mask=m_column)


@triton.jit
def added_up(p_sums, i_view, views, splits, o, m, f, COLUMNS: tl.constexpr):
    """Return sum dy and sum dy x^ of a view's columns, added up over the splits."""
    b_dy_sum = tl.zeros((COLUMNS,), tl.float32)
    b_cross_sum = tl.zeros((COLUMNS,), tl.float32)
    p_sum = p_sums + i_view * 2 * f + o
    for _ in range(splits):
        b_dy_sum += tl.load(p_sum, mask=m, other=0.0)
        b_cross_sum += tl.load(p_sum + f, mask=m, other=0.0)
        p_sum += views * 2 * f
    return b_dy_sum, b_cross_sum


@triton.jit
def input_gradient_kernel(
    p_g,
    p_x,
    p_statistics,
    p_gamma,
    p_beta,
    p_pull,
    p_sums,  # of this process [splits, views, 2, f]
    p_totals,  # of all [total_splits, views, 2, f]
    p_dx,  # [views n, f]
    p_dgamma,  # [f]
    p_dbeta,
    p_dbias,  # of the linear product
    n,
    f,
    views,
    splits,
    total_splits,
    stride_g,
    L2: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_view = tl.program_id(2)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o < f
    b_shift, b_rest, b_scale = centring(p_statistics, i_view, views, o, m_column, f)
    b_share = tl.load(p_statistics + (3 * views + i_view) * f + o, mask=m_column, other=0.0)  # 1 / n
    b_gamma = tl.load(p_gamma + o, mask=m_column, other=0.0)
    b_beta = tl.load(p_beta + o, mask=m_column, other=0.0)
    b_dy_sum, b_cross_sum = added_up(p_totals, i_view, views, total_splits, o, m_column, f, COLUMNS)
    b_dy_mean = b_dy_sum * b_share
    b_cross_mean = b_cross_sum * b_share
    for i_step in tl.static_range(STEPS):
        o_row = (tl.program_id(0) * STEPS + i_step) * ROWS + tl.arange(0, ROWS)
        m_row = o_row < n
        m = m_row[:, None] & m_column[None, :]
        o_line = i_view * n + o_row
        o_x = o_line[:, None].to(tl.int64) * f + o[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0)
        b_g = tl.load(p_g + o_line[:, None].to(tl.int64) * stride_g + o[None, :], mask=m, other=0.0).to(tl.float32)
        b_normal = normalised(b_x, b_shift, b_rest, b_scale)
        b_y = b_normal * b_gamma[None, :] + b_beta[None, :]
        b_dy = activation_gradient(b_y, b_g, p_pull, o_line, m_row, views * n, L2)
        b_dx = (b_dy - b_dy_mean[None, :] - b_normal * b_cross_mean[None, :]) * (b_gamma * b_scale)[None, :]
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m)
    if tl.program_id(0) == 0 and i_view == 0:
        b_dgamma = tl.zeros((COLUMNS,), tl.float32)
        b_dbeta = tl.zeros((COLUMNS,), tl.float32)
        for i_other in range(views):
            b_dy_sum, b_cross_sum = added_up(p_sums, i_other, views, splits, o, m_column, f, COLUMNS)
            b_dbeta += b_dy_sum
            b_dgamma += b_cross_sum
        tl.store(p_dgamma + o, b_dgamma, mask=m_column)
        tl.store(p_dbeta + o, b_dbeta, mask=m_column)
        # Subtracting the mean removes a bias: no gradient, not even rounding errors that an optimiser would scale up.
        tl.store(p_dbias + o, tl.where(b_share > 0, 0.0, b_dbeta * b_gamma * b_scale), mask=m_column)


def gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    length: torch.Tensor,
    row_norm: float | None,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx (views n, f) in `dtype`, dgamma, dbeta and the gradient of the linear bias (f,), from g, the gradient of h.

    With a group, dx takes the whole batch of its processes into account; the others are the share of this process.
    """
    rows, f = x.shape
    views = statistics.shape[1]
    n = rows // views
    g = g if g.stride(1) == 1 else g.contiguous()
    l2 = row_norm is not None
    pull = length
    if row_norm is not None:
        pull = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        launch(
            pull_kernel,
            (ceil_div(n, LINES), views),
            g,
            x,
            statistics,
            gamma,
            beta,
            length,
            pull,
            n,
            f,
            views,
            g.stride(0),
            float(row_norm),
            ROWS=LINES,
            COLUMNS=LINE_COLUMNS,
            num_warps=4,
        )
    splits, split_rows = row_splits(n, f, views, device_facts(x.device).processors)
    sums = torch.empty(splits, views, 2, f, dtype=torch.float32, device=x.device)
    launch(
        gradient_sums_kernel,
        (ceil_div(f, SPLIT_COLUMNS), views, splits),
        g,
        x,
        statistics,
        gamma,
        beta,
        pull,
        sums,
        n,
        f,
        views,
        split_rows,
        g.stride(0),
        L2=l2,
        ROWS=SPLIT_ROWS,
        COLUMNS=SPLIT_COLUMNS,
        num_warps=4,
    )
    totals = sums
    if group is not None:
        totals = sums.sum(0, keepdim=True)
        dist.all_reduce(totals, group=group)
    as_stored = (
        torch.float32 if INTERPRETING and dtype == torch.bfloat16 else dtype
    )  # the interpreter stores bfloat16 wrongly
    dx = torch.empty(rows, f, dtype=as_stored, device=x.device)
    dgamma, dbeta, dbias = (torch.empty(f, dtype=torch.float32, device=x.device) for _ in range(3))
    launch(
        input_gradient_kernel,
        (ceil_div(n, STEPS * STEP_ROWS), ceil_div(f, STEP_COLUMNS), views),
        g,
        x,
        statistics,
        gamma,
        beta,
        pull,
        sums,
        totals,
        dx,
        dgamma,
        dbeta,
        dbias,
        n,
        f,
        views,
        splits,
        totals.shape[0],
        g.stride(0),
        L2=l2,
        STEPS=STEPS,
        ROWS=STEP_ROWS,
        COLUMNS=STEP_COLUMNS,
        num_warps=GRADIENT_WARPS,
    )
    return dx.to(dtype), dgamma, dbeta, dbias
