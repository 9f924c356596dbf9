"""Golden vectors of the loss: inputs and float64 results computed independently of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "golden"
GOLDEN = sorted(path.stem for path in DIRECTORY.glob("*.npz"))


def golden_vectors(name: str) -> Mapping[str, np.ndarray]:
    """The arrays of one of `GOLDEN`, by name."""
    with np.load(DIRECTORY / f"{name}.npz") as arrays:
        return dict(arrays)
