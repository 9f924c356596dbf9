"""Dictionaries: c codes of f entries, each -1 or +1, drawn once from a seed and frozen.

Both kinds are stored as sign bits, 32 to an int32 word: bit b of word k is feature 32 k + b, a set bit is +1, padding is
0. The bits come from numpy's Philox counter generator through `random_raw`, whose stream numpy promises to keep, so that a
seed gives the same dictionary on every machine and in every version. The words are kept in a non-persistent buffer: they move
with `.to(device)` and are not written to checkpoints, which store the seed instead (the published code stores float32, 128 MiB
at f = 2048, c = 16384; the bits are 4 MiB).

* `RademacherCodes`: independent signs, as in the paper; any two codes have a cosine of about 1/sqrt(f).
* `HadamardCodes`: W = [D_1 H, D_2 H, ...] with Sylvester's Hadamard matrix H and a diagonal D_k of random signs for each block.
  Codes of one block are exactly orthogonal, W W^T = c I exactly, and only f signs are stored for each block of f codes.

Coherence (the cosine of two codes times sqrt(f)), measured over all pairs at f = 2048, c = 16384: Rademacher 1.00 root mean
square, 5.9 maximum; Hadamard 0 within a block, 1.00 and 4.3 between blocks. At f = 512, c = 8192: 1.00, 6.0; 1.00, 4.4.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import nn

from falcon_fast.kernels import pack_signs, unpack_signs


def _random_sign_words(seed: int, rows: int, f: int) -> torch.Tensor:
    """Return the packed signs of `rows` codes of width f from the Philox stream of `seed`, int32 (rows, ceil(f/32))."""
    if seed < 0:
        raise ValueError(f"the seed of the codes must not be negative, not {seed}")
    words_per_row = -(-f // 32)
    count = rows * words_per_row
    raw = np.random.Philox(key=seed).random_raw(-(-count // 2))
    halves = np.empty((raw.size, 2), np.uint32)  # low word first, whatever the machine's byte order
    halves[:, 0] = raw & np.uint64(0xFFFFFFFF)
    halves[:, 1] = raw >> np.uint64(32)
    words = halves.reshape(-1)[:count].reshape(rows, words_per_row)
    if f % 32:
        words[:, -1] &= np.uint32((1 << (f % 32)) - 1)
    return torch.from_numpy(words.view(np.int32))


class _Codes(nn.Module):
    """The base of both dictionaries: the shape (f, c), the packed words, and the printed form."""

    words: torch.Tensor

    def __init__(self, f: int, c: int, words: torch.Tensor, seed: int | None) -> None:
        super().__init__()
        self.f, self.c, self.seed = f, c, seed
        self.register_buffer("words", words, persistent=False)

    def extra_repr(self) -> str:
        return f"f={self.f}, c={self.c}, seed={self.seed}"

    @staticmethod
    def _check_shape(f: int, c: int) -> None:
        if f < 1:
            raise ValueError(f"the width f of a code must be at least 1, not {f}")
        if c < 2:
            raise ValueError(f"a dictionary needs at least 2 codes, not {c}")


class RademacherCodes(_Codes):
    """c independent codes of f random signs.

    Args:
        f: width of a code, at least 1.
        c: number of codes, at least 2.
        seed: seed of the Philox stream, not negative. The same seed gives the same codes everywhere.

    Attributes:
        words: int32 (c, ceil(f/32)), packed signs; a non-persistent buffer.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, f: int, c: int, seed: int = 0) -> None:
        self._check_shape(f, c)
        super().__init__(f, c, _random_sign_words(seed, c, f), seed)

    @classmethod
    def from_dense(cls, codes: torch.Tensor) -> Self:
        """Return the dictionary whose columns are given: `codes` (f, c) of any real dtype, every entry -1 or +1.

        Raises:
            ValueError: if `codes` is not a matrix, has fewer than 2 columns, or has an entry other than -1 and +1.
        """
        if codes.dim() != 2:
            raise ValueError(f"dense codes must be a matrix (f, c), not of shape {tuple(codes.shape)}")
        f, c = codes.shape
        cls._check_shape(f, c)
        if codes.is_complex() or not bool((codes.abs() == 1).all()):
            raise ValueError("dense codes must hold -1 and +1 only")
        self = cls.__new__(cls)
        _Codes.__init__(self, f, c, pack_signs((codes > 0).T.contiguous()), None)
        return self

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dictionary W, (f, c) of -1 and +1 in `dtype`, on the device of the words (a transposed view)."""
        return unpack_signs(self.words, self.f, dtype).T


class HadamardCodes(_Codes):
    """c / f blocks of f codes; each block is Sylvester's Hadamard matrix with the signs of its rows flipped at random.

    Code k f + j is D_k H[:, j]: feature i has the sign d_k[i] (-1)^popcount(i & j).

    Args:
        f: width of a code, a power of two.
        c: number of codes, a multiple of f, at least 2.
        seed: seed of the Philox stream, not negative.

    Attributes:
        words: int32 (c/f, ceil(f/32)), the packed signs d_k of each block; a non-persistent buffer.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, f: int, c: int, seed: int = 0) -> None:
        self._check_shape(f, c)
        if f & (f - 1):
            raise ValueError(f"Hadamard codes need a width f that is a power of two, not {f}")
        if c % f:
            raise ValueError(f"Hadamard codes come in blocks of f: c must be a multiple of {f}, not {c}")
        super().__init__(f, c, _random_sign_words(seed, c // f, f), seed)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dictionary W, (f, c) of -1 and +1 in `dtype`, on the device of the words."""
        hadamard = torch.ones(1, 1, dtype=dtype, device=self.words.device)
        while hadamard.shape[0] < self.f:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        signs = unpack_signs(self.words, self.f, dtype)  # (c/f, f)
        return (signs[:, :, None] * hadamard).permute(1, 0, 2).reshape(self.f, self.c)


Codes = RademacherCodes | HadamardCodes
