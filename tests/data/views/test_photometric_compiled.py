"""The photometric stage for a compiler: the reference's arithmetic, in one graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.views.photometric import augment, to_tensors
from falcon_fast.data.views.photometric_compiled import fused
from falcon_fast.data.views.photometric_stage import photometric_stage

from .colours import EVERYTHING, MEAN, STD, drawn, off, photos

RECIPES = [EVERYTHING, *AUGMENTATIONS.values()]


def check(recipe: Augmentation, images: torch.Tensor, parameters) -> None:
    p = to_tensors(parameters, "cpu")
    difference = (fused(images, p, MEAN, STD, recipe) - augment(images, p, MEAN, STD, recipe)).abs()
    # A pixel that rounding puts on the other side of the solarisation threshold moves by one level.
    assert difference.mean() < 1e-6 and difference.max() < 0.02
    assert (difference > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_it_is_the_reference(recipe: Augmentation) -> None:
    check(recipe, photos(64), drawn(64, recipe))
    check(recipe, photos(16).contiguous(memory_format=torch.channels_last), drawn(16, recipe, 3))


@pytest.mark.parametrize("switched_off", ["brightness", "contrast", "saturation", "hue"])
def test_recipes_without_one_of_the_jitters(switched_off: str) -> None:
    recipe = dataclasses.replace(EVERYTHING, **{switched_off: 0.0})
    check(recipe, photos(32), drawn(32, recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_identity_is_normalisation_exactly(recipe: Augmentation) -> None:
    images = photos(4)
    p = to_tensors(off(4), "cpu")
    assert torch.equal(fused(images, p, MEAN, STD, recipe), augment(images, p, MEAN, STD, recipe))


def test_windows_wider_than_the_image() -> None:
    check(EVERYTHING, torch.randint(0, 256, (6, 3, 5, 3), dtype=torch.uint8), drawn(6, EVERYTHING))


def test_nothing_waits_for_the_device() -> None:
    images, p = photos(8).to("meta"), to_tensors(drawn(8, EVERYTHING), "cpu")
    out = fused(images, type(p)(*(t.to("meta") for t in p)), MEAN.to("meta"), STD.to("meta"), EVERYTHING)
    assert out.shape == images.shape


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_every_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    lines: list[str] = []
    stage = photometric_stage(EVERYTHING, "compiled", lines.append)
    unit = torch.zeros(3), torch.ones(3)  # differences in [0, 1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            images = photos(8, 16, 16).roll(seed, 0).contiguous(memory_format=torch.channels_last)
            p = to_tensors(drawn(8, EVERYTHING, seed), "cpu")
            ours = stage(images, p, *unit)
            torch.testing.assert_close(ours, augment(images, p, *unit, EVERYTHING), rtol=0, atol=1e-5)
            assert ours.is_contiguous(memory_format=torch.channels_last)
    assert lines == []
