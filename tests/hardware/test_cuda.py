"""Driver, torch and DALI that do not fit together, on made-up machines."""

from __future__ import annotations

import ctypes
import dataclasses
import types
from importlib import metadata

import pytest

from falcon_fast.hardware import cuda
from falcon_fast.hardware.cuda import Installed, installed, mismatches

D120, D130 = "nvidia-dali-cuda120", "nvidia-dali-cuda130"
GOOD = Installed(driver=(13, 0), kernel_module=True, torch_cuda="13.0", hip=False, usable=True, dali=(D130,))
CUDA_12 = dataclasses.replace(GOOD, driver=(12, 4), torch_cuda="12.6", dali=(D120,))
CPU_ONLY = Installed(driver=None, kernel_module=False, torch_cuda="13.0", hip=False, usable=False, dali=(D130,))


def lines(base: Installed, **changes) -> list[str]:
    return list(mismatches(dataclasses.replace(base, **changes)))


@pytest.mark.parametrize(
    "machine",
    [
        GOOD,
        CUDA_12,
        CPU_ONLY,
        dataclasses.replace(CPU_ONLY, torch_cuda=None, dali=()),
        dataclasses.replace(GOOD, torch_cuda="12.6", dali=(D120,)),  # a new driver runs old programs
        dataclasses.replace(GOOD, torch_cuda=None, hip=True, usable=True, driver=None, kernel_module=False, dali=()),
    ],
    ids=["cuda13", "cuda12", "no-gpu", "cpu-torch", "cuda12-on-13", "amd"],
)
def test_what_fits_is_not_spoken_of(machine):
    assert list(mismatches(machine)) == []


def test_torch_for_cuda_13_on_a_driver_of_cuda_12():
    torch_line, dali_line = lines(GOOD, driver=(12, 4), usable=False)
    assert torch_line == (
        "torch is built for CUDA 13.0, but the driver runs CUDA 12.4 at most: pip install --force-reinstall torch torchvision "
        "--index-url https://download.pytorch.org/whl/cu126 (or update the driver to 580 or newer)"
    )
    assert dali_line == f"{D130} needs a driver of CUDA 13: pip uninstall -y {D130} && pip install {D120}"


def test_dali_for_cuda_13_beside_a_torch_that_works():
    assert lines(CUDA_12, dali=(D130,)) == [
        f"{D130} needs a driver of CUDA 13: pip uninstall -y {D130} && pip install {D120}"
    ]


@pytest.mark.parametrize(("base", "keep"), [(GOOD, D130), (CUDA_12, D120), (CPU_ONLY, D130)], ids=["13", "12", "none"])
def test_two_dalis_overwrite_each_other(base, keep):
    (line,) = lines(base, dali=(D120, D130))
    assert "overwrite each other" in line and line.endswith(f"pip uninstall -y {D120} {D130} && pip install {keep}")


@pytest.mark.parametrize(("driver", "index"), [((12, 2), True), ((13, 1), False)])
def test_a_torch_without_cuda_beside_a_driver(driver, index):
    (line,) = lines(GOOD, driver=driver, torch_cuda=None, usable=False, dali=())
    assert "torch is built without CUDA" in line and f"CUDA {driver[0]}.{driver[1]}" in line
    assert line.endswith("/whl/cu126") is index


def test_a_driver_that_is_too_old_for_everything():
    (line,) = lines(GOOD, driver=(11, 8), usable=False, dali=())
    assert "CUDA 11.8" in line and "update the driver" in line


def test_a_container_without_the_driver_s_library():
    (line,) = lines(GOOD, driver=None, usable=False, dali=())
    assert "libcuda.so.1 is not here" in line and "--gpus all" in line


def test_versions_that_fit_without_a_gpu():
    (line,) = lines(CUDA_12, usable=False)
    assert "CUDA_VISIBLE_DEVICES" in line


class _Driver:
    def __init__(self, number: int, code: int = 0) -> None:
        self.number, self.code = number, code

    def cuDriverGetVersion(self, place) -> int:
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int)).contents.value = self.number
        return self.code


@pytest.mark.parametrize(
    ("library", "version"),
    [
        (_Driver(12040), (12, 4)),
        (_Driver(13000), (13, 0)),
        (_Driver(0), None),
        (_Driver(12040, code=34), None),  # a stub library
        (types.SimpleNamespace(), None),
        (None, None),
    ],
    ids=["12.4", "13.0", "zero", "stub", "other", "missing"],
)
def test_the_driver_is_asked_for_its_version(monkeypatch, library, version):
    def load(name):
        assert name == "libcuda.so.1"
        if library is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return library

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    assert cuda.driver_version() == version


def test_what_is_installed_here():
    names = {dist.metadata["Name"] for dist in metadata.distributions()}
    found = installed()
    assert set(found.dali) == {D120, D130} & names
    assert isinstance(found.usable, bool) and (found.driver is None or found.driver[0] > 0)
