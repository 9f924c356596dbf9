from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast import HadamardCodes, RademacherCodes


def digest(codes) -> str:
    return hashlib.sha256(codes.words.numpy().astype("<i4").tobytes()).hexdigest()[:16]


def test_the_stream_never_changes():
    # Pinned: a checkpoint stores the seed in place of the dictionary, so these may never differ.
    assert RademacherCodes(32, 4, seed=0).words.flatten().tolist() == PINNED_WORDS
    assert digest(RademacherCodes(100, 777, seed=3)) == PINNED_RADEMACHER
    assert digest(HadamardCodes(64, 256, seed=3)) == PINNED_HADAMARD


PINNED_WORDS = [149215387, 49592932, -1666660942, 1037445899]
PINNED_RADEMACHER = "b06a1ad724a1183a"
PINNED_HADAMARD = "012a245fcccd8d72"


@settings(max_examples=40)
@given(f=st.integers(1, 100), c=st.integers(2, 60), seed=st.integers(0, 2**64 - 1))
def test_layout_and_round_trip(f, c, seed):
    codes = RademacherCodes(f, c, seed)
    words = codes.words.numpy().view(np.uint32)
    assert words.shape == (c, -(-f // 32)) and codes.words.dtype == torch.int32
    dense = codes.dense(torch.float64).numpy()
    assert dense.shape == (f, c)
    for feature in range(f):
        bit = (words[:, feature // 32] >> np.uint32(feature % 32)) & np.uint32(1)
        np.testing.assert_array_equal(dense[feature], 2.0 * bit - 1)
    if f % 32:
        assert (words[:, -1] >> np.uint32(f % 32) == 0).all()  # padding
    again = RademacherCodes.from_dense(codes.dense(torch.int8))
    assert torch.equal(again.words, codes.words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_dense_in_every_dtype(dtype):
    for codes in (RademacherCodes(48, 96, seed=1), HadamardCodes(16, 96, seed=1)):
        dense = codes.dense(dtype)
        assert dense.dtype == dtype
        assert torch.equal(dense.double(), codes.dense(torch.float64))
        assert torch.equal(dense.double().abs(), torch.ones(codes.f, codes.c, dtype=torch.float64))


def test_signs_are_fair_and_independent():
    w = RademacherCodes(256, 1024, seed=5).dense(torch.float64)
    assert abs(w.mean().item()) < 4 / (256 * 1024) ** 0.5
    gram = (w.T @ w / 256).fill_diagonal_(0)
    assert gram.std().item() == pytest.approx(1 / 16, rel=0.02)  # cosines of independent signs: 1/sqrt(f)
    other = RademacherCodes(256, 1024, seed=6).dense(torch.float64)
    assert abs((w * other).mean().item()) < 4 / (256 * 1024) ** 0.5


def test_hadamard_is_exactly_tight_and_orthogonal_inside_a_block():
    from scipy.linalg import hadamard

    codes = HadamardCodes(32, 128, seed=7)
    w = codes.dense(torch.float64)
    assert torch.equal(w @ w.T, 128 * torch.eye(32, dtype=torch.float64))
    signs = w[:, ::32]  # Sylvester's first column is all ones: what is left of it is D_k
    for k in range(4):
        expected = signs[:, k : k + 1].numpy() * hadamard(32)
        np.testing.assert_array_equal(w[:, 32 * k : 32 * (k + 1)].numpy(), expected)
    assert not torch.equal(signs[:, 0], signs[:, 1])
    assert codes.words.shape == (4, 1)


def test_coherence_between_blocks_beside_rademacher():
    """Cosines of codes of different blocks: the same mean square as of independent signs, exactly; and a smaller largest one."""
    f, c = 512, 8192
    largest = {}
    for kind in (RademacherCodes, HadamardCodes):
        w = kind(f, c).dense()
        cosines = w[:, :f].T @ w[:, f:] / f  # of the first f codes with all the others
        assert cosines.square().mean().sqrt().item() == pytest.approx(
            f**-0.5, rel=1e-6 if kind is HadamardCodes else 1e-2
        )
        largest[kind] = cosines.abs().max().item() * f**0.5
    assert largest[HadamardCodes] < largest[RademacherCodes] < 7


def test_no_code_enters_a_state_dict_but_it_moves():
    codes = RademacherCodes(64, 16)
    assert not codes.state_dict()
    assert dict(codes.named_buffers()).keys() == {"words"}
    assert not list(codes.parameters())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: RademacherCodes(0, 8), "width"),
        (lambda: RademacherCodes(8, 1), "at least 2"),
        (lambda: RademacherCodes(8, 8, seed=-1), "negative"),
        (lambda: HadamardCodes(12, 24), "power of two"),
        (lambda: HadamardCodes(16, 24), "multiple"),
        (lambda: RademacherCodes.from_dense(torch.zeros(4, 4)), "-1 and"),
        (lambda: RademacherCodes.from_dense(torch.ones(4)), "matrix"),
    ],
)
def test_bad_input(make, word):
    with pytest.raises(ValueError, match=word):
        make()
