from __future__ import annotations

import pytest
import torch

from falcon_fast.devices import find_device, mixed_precision
from falcon_fast.errors import UsageError


def test_auto_is_the_gpu_if_there_is_one():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_mixed_precision_only_where_bfloat16_is_native(monkeypatch):
    cpu = torch.device("cpu")
    assert mixed_precision(False, cpu) == (None, ())
    assert mixed_precision(True, torch.device("cuda")) == (torch.bfloat16, ())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert mixed_precision(True, cpu) == (torch.bfloat16, ())
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    dtype, (line,) = mixed_precision(True, cpu)
    assert dtype is None and "float32" in line
