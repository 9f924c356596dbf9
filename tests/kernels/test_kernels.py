from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast import RademacherCodes, falcon_loss, kernels
from falcon_fast.kernels.gpu import support


def test_the_extension_is_built_where_there_is_a_compiler():
    import shutil

    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert kernels.cpu_extension is not None


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


def test_where_triton_does_not_run_the_reason_is_named(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(support, "INTERPRETING", False)
    assert kernels.loss_implementations(cpu) == ("cpu", "reference")
    h, codes = torch.randn(2, 32), RademacherCodes(32, 64)
    with pytest.raises(ValueError, match=r"'triton' does not run on cpu \(it needs an NVIDIA GPU\): choose auto"):
        falcon_loss(h, h, codes, 1.0, implementation="triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7, minor=5))
    assert kernels.loss_implementations(cuda) == ("reference",) and "this GPU has 7.5" in kernels.why_no_triton(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=0))
    assert kernels.loss_implementations(cuda) == ("triton", "reference") and kernels.why_no_triton(cuda) is None
    monkeypatch.setattr(support, "HAS_TRITON", False)
    assert (
        kernels.loss_implementations(cuda) == ("reference",)
        and kernels.why_no_triton(cuda) == "triton is not installed"
    )
