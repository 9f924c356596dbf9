"""Fixtures that the tests of the data share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.cli import main as cli
from falcon_fast.data.sources.images import ImageArray, Split

from .images import smooth


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs `falcon-fast data ...` in this process: (exit code, lines of stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["falcon-fast", "data", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return int(code), out.out.splitlines(), out.err  # type: ignore[call-overload]

    return call


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """40 JPEGs in two classes, of which every eighth lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(40):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(60, 40, i).save(path, **({"exif": exif} if i % 8 == 0 else {}))
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def array_split() -> Split:
    """50 images of 16 x 16 pixels in memory."""
    random = np.random.RandomState(3)
    return Split(ImageArray(random.randint(0, 256, (50, 16, 16, 3)).astype(np.uint8)), np.arange(50) % 7)
