"""What the tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 noisy PNG images in two class folders, of which 4 are held out."""
    random_state, root = np.random.RandomState(0), tmp_path_factory.mktemp("stops") / "images"
    for name, level in (("dark", 60), ("light", 190)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(random_state.normal(level, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root
