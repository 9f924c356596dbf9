"""Why the compiled module is missing, and what is said of one that is older than the code."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest

from falcon_fast.kernels.cpu import extension


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """The module is missing, and the installed package is in tmp_path."""
    kernels = tmp_path / "falcon_fast/kernels"
    kernels.mkdir(parents=True)
    monkeypatch.setattr(extension, "cpu_extension", None)
    monkeypatch.setattr(extension, "_error", ModuleNotFoundError("No module", name=extension.MODULE))
    found = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(extension.metadata, "distribution", lambda name: found)
    return kernels


def test_there_is_no_reason_where_it_is_in_use(monkeypatch):
    monkeypatch.setattr(extension, "cpu_extension", object())
    assert extension.why_no_extension() is None


def test_not_built(missing):
    reason = extension.why_no_extension()
    assert "not built" in reason and "no C++ compiler at installation" in reason and "\n" not in reason


def test_built_but_the_package_of_a_clone_is_imported(missing):
    (missing / f"_cpu{EXTENSION_SUFFIXES[0]}").touch()
    reason = extension.why_no_extension()
    assert "source tree" in reason and str(missing) in reason and str(extension.KERNELS.parent) in reason
    assert "not built" not in reason and "\n" not in reason


def test_built_here_but_not_loadable(missing, monkeypatch):
    monkeypatch.setattr(extension, "_error", ImportError("undefined symbol: x", name=extension.MODULE))
    assert "undefined symbol: x" in extension.why_no_extension()


def test_not_installed_at_all(missing, monkeypatch):
    def absent(name):
        raise extension.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extension.metadata, "distribution", absent)
    assert "not built" in extension.why_no_extension()


def test_an_extension_older_than_the_code_is_said():
    with pytest.raises(RuntimeError, match=r"older than the code and have no brand_new: run pip install"):
        extension.Compiled(object()).brand_new(1)
