"""Hadamard codes of widths without kernels; the transform itself is tested through the loss."""

from __future__ import annotations

import pytest
import torch

from falcon_fast import HadamardCodes, RademacherCodes

pytest.importorskip("triton")

from falcon_fast.kernels.gpu.loss import transform


def test_hadamard_codes_of_an_unserved_width_are_the_same_codes() -> None:
    for f, c in ((8, 32), (64, 192)):
        codes = HadamardCodes(f, c, seed=3)
        packed = transform.as_dense(codes.words, f, c)
        same = RademacherCodes.from_dense(codes.dense())
        assert torch.equal(packed, same.words)
