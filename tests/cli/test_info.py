"""`falcon-fast info`."""

from __future__ import annotations

import torch


def test_info(falcon_fast):
    code, out, _ = falcon_fast("info")
    assert code == 0
    for piece in (torch.__version__.partition("+")[0], "reference", "C++ kernels", "cifar10-resnet8"):
        assert piece in out
