"""What `falcon-fast info` says about this installation, against what Python itself finds."""

from __future__ import annotations

import importlib.util
import re
import types

import pytest
import torch

from falcon_fast.cli import info


def line(start: str) -> str:
    (found,) = [line for line in info.report() if line.startswith(start)]
    return found


def test_the_extension_is_called_built_where_it_is():
    if importlib.util.find_spec("falcon_fast.kernels._cpu") is None:
        assert "PyTorch does their work" in line("C++ kernels:")
    else:
        assert re.fullmatch(r"C\+\+ kernels: built, running \w[\w ]*", line("C++ kernels:"))


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (types.SimpleNamespace(level=lambda: "avx512"), "C++ kernels: built, running avx512"),
        (None, "PyTorch does their work"),
    ],
)
def test_both_ways_of_an_installation(monkeypatch, extension, said):
    monkeypatch.setattr(info, "cpu_extension", extension)
    found = line("C++ kernels:")
    assert said in found and ("built, running" in found) == (extension is not None)


def test_triton_is_said_to_run_only_where_it_does(monkeypatch):
    monkeypatch.setattr(info, "why_no_triton", lambda device: "")
    assert line("Triton kernels:") == "Triton kernels: run here"
    monkeypatch.setattr(info, "why_no_triton", lambda device: "no GPU")
    assert line("Triton kernels:") == "Triton kernels: not used: no GPU"


def test_versions_are_those_that_are_imported():
    assert f"torch {torch.__version__.partition('+')[0]}" in line("packages:")
