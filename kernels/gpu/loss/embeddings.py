"""The embeddings of both views in the form that the tensor cores take: fp16, each row scaled by a power of two.

fp16 rounds the output of tanh eight times more finely than bf16, at the same speed. With the power of two every finite row fits
(and small rows do not become subnormal), and no bit of the mantissa changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.tiles import LOG2_E, feature_of, paired_row

IMAGES = 8  # per program: as many as follow one another in the paired order
BLOCK = 256


@triton.jit
def cast_embeddings_kernel(
    p_h1,
    p_h2,
    p_out,  # fp16 [2 padded_n, padded_f]
    p_scale,  # [2 padded_n], in the rows' order
    p_norm,  # [2 padded_n], likewise
    n,
    f,
    padded_n,
    padded_f,
    stride_h1,
    stride_h2,
    factor,
    PAIRED: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_view = tl.program_id(1)
    o_image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    m_image = o_image < n
    if i_view == 0:
        p_in = p_h1 + o_image.to(tl.int64) * stride_h1
    else:
        p_in = p_h2 + o_image.to(tl.int64) * stride_h2
    b_top = tl.zeros((IMAGES, BLOCK), tl.float32)
    b_norm = tl.zeros((IMAGES, BLOCK), tl.float32)
    for start in range(0, f, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = m_image[:, None] & (o < f)[None, :]
        b_h = tl.abs(tl.load(p_in[:, None] + o[None, :], mask=m, other=0.0).to(tl.float32))
        b_top = tl.maximum(b_top, b_h)
        b_norm += b_h
    # top is in [2^(e - 127), 2^(e - 126)), so top times 2^(126 - e) is in [1/2, 1). Zeros, infinities and NaN do not change.
    b_exponent = (tl.max(b_top, 1).to(tl.int32, bitcast=True) >> 23) & 255
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 252)
    b_shrink = ((253 - b_exponent) << 23).to(tl.float32, bitcast=True)
    if PAIRED:
        o_row = paired_row(i_view, o_image)
    else:
        o_row = i_view * padded_n + o_image
    m_row = o_image < padded_n
    tl.store(p_scale + o_row, ((b_exponent + 1) << 23).to(tl.float32, bitcast=True) * factor, mask=m_row)
    tl.store(p_norm + o_row, tl.sum(b_norm, 1), mask=m_row)
    p_row = p_out + o_row.to(tl.int64) * padded_f
    for start in range(0, padded_f, BLOCK):
        o = start + tl.arange(0, BLOCK)
        if PAIRED:
            o_feature = feature_of(o)
        else:
            o_feature = o
        m = m_image[:, None] & (o_feature < f)[None, :]
        b_h = tl.load(p_in[:, None] + o_feature[None, :], mask=m, other=0.0).to(tl.float32) * b_shrink[:, None]
        tl.store(p_row[:, None] + o[None, :], b_h.to(tl.float16), mask=m_row[:, None] & (o < padded_f)[None, :])


def cast_embeddings(
    h1: torch.Tensor, h2: torch.Tensor, tau: float, padded_n: int, padded_f: int, paired: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the embeddings (N, f) of both views as fp16 (2 padded_n, padded_f), and the scale and L1 norm of each row.

    Scales and norms are float32 (2 padded_n,). A logit in units of log 2 is the product of the row and a code, times the scale of
    the row, which includes log2(e) / tau. If `paired`, rows and columns have the order of `tiles.paired_row` and
    `tiles.feature_of`; otherwise view 1 comes first, then view 2, and the columns keep their order.
    """
    n, f = h1.shape
    out = torch.empty(2 * padded_n, padded_f, dtype=torch.float16, device=h1.device)
    scale, norm = (torch.empty(2 * padded_n, dtype=torch.float32, device=h1.device) for _ in range(2))
    launch(
        cast_embeddings_kernel,
        (ceil_div(padded_n, IMAGES), 2),
        h1,
        h2,
        out,
        scale,
        norm,
        n,
        f,
        padded_n,
        padded_f,
        h1.stride(0),
        h2.stride(0),
        LOG2_E / tau,
        PAIRED=paired,
        IMAGES=IMAGES,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out, scale, norm
