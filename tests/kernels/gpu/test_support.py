"""Whether the Triton kernels run on a device, and the reason if they do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from falcon_fast import RademacherCodes, falcon_loss, kernels
from falcon_fast.kernels.gpu import support


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
