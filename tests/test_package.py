"""The package as a whole."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from falcon_fast import kernels


def test_importing_the_package_is_light():
    heavy = ["click", "rich", "nvidia.dali", "matplotlib", "sklearn", "scipy", "timm", "torchvision", "PIL", "triton"]
    code = (
        "import sys, torch, numpy; had = set(sys.modules); import falcon_fast; "
        f"print([m for m in {heavy} if m in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_the_extension_is_built_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert kernels.cpu_extension is not None


def test_the_triton_kernels_are_tested():
    """On a GPU, or in Triton's interpreter, which has to be chosen before anything imports the package."""
    pytest.importorskip("triton")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert kernels.why_no_triton(place) is None
