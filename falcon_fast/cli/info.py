"""`falcon-fast info`: versions, devices, implementations that work on this machine, and recipes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import click
import torch

from falcon_fast import __version__
from falcon_fast.config import TrainingConfig, recipe_description, recipe_names
from falcon_fast.data.loaders.shared_memory import described
from falcon_fast.hardware.cuda import installed, mismatches
from falcon_fast.hardware.devices import cpu_name
from falcon_fast.hardware.precision import choose_precision
from falcon_fast.hardware.processors import usable_processors
from falcon_fast.kernels import cpu_extension, loss_implementations, why_no_extension, why_no_triton

PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "scikit-learn")


@click.command(short_help="Show versions, devices and recipes.")
def info() -> None:
    """Show versions, devices, the implementations that work on this machine, and the recipes."""
    for line in report():
        click.echo(line)


def report() -> Iterator[str]:
    """Yield the lines of `falcon-fast info`."""
    yield f"falcon_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = installed()
    dali = found.dali or ("nvidia-dali",)
    yield "packages: " + ", ".join(f"{name} {_version(name)}" for name in (*PACKAGES, *dali))
    yield f"CPU: {cpu_name()}, {usable_processors():.3g} processors usable, {torch.get_num_threads()} torch threads"
    yield described()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
            yield f"cuda:{index}: {device.name}, {memory:.0f} GiB, compute capability {capability}"
    else:
        yield "CUDA: no device"
    yield from (f"CUDA: {line}" for line in mismatches(found))
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        precision, _ = choose_precision(TrainingConfig(precision="bf16"), torch.device(kind))
        yield f"{kind}: loss {', '.join(loss_implementations(torch.device(kind)))}; --amp trains in {precision}"
    if cpu_extension is not None:
        yield f"C++ kernels: built, running {cpu_extension.level()}"
    else:
        yield f"C++ kernels: not in use, PyTorch does their work more slowly: {why_no_extension()}"
    triton = why_no_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield f"Triton kernels: {'not used: ' + triton if triton else 'run here'}"
    yield "recipes:"
    for name in recipe_names():
        yield f"  {name:16} {recipe_description(name)}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"
