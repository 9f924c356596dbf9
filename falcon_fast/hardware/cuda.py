"""Whether the NVIDIA driver, torch and DALI of this machine fit together, and the command that mends it where they do not.

A driver runs programs that are built for its own CUDA version and older ones, and within a major version also for newer minor
ones (NVIDIA's "CUDA compatibility"). So a driver of CUDA 12 (525 to 575) cannot run torch for CUDA 13, which is what PyPI has:
`torch.cuda.is_available()` is then False although there is a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

# PyTorch's own index of builds for CUDA 12; they run on drivers from 525 on.
TORCH_12 = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu126"
TORCH_PYPI = "pip install --force-reinstall torch torchvision"
DALI = {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"}  # by CUDA's major version


@dataclass(frozen=True)
class Installed:
    """What is installed on a machine.

    Attributes:
        driver: the newest CUDA version of the driver, (12, 4) for 12.4; None if libcuda is not there or does not answer.
        kernel_module: whether the driver's kernel module is loaded.
        torch_cuda: the CUDA version that torch is built for; None if it is built without CUDA.
        hip: whether torch is built for AMD GPUs.
        usable: whether torch finds a GPU.
        dali: the names of the installed DALI packages.
    """

    driver: tuple[int, int] | None
    kernel_module: bool
    torch_cuda: str | None
    hip: bool
    usable: bool
    dali: tuple[str, ...]


def installed() -> Installed:
    """Return what is installed here. Does not start CUDA, apart from torch's question for devices."""
    return Installed(
        driver=driver_version(),
        kernel_module=Path("/proc/driver/nvidia/version").exists(),
        torch_cuda=torch.version.cuda,
        hip=torch.version.hip is not None,
        usable=torch.cuda.is_available(),
        dali=dali_packages(),
    )


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version of the NVIDIA driver, as (major, minor); None without a driver."""
    number = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):  # no such library, or something else of that name
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value > 0 else None


def dali_packages() -> tuple[str, ...]:
    """Return the names of the DALI packages that are installed, oldest CUDA version first."""
    return tuple(name for name in DALI.values() if _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def mismatches(found: Installed) -> Iterator[str]:
    """Yield a line for each thing that keeps a GPU from being used, with the command that mends it."""
    yield from _torch_mismatch(found)
    if len(found.dali) > 1:
        keep = DALI[12 if _is_older(found) else 13]
        yield (
            f"{' and '.join(found.dali)} are both installed and overwrite each other's files: pip uninstall -y "
            f"{' '.join(found.dali)} && pip install {keep}"
        )
    elif found.dali == (DALI[13],) and _is_older(found):
        yield f"{DALI[13]} needs a driver of CUDA 13: pip uninstall -y {DALI[13]} && pip install {DALI[12]}"


def _torch_mismatch(found: Installed) -> Iterator[str]:
    if found.hip or found.usable:
        return
    if found.driver is None:
        if found.kernel_module:
            yield (
                "the machine has an NVIDIA driver, but its library libcuda.so.1 is not here: in a container, start it with "
                "--gpus all (Docker) or --nv (Apptainer)"
            )
        return
    if found.driver[0] < 12:
        yield f"the driver is one of CUDA {_text(found.driver)}: torch needs CUDA 12 or newer; update the driver to 525 or newer"
    elif found.torch_cuda is None:
        command = TORCH_12 if _is_older(found) else TORCH_PYPI
        yield f"torch is built without CUDA, but the driver runs CUDA {_text(found.driver)}: {command}"
    elif int(found.torch_cuda.partition(".")[0]) > found.driver[0]:
        yield (
            f"torch is built for CUDA {found.torch_cuda}, but the driver runs CUDA {_text(found.driver)} at most: {TORCH_12} "
            "(or update the driver to 580 or newer)"
        )
    else:
        yield (
            f"torch (CUDA {found.torch_cuda}) and the driver (CUDA {_text(found.driver)}) fit, but torch finds no GPU: see "
            "nvidia-smi, and whether CUDA_VISIBLE_DEVICES hides it"
        )


def _is_older(found: Installed) -> bool:
    """Whether the driver cannot run CUDA 13; without a driver, whether torch is built for CUDA 12."""
    if found.driver is not None:
        return found.driver[0] < 13
    return (found.torch_cuda or "").startswith("12.")


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
