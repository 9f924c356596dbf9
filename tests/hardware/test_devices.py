from __future__ import annotations

import pytest
import torch

from falcon_fast.errors import UsageError
from falcon_fast.hardware.devices import find_device


def test_auto_is_the_gpu_if_there_is_one():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
