"""The compiled module refuses what does not fit; why it is missing, and what is said of one older than the code."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import numpy as np
import pytest

from falcon_fast.kernels import cpu_extension
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


@pytest.mark.skipif(cpu_extension is None, reason="extension not built")
def test_the_extension_refuses_what_does_not_fit():
    z, words = np.zeros((2, 3, 128), np.float32), np.zeros((100, 2), np.int32)
    state, terms = np.zeros((3, 8)), np.zeros((2, 3, 4), np.float32)
    columns = [np.zeros((2, 128), np.float32) for _ in range(4)]
    a, scale = np.zeros((6, 64), np.int32), np.zeros(6, np.float32)
    h, dh = np.zeros((3, 64), np.float32), np.zeros((6, 64), np.float32)
    e = cpu_extension
    e.dense_logits(z, a, scale, words, 0, 100, False, 1)
    for wrong in (
        lambda: e.dense_logits(z, a, scale, words, 1, 100, False, 1),
        lambda: e.dense_logits(z, a, scale, words, 2**63, 100, False, 1),
        lambda: e.dense_logits(z, a, scale, words, 0, 0, False, 1),
        lambda: e.dense_logits(z, a[:, :32].copy(), scale, words, 0, 100, False, 1),
        lambda: e.dense_logits(z, a, scale[:5], words, 0, 100, False, 1),
        lambda: e.dense_logits(z, a, scale, words, 0, 100, False, 0),
        lambda: e.dense_logits(z[:, :, :100].copy(), a, scale, words, 0, 100, False, 1),
        lambda: e.dense_logits(z[:, :0].copy(), a[:0], scale[:0], words, 0, 100, False, 1),
        lambda: e.dense_gradient(z, words, 0, 100, dh[:, :60].copy(), False, 1),
        lambda: e.dense_gradient(z, words, 0, 129, dh, False, 1),
        lambda: e.strip_rows(z, 0, state[:2], 1),
        lambda: e.strip_columns(z, terms[:, :2].copy(), *columns[:2], 0, 1),
        lambda: e.strip_columns(z, terms, *columns[:2], 128, 1),
        lambda: e.strip_columns(z, terms, columns[0], columns[1][:, :64].copy(), 0, 1),
        lambda: e.prior_columns(*columns[:2], 0.0, 100, False, 0, 256, *columns[2:]),
        lambda: e.strip_prior(z, columns[0], 128, np.zeros((2, 3)), 1),
        lambda: e.strip_gradient(z, terms, *columns[:3], 5, 1.0, 1.0, False, 1),
        lambda: e.strip_encode(z, np.zeros((6, 64), np.uint16), np.zeros((6, 1, 2), np.float32), 0, 1),
        lambda: e.strip_decode(z, np.zeros((6, 128), np.uint16), np.zeros((6, 2, 2), np.float32), 0, 100, 1),
        lambda: e.hadamard_rows(h[:, :48].copy(), h[:, :48].copy(), 1.0, words, 2048, state, 1),
        lambda: e.hadamard_rows(h, h[:2], 1.0, words, 128, state, 1),
        lambda: e.hadamard_rows(h[:0], h[:0], 1.0, words, 128, state[:0], 1),
        lambda: e.hadamard_rows(h, h, 1.0, words, 64, state, 1),
        lambda: e.hadamard_rows(h, h, 1.0, words[:0], 128, state, 1),
        lambda: e.hadamard_gradient(h, h, 1.0, words, 128, terms, *columns[:3], 1.0, 1.0, False, h.copy(), h.copy(), 1),
        lambda: e.hadamard_gradient(
            h, h, 1.0, words[:2], 128, terms, *columns[:3], 1.0, 1.0, False, h.copy(), h[:2].copy(), 1
        ),
        lambda: e.use_level("abacus"),
    ):
        with pytest.raises(ValueError):
            wrong()
    for wrong in (
        lambda: e.strip_rows(z.astype(np.float64), 0, state, 1),
        lambda: e.strip_rows(z[:, :, ::2], 0, state, 1),
        lambda: e.strip_rows(z[0], 0, state, 1),
        lambda: e.strip_rows(z, -1, state, 1),
    ):
        with pytest.raises(TypeError):
            wrong()
