from __future__ import annotations

import pytest
import torch

from falcon_fast.hardware import peaks
from falcon_fast.hardware.precision import Precision


def test_only_gpus_of_the_table_are_known(monkeypatch):
    assert peaks.known_rate(torch.device("cpu"), Precision("bf16", True)) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert peaks.known_rate(torch.device("cuda"), Precision("bf16", True)) is None


@pytest.mark.parametrize(
    ("precision", "rate"),
    [
        (Precision("bf16", True), 989e12),
        (Precision("fp16", True), 989e12),
        (Precision("tf32", True), 494e12),
        (Precision("float32", True), 67e12),
        (Precision(), 494e12),  # no precision was asked for: convolutions use TF32
    ],
)
def test_the_rate_is_the_precisions(monkeypatch, precision, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peaks.known_rate(torch.device("cuda"), precision) == rate


def test_a_measured_product_is_faster_than_nothing(monkeypatch):
    monkeypatch.setattr(peaks, "_seconds", lambda work, device: work() is None or 0.5)
    found = peaks.measure(torch.device("cpu"), Precision())
    assert found == (2 * 2048**3 / 0.5, 2048, torch.float32, 2 * 2**28 / 0.5)
