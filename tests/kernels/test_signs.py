"""Packing and unpacking of signs, by the extension and in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast import kernels


@settings(max_examples=60)
@given(rows=st.integers(1, 20), f=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_extension_and_torch_agree_bit_for_bit(rows, f, seed):
    signs = torch.from_numpy(np.random.RandomState(seed).rand(rows, f) < 0.5)
    words = kernels.pack_signs(signs)
    unpacked = kernels.unpack_signs(words, f, torch.float32)
    assert torch.equal(unpacked > 0, signs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("falcon_fast.kernels.signs.cpu_extension", None)
        assert torch.equal(kernels.pack_signs(signs), words)
        assert torch.equal(kernels.unpack_signs(words, f, torch.float32), unpacked)


def test_the_extension_refuses_shapes_that_do_not_fit():
    if kernels.cpu_extension is None:
        pytest.skip("extension not built")
    words, signs = np.zeros((3, 2), np.int32), np.zeros((3, 65), np.float32)
    with pytest.raises(ValueError, match="ceil"):
        kernels.cpu_extension.unpack_signs(words, signs)
    with pytest.raises(ValueError, match="ceil"):
        kernels.cpu_extension.pack_signs(np.zeros((2, 64), np.uint8), words)
    with pytest.raises(TypeError):
        kernels.cpu_extension.unpack_signs(words.astype(np.int64), signs)
