"""Data sets that the tests of the loaders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.data.sources.opening import open_source

from ..images import smooth


@pytest.fixture
def split(image_folder: Path) -> Split:
    """36 images of 24 x 20 pixels with two labels."""
    return open_source(DataConfig(path=str(image_folder))).train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 JPEGs of 100 x 80 in two classes."""
    for i in range(40):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(100, 80, i).save(path)
    return tmp_path / "photos"


@pytest.fixture
def photos(folder: Path) -> Source:
    return open_source(DataConfig(path=str(folder), size=24))
