"""Packed codes expanded to fp16 in memory, some thousands at a time, for products that are large enough to make that pay."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch
from falcon_fast.kernels.gpu.tiles import expand_signs


@triton.jit
def expand_kernel(
    p_words, p_out, count, f, words_per_code, ORDERED: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr
):
    o_code = tl.program_id(0) * CODES + tl.arange(0, CODES)
    o_word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    m = (o_code < count)[:, None] & (o_word < words_per_code)[None, :]
    b_words = tl.load(p_words + o_code[:, None].to(tl.int64) * words_per_code + o_word[None, :], mask=m, other=0)
    if ORDERED:
        b_bits = (b_words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        b_signs = (2 * b_bits - 1).to(tl.float16).reshape(CODES, 32 * WORDS)
    else:
        b_signs = expand_signs(b_words)
    o_feature = tl.program_id(1) * (32 * WORDS) + tl.arange(0, 32 * WORDS)
    m_out = (o_code < count)[:, None] & (o_feature < f)[None, :]
    tl.store(p_out + o_code[:, None].to(tl.int64) * f + o_feature[None, :], b_signs, mask=m_out)


def expand_codes(words: torch.Tensor, out: torch.Tensor, ordered: bool) -> None:
    """Expand packed signs (count, words per code) into `out`, fp16 (count, f).

    The features are in order if `ordered`. Otherwise they have the order of `tiles.feature_of`, f may be any multiple of 32,
    and the entries of absent features are -1.
    """
    count, f = out.shape
    launch(
        expand_kernel,
        (ceil_div(count, 16), ceil_div(f, 32 * 8)),
        words,
        out,
        count,
        f,
        words.shape[1],
        ORDERED=ordered,
        CODES=16,
        WORDS=8,
        num_warps=4,
    )
