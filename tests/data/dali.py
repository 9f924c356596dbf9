"""DALI is an extra: the tests that need it are skipped where it is not installed."""

from __future__ import annotations

import pytest

try:
    import nvidia.dali  # noqa: F401
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

needs_dali = pytest.mark.skipif(not INSTALLED, reason="DALI, an extra (cuda12 or cuda13), is not installed")
DALI = pytest.param("dali", marks=needs_dali)  # as one of the loaders that a test is about
