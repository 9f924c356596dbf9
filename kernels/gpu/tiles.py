"""Functions that several kernels call: unpacking signs, splitting an accumulator into two views, Hadamard matrices, constants.

Prefixes: b_ block in registers, p_ pointers, o_ offsets, m_ masks, i_ program ids. Statistics are float32 and in units of
log 2 (u = z log2 e), because the hardware's exponential is exp2. Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

# A stored logit (fp16) that stands for an absent one: exp2 of it is 0, and 0 times it is 0, where -inf would give NaN.
ABSENT = tl.constexpr(-60000.0)

# In an accumulator of 2 R rows the two views of R images alternate every 8 rows. The tensor cores leave rows r and r + 8 of each
# 16 in the same thread, so the two views of an image are in the registers of one thread.
PAIR = tl.constexpr(8)


@triton.jit
def paired_row(i_view, o_image):
    """Return the row of an image of a view in the paired order: 8 images of view 1, the same 8 of view 2, and so on."""
    return (o_image // PAIR) * (2 * PAIR) + i_view * PAIR + o_image % PAIR


@triton.jit
def split_views(b_both, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Split a paired tile [2 ROWS, WIDTH] into the tiles [ROWS, WIDTH] of both views. Register moves only (checked in SASS)."""
    b_1, b_2 = tl.split(b_both.reshape(ROWS // PAIR, 2, PAIR, WIDTH).permute(0, 2, 3, 1))
    return b_1.reshape(ROWS, WIDTH), b_2.reshape(ROWS, WIDTH)


@triton.jit
def feature_of(o_position):
    """Return the feature at a position of an expanded code, in which bits j and j + 16 of a word are neighbours."""
    return (o_position // 32) * 32 + (o_position % 32) // 2 + (o_position % 2) * 16


@triton.jit
def expand_signs(b_words):
    """Expand packed signs int32 [R, K] to fp16 [R, 32 K] of -1 and +1, at the positions of `feature_of`.

    One shift and one three-input logic operation give two signs: bits j and j + 16 become the sign bits of the two halves of a
    word whose other bits are those of 1.0 twice. (Bit by bit, each sign costs four operations and a packing.)
    """
    b_pairs = b_words[:, :, None] << (15 - tl.arange(0, 16))[None, None, :]
    b_pairs = (b_pairs & -2147450880) ^ -1140802560  # & 0x80008000, ^ 0xBC00BC00
    b_both = tl.join(b_pairs.to(tl.int16), (b_pairs >> 16).to(tl.int16))
    return b_both.reshape(b_words.shape[0], 32 * b_words.shape[1]).to(tl.float16, bitcast=True)


@triton.jit
def hadamard_columns(first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Return WIDTH columns of Sylvester's matrix of SIZE (a power of two up to 256), fp16: entry i, j is (-1)^popcount(i & j)."""
    b_bits = tl.arange(0, SIZE)[:, None] & (first + tl.arange(0, WIDTH))[None, :]
    b_bits ^= b_bits >> 4
    b_bits ^= b_bits >> 2
    b_bits ^= b_bits >> 1
    return (1 - 2 * (b_bits & 1)).to(tl.float16)


@triton.jit
def hadamard_matrix(SIZE: tl.constexpr):
    """Return Sylvester's matrix, fp16 [SIZE, SIZE]."""
    return hadamard_columns(0, SIZE, SIZE)


@triton.jit
def not_below(b_x, LEAST: tl.constexpr):
    """Return max(x, LEAST); a NaN stays a NaN."""
    return tl.where(b_x < LEAST, LEAST, b_x)
