"""The package as a whole."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_is_light():
    heavy = ["click", "rich", "nvidia.dali", "matplotlib", "sklearn", "scipy", "timm", "torchvision", "PIL", "triton"]
    code = (
        "import sys, torch, numpy; had = set(sys.modules); import falcon_fast; "
        f"print([m for m in {heavy} if m in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"
