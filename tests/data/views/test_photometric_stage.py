"""Which photometric stage a run takes, and what happens where one does not run."""

from __future__ import annotations

import pytest
import torch

from falcon_fast.data.views import photometric_stage as module
from falcon_fast.data.views.photometric import augment, to_tensors
from falcon_fast.data.views.photometric_stage import photometric_stage
from falcon_fast.errors import UsageError

from .colours import EVERYTHING, MEAN, STD, drawn, photos

CUDA = torch.device("cuda")


def test_a_cpu_takes_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_no_extension", lambda: None)
    monkeypatch.setattr(module, "cpu_stage", lambda recipe, dtype: (recipe, dtype))
    for mode in ("auto", "cpu"):
        assert photometric_stage(EVERYTHING, mode, dtype=torch.bfloat16) == (EVERYTHING, torch.bfloat16)
    with pytest.raises(
        UsageError, match=r"photometric=cpu does not work here \(it needs the CPU\): set data.photometric=auto"
    ):
        photometric_stage(EVERYTHING, "cpu", device=CUDA)


def test_without_the_extension_it_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "the C++ kernels were not built"
    monkeypatch.setattr(module, "why_no_extension", lambda: missing)
    images, p, lines = photos(4), to_tensors(drawn(4, EVERYTHING), "cpu"), []
    views = photometric_stage(EVERYTHING, "auto", lines.append)(images, p, MEAN, STD)
    assert torch.equal(views, augment(images, p, MEAN, STD, EVERYTHING))
    assert lines == [f"the augmentations run in PyTorch, more slowly: {missing}"]
    with pytest.raises(UsageError, match="kernels were not built"):
        photometric_stage(EVERYTHING, "cpu")


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object):
        def raising(*_: object) -> None:
            raise RuntimeError("no\ng++")

        return raising

    monkeypatch.setattr(torch, "compile", broken)
    images, p, lines = photos(4), to_tensors(drawn(4, EVERYTHING), "cpu"), []
    stage = photometric_stage(EVERYTHING, "auto", lines.append, CUDA)
    expected = augment(images, p, MEAN, STD, EVERYTHING)
    for _ in range(2):
        assert torch.equal(stage(images, p, MEAN, STD), expected)
    assert lines == ["the augmentations cannot be compiled (no g++): they run uncompiled, more slowly"]
    with pytest.raises(UsageError, match=r"cannot be compiled \(no g\+\+\): set data.photometric=eager"):
        photometric_stage(EVERYTHING, "compiled")(images, p, MEAN, STD)
