"""The statistics of BatchNorm's columns, per view and over processes, and the running averages that they update.

For each view (one of `views` equal parts of the rows) and column j, over its n rows, or those of all processes,

    mean_j = s_j + r_j        var_j = M2_j / n        s_j: the view's first row, r_j: the mean of x_ij - s_j

x - s is exact in float32 if the values of a column are close together, so a column of mean 10^4 and deviation 10^-2 loses
nothing: its mean is kept as the two numbers s and r. Each slot (thread and row of a block) applies Welford's update to its own
rows. Slots are merged on chip, and parts (splits of the rows, then processes) by Chan's formula in a fixed order. There are no
atomics, and nothing is squared before it is centred.

The averages are updated as torch.nn.BatchNorm1d updates them when the views pass one after the other. A bias that is added before
BatchNorm shifts only the mean, so x does not contain it; it is added only to the running mean, here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, device_facts, launch

# Up to this many rows per view (4 steps of 128 rows) one program finishes its columns in all views, in one launch.
MOST_ROWS_AT_ONCE = 512
ROWS_AT_ONCE, COLUMNS_AT_ONCE = (
    128,
    16,
)  # narrow, so that 2048 columns make 128 programs; still two whole sectors of a row
SPLIT_ROWS, SPLIT_COLUMNS = 32, 64
PROGRAMS_A_PROCESSOR = 4
MOST_SPLITS = 8  # the second kernel of the gradient adds up these in every program
SHORTEST_SPLIT = 128
MERGED_COLUMNS = 128


class Averages(NamedTuple):
    """Running mean and variance (f,), batches seen (int64 0-d, these views included), momentum (None: the plain mean)."""

    mean: torch.Tensor
    variance: torch.Tensor
    tracked: torch.Tensor
    momentum: float | None


def row_splits(n: int, f: int, views: int, processors: int) -> tuple[int, int]:
    """Return into how many parts the n rows of a view are split to fill the GPU, and the number of rows of a part."""
    programs = ceil_div(f, SPLIT_COLUMNS) * views
    splits = max(1, min(PROGRAMS_A_PROCESSOR * processors // programs, n // SHORTEST_SPLIT, MOST_SPLITS))
    rows = ceil_div(ceil_div(n, splits), SPLIT_ROWS) * SPLIT_ROWS
    return ceil_div(n, rows), rows


@triton.jit
def centred_statistics(p_x, begin, end, b_shift, o_column, m_column, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the mean of x - shift and M2 of the columns, over the rows [begin, end)."""
    o_slot = tl.arange(0, ROWS)
    b_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_square = tl.zeros((ROWS, COLUMNS), tl.float32)
    passed = 0.0
    for start in range(begin, end, ROWS):
        o_row = start + o_slot
        m = (o_row < end)[:, None] & m_column[None, :]
        b_x = tl.load(p_x + o_row[:, None].to(tl.int64) * f + o_column[None, :], mask=m, other=0.0) - b_shift[None, :]
        passed += 1.0
        b_delta = tl.where(m, b_x - b_mean, 0.0)
        b_mean += b_delta * (1.0 / passed)
        b_square += b_delta * (b_x - b_mean)
    b_count = (tl.maximum(end - begin - o_slot + (ROWS - 1), 0) // ROWS).to(tl.float32)  # rows of a slot
    b_rest = tl.sum(b_mean * b_count[:, None], 0) / (end - begin)
    b_away = b_mean - b_rest[None, :]
    return b_rest, tl.sum(b_square + b_count[:, None] * b_away * b_away, 0)


@triton.jit
def average_factor(p_tracked, momentum, i_view, views, CUMULATIVE: tl.constexpr):
    """Return the weight of a view's statistics in the running averages."""
    if CUMULATIVE:
        return 1.0 / (tl.load(p_tracked) - views + i_view + 1).to(tl.float32)
    return momentum


@triton.jit
def store_statistics(p_out, i_view, views, b_shift, b_rest, b_square, b_count, eps, o, m, f):
    """Store shift, rest, 1 / sqrt(variance + eps) and 1 / n of a view's columns, each in a plane (views, f)."""
    p = p_out + i_view * f + o
    tl.store(p, b_shift, mask=m)
    tl.store(p + views * f, b_rest, mask=m)
    tl.store(p + 2 * views * f, 1.0 / tl.sqrt_rn(b_square / b_count + eps), mask=m)
    tl.store(p + 3 * views * f, 1.0 / b_count, mask=m)


@triton.jit
def statistics_kernel(
    p_x,  # [views n, f]
    p_bias,  # [f], and so on
    p_mean,
    p_variance,
    p_tracked,
    p_out,  # [4, views, f] where FINISH; else parts [splits, views, 4, f]: shift, rest, M2, n
    n,
    f,
    views,
    split_rows,
    momentum,
    eps,
    FINISH: tl.constexpr,
    TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = o < f
    if FINISH:
        if TRACK:
            b_bias = tl.load(p_bias + o, mask=m, other=0.0)
            b_mean = tl.load(p_mean + o, mask=m, other=0.0)
            b_variance = tl.load(p_variance + o, mask=m, other=0.0)
        b_count = tl.zeros((COLUMNS,), tl.float32) + n
        for i_view in range(views):
            b_shift = tl.load(p_x + tl.cast(i_view, tl.int64) * n * f + o, mask=m, other=0.0)
            b_rest, b_square = centred_statistics(p_x, i_view * n, i_view * n + n, b_shift, o, m, f, ROWS, COLUMNS)
            store_statistics(p_out, i_view, views, b_shift, b_rest, b_square, b_count, eps, o, m, f)
            if TRACK:
                factor = average_factor(p_tracked, momentum, i_view, views, CUMULATIVE)
                b_mean = factor * (b_shift + b_rest + b_bias) + (1.0 - factor) * b_mean
                b_variance = factor * (b_square / (b_count - 1.0)) + (1.0 - factor) * b_variance
        if TRACK:
            tl.store(p_mean + o, b_mean, mask=m)
            tl.store(p_variance + o, b_variance, mask=m)
    else:
        i_view, i_split = tl.program_id(1), tl.program_id(2)
        begin = i_split * split_rows
        end = tl.minimum(begin + split_rows, n)
        b_shift = tl.load(p_x + i_view.to(tl.int64) * n * f + o, mask=m, other=0.0)
        b_rest, b_square = centred_statistics(
            p_x, i_view * n + begin, i_view * n + end, b_shift, o, m, f, ROWS, COLUMNS
        )
        p_part = p_out + (i_split * views + i_view).to(tl.int64) * 4 * f + o
        tl.store(p_part, b_shift, mask=m)
        tl.store(p_part + f, b_rest, mask=m)
        tl.store(p_part + 2 * f, b_square, mask=m)
        tl.store(p_part + 3 * f, tl.zeros((COLUMNS,), tl.float32) + (end - begin), mask=m)


@triton.jit
def merge_parts_kernel(
    p_parts,  # [parts, views, 4, f]
    p_bias,
    p_mean,
    p_variance,
    p_tracked,
    p_out,  # [4, views, f] where FINISH; else one part [views, 4, f]
    parts,
    f,
    views,
    momentum,
    eps,
    FINISH: tl.constexpr,
    TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = o < f
    if TRACK:
        b_bias = tl.load(p_bias + o, mask=m, other=0.0)
        b_mean = tl.load(p_mean + o, mask=m, other=0.0)
        b_variance = tl.load(p_variance + o, mask=m, other=0.0)
    for i_view in range(views):
        p_part = p_parts + i_view * 4 * f + o
        b_shift = tl.load(p_part, mask=m, other=0.0)
        b_rest = tl.zeros((COLUMNS,), tl.float32)
        b_square = tl.zeros((COLUMNS,), tl.float32)
        b_count = tl.zeros((COLUMNS,), tl.float32)
        for _ in range(parts):
            b_moved = tl.load(p_part, mask=m, other=0.0) - b_shift  # 0 among the splits of one process
            b_away = b_moved + tl.load(p_part + f, mask=m, other=0.0) - b_rest
            b_more = tl.load(p_part + 3 * f, mask=m, other=1.0)
            b_share = b_more / (b_count + b_more)
            b_square += tl.load(p_part + 2 * f, mask=m, other=0.0) + b_away * b_away * b_count * b_share
            b_rest += b_away * b_share
            b_count += b_more
            p_part += views * 4 * tl.cast(f, tl.int64)
        if FINISH:
            store_statistics(p_out, i_view, views, b_shift, b_rest, b_square, b_count, eps, o, m, f)
        else:
            p_whole = p_out + i_view * 4 * f + o
            tl.store(p_whole, b_shift, mask=m)
            tl.store(p_whole + f, b_rest, mask=m)
            tl.store(p_whole + 2 * f, b_square, mask=m)
            tl.store(p_whole + 3 * f, b_count, mask=m)
        if TRACK:
            factor = average_factor(p_tracked, momentum, i_view, views, CUMULATIVE)
            b_mean = factor * (b_shift + b_rest + b_bias) + (1.0 - factor) * b_mean
            b_variance = factor * (b_square / (b_count - 1.0)) + (1.0 - factor) * b_variance
    if TRACK:
        tl.store(p_mean + o, b_mean, mask=m)
        tl.store(p_variance + o, b_variance, mask=m)


def batch_statistics(
    x: torch.Tensor,
    views: int,
    bias: torch.Tensor,
    averages: Averages | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Return statistics (4, views, f) of float32 x (views n, f): planes s, r, 1 / sqrt(var + eps), 1 / n. Update averages.

    With a group they are those of all its processes, which may have different numbers of rows.
    """
    rows, f = x.shape
    n = rows // views
    splits, split_rows = row_splits(n, f, views, device_facts(x.device).processors)
    at_once = group is None and (n <= MOST_ROWS_AT_ONCE or splits == 1)
    out = torch.empty(4, views, f, dtype=torch.float32, device=x.device)
    parts = out if at_once else torch.empty(splits, views, 4, f, dtype=torch.float32, device=x.device)
    if averages is None:
        tensors = (bias, x, x, x)
    else:
        tensors = (bias, averages.mean, averages.variance, averages.tracked)
    momentum = None if averages is None else averages.momentum
    # Launches that do not finish a result do not touch the averages.
    finishing = {"FINISH": True, "TRACK": averages is not None, "CUMULATIVE": momentum is None}
    noting = {"FINISH": False, "TRACK": False, "CUMULATIVE": False}
    settings = (float(momentum or 0.0), eps)
    columns = COLUMNS_AT_ONCE if at_once else SPLIT_COLUMNS
    launch(
        statistics_kernel,
        (ceil_div(f, columns),) if at_once else (ceil_div(f, columns), views, splits),
        x,
        *tensors,
        parts,
        n,
        f,
        views,
        split_rows,
        *settings,
        **(finishing if at_once else noting),
        ROWS=ROWS_AT_ONCE if at_once else SPLIT_ROWS,
        COLUMNS=columns,
        num_warps=4,
    )
    if at_once:
        return out

    def merge(parts: torch.Tensor, out: torch.Tensor, how: dict[str, bool]) -> None:
        launch(
            merge_parts_kernel,
            (ceil_div(f, MERGED_COLUMNS),),
            parts,
            *tensors,
            out,
            parts.shape[0],
            f,
            views,
            *settings,
            **how,
            COLUMNS=MERGED_COLUMNS,
            num_warps=4,
        )

    if group is not None:
        mine = parts
        if splits > 1:
            mine = torch.empty(1, views, 4, f, dtype=torch.float32, device=x.device)
            merge(parts, mine, noting)
        parts = torch.empty(dist.get_world_size(group), views, 4, f, dtype=torch.float32, device=x.device)
        dist.all_gather(
            list(parts), mine[0], group=group
        )  # into views: the only gather that Gloo has in every torch version
    merge(parts, out, finishing)
    return out


@triton.jit
def running_statistics_kernel(p_mean, p_variance, p_bias, p_out, f, eps, COLUMNS: tl.constexpr):
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = o < f
    tl.store(p_out + o, tl.load(p_mean + o, mask=m, other=0.0), mask=m)
    tl.store(p_out + f + o, -tl.load(p_bias + o, mask=m, other=0.0), mask=m)
    tl.store(p_out + 2 * f + o, 1.0 / tl.sqrt_rn(tl.load(p_variance + o, mask=m, other=1.0) + eps), mask=m)
    tl.store(p_out + 3 * f + o, tl.zeros((COLUMNS,), tl.float32), mask=m)


def running_statistics(mean: torch.Tensor, variance: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the running averages in the form of `batch_statistics` (one view); 1 / n is 0, since no row changes them."""
    f = mean.shape[0]
    out = torch.empty(4, 1, f, dtype=torch.float32, device=mean.device)
    launch(
        running_statistics_kernel,
        (ceil_div(f, MERGED_COLUMNS),),
        mean,
        variance,
        bias,
        out,
        f,
        eps,
        COLUMNS=MERGED_COLUMNS,
        num_warps=4,
    )
    return out
