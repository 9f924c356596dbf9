"""The table of GPUs: found by the names that CUDA gives, and consistent in itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from falcon_fast.kernels.gpu.devices import DEVICES, TABLE, Reached, known_device, nearest_device


@pytest.mark.parametrize(
    ("name", "half", "bandwidth", "gigabytes", "reached"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12, 40, "a100"),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 80, "a100"),
        ("NVIDIA A100 80GB PCIe", 312e12, 1.935e12, 80, "a100"),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 80, "h100"),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12, 80, "h100"),
        ("NVIDIA H100 NVL", 835e12, 3.9e12, 94, "h100"),
        ("NVIDIA H200", 989e12, 4.8e12, 141, "h200"),
        ("NVIDIA H200 NVL", 835e12, 4.8e12, 141, "h200"),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives_them(name, half, bandwidth, gigabytes, reached):
    device = known_device(name)
    sheet = device.sheet
    assert sheet.half == half and sheet.bandwidth == bandwidth and sheet.memory == gigabytes * 1e9
    assert sheet.half == pytest.approx(2 * sheet.tf32, rel=0.01) and sheet.tf32 > sheet.float32
    assert device.name == reached.upper() and device.reached == DEVICES[reached].reached


def test_others_are_not_known_and_have_a_nearest():
    assert known_device("NVIDIA GeForce RTX 4090") is None
    assert nearest_device("NVIDIA A100-SXM4-80GB", (8, 0)).name == "A100"
    assert nearest_device("NVIDIA H200", (9, 0)).name == "H200"
    assert nearest_device("NVIDIA L40S", (8, 9)).name == "A100"
    assert nearest_device("NVIDIA B200", (10, 0)).name == "H100"


def test_the_devices_that_a_user_names():
    """The published figures of the SXM models: memory, processors, capability; and NVLink, of which an all-reduce uses a part."""
    facts = {key: (x.sheet.memory, x.processors, x.capability) for key, x in DEVICES.items()}
    assert facts == {
        "a100": (80e9, 108, (8, 0)),
        "h100": (80e9, 132, (9, 0)),
        "h200": (141e9, 132, (9, 0)),
    }
    nvlink = {"a100": 300e9, "h100": 450e9, "h200": 450e9}  # bytes/s each way
    assert all(0.7 < device.reached.all_reduce / nvlink[key] < 1 for key, device in DEVICES.items())


@pytest.mark.parametrize("key", DEVICES)
def test_what_is_reached_is_below_the_data_sheet(key):
    reached, sheet = DEVICES[key].reached, DEVICES[key].sheet
    assert reached.half_products < sheet.half and reached.float_products < sheet.float32
    assert reached.bandwidth < sheet.bandwidth


def test_what_is_called_measured_are_rates():
    rates = {field.name for field in dataclasses.fields(Reached)} - {"measured"}
    assert all(set(device.reached.measured) <= rates for device in TABLE)
    assert set(DEVICES["h100"].reached.measured) == {"half_products", "bandwidth"}


def test_the_table_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import falcon_fast.kernels.gpu.devices"
    subprocess.run([sys.executable, "-c", code], check=True)
