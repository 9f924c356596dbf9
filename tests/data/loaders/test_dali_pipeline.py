"""DALI's graph: it can be built for a GPU, and says why it cannot start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from falcon_fast.data.loaders import dali_pipeline

from ..images import CPU

pytest.importorskip("nvidia.dali")
import sys


def test_the_graph_for_a_gpu_is_sound() -> None:
    for device in ("cpu", "cuda"):
        assert dali_pipeline.build_pipeline(lambda: None, 4, 224, torch.device(device), 0).serialize()


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dali_pipeline.why_not(CPU) is None
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = dali_pipeline.why_not(CPU)
    assert reason is not None and "\n" not in reason and "pip install nvidia-dali-cuda1" in reason


def test_regions_of_mirrored_views_have_left_and_right_exchanged() -> None:
    boxes = np.array([[[1, 2, 10, 20], [3, 4, 30, 40]], [[5, 6, 50, 60], [7, 8, 70, 80]]])  # top, left, height, width
    flips = np.array([[False, True], [True, False]])
    begin_1, end_1, begin_2, end_2 = dali_pipeline.regions(boxes, flips)
    assert begin_1.dtype == np.float32
    assert begin_1.tolist() == [[1, 2], [3, 44]] and end_1.tolist() == [[11, 22], [33, 4]]
    assert begin_2.tolist() == [[5, 66], [7, 8]] and end_2.tolist() == [[55, 6], [77, 88]]
