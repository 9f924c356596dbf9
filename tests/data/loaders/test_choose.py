"""Which loader a run gets, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast.config import DataConfig, load_recipe, override, validate
from falcon_fast.data.loaders import choose as loader
from falcon_fast.data.loaders import dali_pipeline
from falcon_fast.data.loaders.choose import choose_loader
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import AUGMENTATIONS, augmentation
from falcon_fast.errors import UsageError

from ..dali import INSTALLED, needs_dali
from ..images import CPU

CROPS = AUGMENTATIONS["imagenet-asymmetric"]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConfig(source="digits"))


def chosen(source: Source, device: torch.device = CPU, recipe: str = "imagenet-asymmetric", **config: object) -> str:
    name, notes = choose_loader(DataConfig(**config), source, augmentation(recipe), device)  # type: ignore[arg-type]
    assert notes == ()
    return name


@needs_dali
@pytest.mark.parametrize("extension", [True, False])
def test_auto_takes_the_fastest_that_works(
    photos: Source, digits: Source, image_folder: Path, monkeypatch: pytest.MonkeyPatch, extension: bool
) -> None:
    monkeypatch.setattr(loader, "cpu_extension", object() if extension else None)
    assert chosen(photos) == ("resident" if extension else "dali")  # 40 images of 24 KB fit anywhere
    assert chosen(photos, resident_mib=0) == "dali"
    assert chosen(photos, CUDA) == "resident"
    assert chosen(digits, recipe="digits") == "resident"
    assert chosen(digits, recipe="digits", resident_mib=0) == "workers"
    assert chosen(open_source(DataConfig(path=str(image_folder))), resident_mib=0) == "dali"
    large = Source(
        Split(ImageArray(np.zeros((9, 64, 64, 3), np.uint8)), None), photos.test, (), 64, (0.5,) * 3, (0.5,) * 3, "x"
    )
    assert chosen(large) == ("resident" if extension else "workers")
    assert chosen(large, resident_mib=0) == "workers" and chosen(large, CUDA) == "resident"


@needs_dali
def test_a_name_is_kept(photos: Source, digits: Source) -> None:
    for name in ("dali", "resident", "workers", "synthetic"):
        assert chosen(photos, loader=name) == name
    for name in ("resident", "workers", "synthetic"):
        assert chosen(digits, recipe="digits", loader=name) == name


def test_what_a_loader_cannot_do_is_refused_in_a_line(photos: Source, digits: Source) -> None:
    with pytest.raises(UsageError, match=r"resident_mib 0: raise it"):
        chosen(photos, loader="resident", resident_mib=0)
    with pytest.raises(UsageError, match="affine maps: use --loader resident"):
        chosen(digits, recipe="digits", loader="dali")
    with pytest.raises(UsageError, match="lie in memory: use --loader resident"):
        chosen(digits, recipe="cifar-asymmetric", loader="dali")
    with pytest.raises(UsageError, match=r"data\.loader 'dalli': did you mean 'dali'"):
        validate(override(load_recipe("folder"), {"data.loader": "dalli"}))


def test_a_dali_that_cannot_start_is_said_and_replaced(photos: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(resident_mib=0)
    if not torch.cuda.is_available():
        name, (note,) = choose_loader(config, photos, CROPS, CUDA)
        assert name == "workers" and "DALI cannot start" in note and "\n" not in note
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    name, (note,) = choose_loader(config, photos, CROPS, CPU)
    assert name == "workers" and "DALI cannot start (" in note and "\n" not in note
    assert re.search("pip install nvidia-dali-cuda1[23]0", note)
    for built_for, package in (("12.6", "cuda120"), ("13.0", "cuda130"), (None, "cuda130")):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        assert (dali_pipeline.why_not(CPU) or "").endswith(f": pip install nvidia-dali-{package}")
    with pytest.raises(UsageError, match=r"DALI cannot start: .*; use --loader workers"):
        choose_loader(DataConfig(loader="dali"), photos, CROPS, CPU)
    monkeypatch.undo()
    assert (dali_pipeline.why_not(CPU) is None) is INSTALLED
