"""Regions of resident images resized with the same bits as Pillow: bicubic, antialiased, along rows and then along columns.

Pillow's weights are integers of 22 bits, and each pass is rounded to uint8, so sums of int32 are exact in any order. A pass is
one launch for all images and both views. It computes its weights itself, in float64 and summed in the same order as in Pillow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch

PRECISION_BITS = 22
LINES, OUTPUTS = 32, 32


@triton.jit
def cubic(x):
    """The cubic convolution kernel with a = -1/2 (Keys, 1981), as Pillow writes it."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def resize_kernel(
    p_in,  # uint8
    p_indices,  # int64, which image; of the second pass the view's own
    p_boxes,  # int64 (views, 4): top, left, rows, columns
    p_flips,  # uint8 (views)
    p_out,  # uint8
    images,  # of a view
    size,
    in_image,  # bytes of an image, of a line, from one tap to the next
    in_line,
    tap,
    out_image,
    out_line,
    out_step,
    inner,  # bytes side by side that are resized alike
    ACROSS: tl.constexpr,
    BITS: tl.constexpr,
    LINES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    i_view = tl.program_id(0).to(tl.int64)
    rows = tl.load(p_boxes + 4 * i_view + 2).to(tl.int32)
    if ACROSS:
        i_image = tl.load(p_indices + i_view % images)
        length = tl.load(p_boxes + 4 * i_view + 3).to(tl.int32)
        flip = tl.load(p_flips + i_view) != 0
        lines = rows * inner
        p_in += tl.load(p_boxes + 4 * i_view) * in_line + tl.load(p_boxes + 4 * i_view + 1) * tap
    else:
        i_image = i_view
        length = rows
        flip = rows < 0
        lines = inner
    p_in += i_image * in_image

    o_line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    o_out = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_line, m_out = o_line < lines, o_out < size
    scale = length.to(tl.float64) / size
    reach = tl.where(scale < 1.0, 1.0, scale)
    b_at = tl.where(flip, size - 1 - o_out, o_out)
    b_centre = (b_at.to(tl.float64) + 0.5) * scale
    b_first = tl.maximum((b_centre - 2.0 * reach + 0.5).to(tl.int32), 0)
    b_last = tl.minimum((b_centre + 2.0 * reach + 0.5).to(tl.int32), length)
    taps = (4.0 * reach).to(tl.int32) + 2

    b_total = tl.zeros([OUTPUTS], tl.float64)
    for k in range(taps):
        b_w = cubic(((b_first + k).to(tl.float64) - b_centre + 0.5) / reach)
        b_total += tl.where(b_first + k < b_last, b_w, 0.0)
    b_total = tl.where(m_out, b_total, 1.0)
    b_sum = tl.zeros([LINES, OUTPUTS], tl.int32) + (1 << (BITS - 1))
    p_line = p_in + (o_line // inner).to(tl.int64) * in_line + o_line % inner
    for k in range(taps):
        b_pixel = b_first + k
        m_tap = m_out & (b_pixel < b_last)
        b_w = cubic((b_pixel.to(tl.float64) - b_centre + 0.5) / reach) / b_total * (1 << BITS)
        b_whole = tl.where(b_w < 0.0, -((0.5 - b_w).to(tl.int32)), (0.5 + b_w).to(tl.int32))
        b_x = tl.load(
            p_line[:, None] + b_pixel[None, :].to(tl.int64) * tap, mask=m_line[:, None] & m_tap[None, :], other=0
        )
        b_sum += b_x.to(tl.int32) * b_whole[None, :]
    b_sum = tl.minimum(tl.maximum(b_sum >> BITS, 0), 255)
    p_to = p_out + i_view * out_image + (o_line // inner).to(tl.int64) * out_line + o_line % inner
    tl.store(
        p_to[:, None] + o_out[None, :].to(tl.int64) * out_step,
        b_sum.to(tl.uint8),
        mask=m_line[:, None] & m_out[None, :],
    )


def crop_views(
    images: torch.Tensor, indices: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int
) -> torch.Tensor:
    """Return views of resident images, uint8 (v n, S, S, 3): for each of v views the n images.

    images: uint8 (N, H, W, 3), contiguous.  indices: int64 (n,).  boxes: int64 (v n, 4): top, left, height, width, inside the
    image.  flips: bool (v n,), mirror left to right.
    """
    _, height, width, channels = images.shape
    views = boxes.shape[0]
    flips = flips.contiguous().view(torch.uint8)
    boxes = boxes.contiguous()
    between = torch.empty(views, height, size, channels, dtype=torch.uint8, device=images.device)
    out = torch.empty(views, size, size, channels, dtype=torch.uint8, device=images.device)
    line = size * channels
    passes = (
        # in, its image, line and tap; out, its image, line and step; bytes alike; lines
        (
            images,
            (height * width * channels, width * channels, channels),
            between,
            (height * line, line, channels),
            channels,
        ),
        (between, (height * line, 0, line), out, (size * line, 0, line), line),
    )
    for source, taken, target, put, inner in passes:
        across = source is images
        launch(
            resize_kernel,
            (views, ceil_div(height * inner if across else inner, LINES), ceil_div(size, OUTPUTS)),
            source,
            indices,
            boxes,
            flips,
            target,
            indices.shape[0],
            size,
            *taken,
            *put,
            inner,
            ACROSS=across,
            BITS=PRECISION_BITS,
            LINES=LINES,
            OUTPUTS=OUTPUTS,
            num_warps=4,
        )
    return out
