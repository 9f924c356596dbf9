"""Fixtures and settings that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Several workers (pytest -n) share the cores: one thread each, set before torch is imported. OpenMP's threads wait by spinning,
# so that two workers with two threads each on two cores take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# This must happen before anything imports triton, or the package: without a GPU its kernels then run on CPU tensors, in Python.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest

from .commands import copied, falcon_fast, finished  # noqa: F401  # fixtures
from .levels import level  # noqa: F401

# No deadlines: a slow or busy machine is no error. And no random examples: a failure on one machine must appear on all.
hypothesis.settings.register_profile("everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("everywhere")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors and real images, which some machines have next to the repository."""
    if not SHARED.is_dir():
        pytest.skip("there is no folder ../shared")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each test writes its manifests to a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """40 noisy 24 x 20 PNG images in the class folders `dark` and `light`."""
    from PIL import Image

    random = np.random.RandomState(0)
    root = tmp_path / "images"
    for name, gray in (("dark", 60), ("light", 190)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(random.normal(gray, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root
