from __future__ import annotations

import pytest
import torch

from falcon_fast.hardware import peaks
from falcon_fast.hardware.precision import Precision
from falcon_fast.kernels.gpu.loss.cost import DEVICES


@pytest.mark.parametrize(
    ("name", "half", "gigabytes"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 40),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80),
        ("NVIDIA A100 80GB PCIe", 312e12, 80),
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA H100 NVL", 835e12, 94),
        ("NVIDIA H200", 989e12, 141),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives_them(name, half, gigabytes):
    peak = peaks.known_peak(name)
    assert peak.half == half and peak.memory == gigabytes * 1e9
    assert peak.half == pytest.approx(2 * peak.tf32, rel=0.01) and peak.tf32 > peak.float32


def test_others_are_not_known():
    assert peaks.known_peak("NVIDIA GeForce RTX 4090") is None
    assert peaks.known_rate(torch.device("cpu"), Precision("bf16", True)) is None


@pytest.mark.parametrize("key", DEVICES)
def test_what_is_reached_is_below_the_peak(key):
    reached, peak = DEVICES[key], peaks.known_peak(f"NVIDIA {key} 80GB")
    assert reached.half_products < peak.half and reached.float_products < peak.float32
    assert reached.memory < peak.bandwidth


@pytest.mark.parametrize(
    ("precision", "rate"),
    [
        (Precision("bf16", True), 989e12),
        (Precision("fp16", True), 989e12),
        (Precision("tf32", True), 494e12),
        (Precision("float32", True), 67e12),
        (Precision(), 494e12),  # nobody asked: convolutions are TF32
    ],
)
def test_the_rate_is_the_precisions(monkeypatch, precision, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peaks.known_rate(torch.device("cuda"), precision) == rate


def test_a_measured_product_is_faster_than_nothing(monkeypatch):
    monkeypatch.setattr(peaks, "_seconds", lambda work, device: work() is None or 0.5)
    found = peaks.measure(torch.device("cpu"), Precision())
    assert found == (2 * 2048**3 / 0.5, 2048, torch.float32, 2 * 2**28 / 0.5)
