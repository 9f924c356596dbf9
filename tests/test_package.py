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
        "import sys, torch, numpy; had = set(sys.modules); from falcon_fast import *; "
        f"print([m for m in {heavy} if m in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_the_name_of_the_package_and_its_signals_need_no_torch():
    """The command line handles signals before it imports torch, which takes seconds."""
    code = "import sys, falcon_fast.cli.entry; print([m for m in ('torch', 'numpy', 'click') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_those_of_the_objective():
    import falcon_fast
    from falcon_fast import objective

    for name in set(falcon_fast.__all__) - {"__version__"}:
        assert getattr(falcon_fast, name) is getattr(objective, name)
    assert set(falcon_fast.__all__) <= set(dir(falcon_fast)) and not hasattr(falcon_fast, "falcon_slow")


def test_the_extension_is_built_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert kernels.cpu_extension is not None


def test_the_triton_kernels_are_tested():
    """On a GPU, or in Triton's interpreter, which has to be chosen before anything imports the package."""
    pytest.importorskip("triton")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert kernels.why_no_triton(place) is None
