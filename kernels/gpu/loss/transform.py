"""The logits of a block of Hadamard codes, and the transform back, as small matrix products on the tensor cores.

A block of f codes is D H with Sylvester's matrix H and a diagonal D of signs, so a row's logits are H (D h). With f = A B and
feature i = a B + b, H is the Kronecker product of H_A and H_B, and the transform two small matrix products

    t[a, b'] = sum_b x[a, b] H_B[b, b']        z[a' B + b'] = sum_a H_A[a', a] t[a, b']

of A + B multiply-adds per logit instead of f (f = 2048: 96). The first product takes fp16 embeddings and is exact except for the
rounding of float32. The second takes t as the sum of two fp16 numbers, because a single one would add as much error as rounding
the embeddings did. The gradient uses the same transform, dX = D H dZ. Widths below 256 need one product; widths outside 16 ...
2048 are treated as dense dictionaries, whose codes are computed once per step.

In all arrays of codes here, the codes of a block are numbered by their place in the result of the second product, b' A + a'. They
are then read and written in order, and no other code depends on the numbering.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def as_dense(words: torch.Tensor, f: int, c: int) -> torch.Tensor:
    """Return the packed signs (c, ceil(f/32)) of all codes from those of the blocks (c/f, ceil(f/32))."""
    feature = torch.arange(32 * words.shape[1], device=words.device)
    code = torch.arange(f, device=words.device)
    parity = feature[None, :] & code[:, None]
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    # Bit b of a word is flipped where the popcount is odd; 2**31 wraps to the negative number with that bit.
    bits = ((parity & 1 & (feature < f)) << (feature % 32)).view(f, -1, 32).sum(2).to(torch.int32)
    return (words[:, None, :] ^ bits).reshape(c, -1).contiguous()


@triton.jit
def block_flips(p_words, i_block, F: tl.constexpr):
    """Return the sign bits, int16 [F], by which the features of an fp16 row are flipped in a block."""
    o = tl.arange(0, F)
    b_words = tl.load(p_words + i_block * tl.cdiv(F, 32) + o // 32)
    return ((~(b_words >> (o % 32)) & 1) << 15).to(tl.int16)


@triton.jit
def flipped_rows(p_h, o_row, m_row, b_flips, ROWS: tl.constexpr, F: tl.constexpr):
    """Return D h of rows, fp16 [ROWS, F]."""
    o = tl.arange(0, F)
    b_h = tl.load(p_h + o_row[:, None].to(tl.int64) * F + o[None, :], mask=m_row[:, None], other=0.0)
    return (b_h.to(tl.int16, bitcast=True) ^ b_flips[None, :]).to(tl.float16, bitcast=True)


@triton.jit
def transformed(b_x, b_h_b, b_h_a, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr):
    """Return z, float32 [ROWS, WIDTH A], of rows x, fp16 [ROWS, A B], for WIDTH of the b'. Code a' B + b' is at b' A + a'."""
    b_z = tl.dot(b_x.reshape(ROWS * A, B), b_h_b)
    if A > 1:
        b_t = b_z.reshape(ROWS, A, WIDTH).permute(0, 2, 1).reshape(ROWS * WIDTH, A)
        b_high = b_t.to(tl.float16)
        b_low = (b_t - b_high.to(tl.float32)).to(tl.float16)
        b_z = tl.dot(b_low, b_h_a, tl.dot(b_high, b_h_a)).reshape(ROWS, WIDTH * A)
    return b_z


@triton.jit
def back(b_dz, b_h_b, b_h_a, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Return H dZ of rows, float32 [ROWS, A B], from dZ [ROWS, B A] with the places of `transformed`."""
    b_t = b_dz.to(tl.float16)
    if A > 1:
        b_t = tl.dot(b_t.reshape(ROWS * B, A), b_h_a).to(tl.float16)
        b_t = b_t.reshape(ROWS, B, A).permute(0, 2, 1).reshape(ROWS * A, B)
    return tl.dot(b_t, b_h_b).reshape(ROWS, A * B)
