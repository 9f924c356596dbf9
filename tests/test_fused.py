"""The photometric stage for a compiler: the reference's arithmetic, one graph, and what happens without a compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from falcon_fast.data.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.fused import by_radius, fused, pays, photometric_stage
from falcon_fast.data.photometric import augment, to_tensors
from falcon_fast.errors import UsageError

from .test_photometric import EVERYTHING, MEAN, STD, drawn, off, photos

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
    stage = photometric_stage(EVERYTHING, "compiled", False, lines.append)
    unit = torch.zeros(3), torch.ones(3)  # differences in [0, 1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            images = photos(8, 16, 16).roll(seed, 0).contiguous(memory_format=torch.channels_last)
            p = to_tensors(drawn(8, EVERYTHING, seed), "cpu")
            ours = stage(images, p, *unit)
            torch.testing.assert_close(ours, augment(images, p, *unit, EVERYTHING), rtol=0, atol=1e-5)
            assert ours.is_contiguous(memory_format=torch.channels_last)
    assert lines == []


def test_a_large_batch_is_done_in_equal_parts_by_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_fast.data import fused as module

    calls = []

    def counted(images: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append((len(images), rest[-1]))
        return module.apply(images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "compile", lambda function, **_: counted)
    monkeypatch.setattr(module, "CHUNK", 5 * 3 * 24 * 20)
    images, p = photos(12), to_tensors(drawn(12, EVERYTHING), "cpu")
    p = p._replace(sigma=torch.tensor([2.0, 0, 0.5, 0, 1.5, 0, 0.7, 0, 0.1, 0, 0.2, 0]))
    ours = photometric_stage(EVERYTHING, "compiled", True)(images, p, MEAN, STD)
    torch.testing.assert_close(ours, augment(images, p, MEAN, STD, EVERYTHING), rtol=0, atol=1e-5)
    assert calls == [(4, 0), (4, 3), (4, 6)] and ours.is_contiguous(memory_format=torch.channels_last)


def test_each_image_is_blurred_no_wider_than_it_needs() -> None:
    assert by_radius(torch.tensor([0.8, 0.0, 0.7, 0.0]), (0, 3, 6)) == ([1, 3, 2, 0], [0, 0, 3, 6])
    assert by_radius(torch.zeros(3), (0,)) == ([0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize("switched_off", ["jitter_probability", "contrast"])
def test_parts_of_a_recipe_without_contrast(switched_off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_fast.data import fused as module

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(module, "CHUNK", 4 * 3 * 24 * 20)
    recipe = dataclasses.replace(EVERYTHING, **{switched_off: 0.0})
    images, p = photos(8), to_tensors(drawn(8, recipe), "cpu")
    ours = photometric_stage(recipe, "compiled", True)(images, p, MEAN, STD)
    torch.testing.assert_close(ours, augment(images, p, MEAN, STD, recipe), rtol=0, atol=1e-5)


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object):
        def raising(*_: object) -> None:
            raise RuntimeError("no\ng++")

        return raising

    monkeypatch.setattr(torch, "compile", broken)
    images, p, lines = photos(4), to_tensors(drawn(4, EVERYTHING), "cpu"), []
    stage = photometric_stage(EVERYTHING, "auto", True, lines.append)
    expected = augment(images, p, MEAN, STD, EVERYTHING)
    for _ in range(2):
        assert torch.equal(stage(images, p, MEAN, STD), expected)
    assert lines == ["the augmentations cannot be compiled (no g++): they run uncompiled, more slowly"]
    with pytest.raises(UsageError, match=r"cannot be compiled \(no g\+\+\): set data.photometric=eager"):
        photometric_stage(EVERYTHING, "compiled", True)(images, p, MEAN, STD)
    # Where it does not pay nothing is compiled.
    assert torch.equal(photometric_stage(EVERYTHING, "auto", False, lines.append)(images, p, MEAN, STD), expected)
    assert len(lines) == 1


def test_it_pays_for_long_runs_of_large_views() -> None:
    assert not pays(1760, 128, 16, 2)  # the digits
    assert pays(1000, 256, 224, 2)
    assert not pays(50, 256, 224, 2)
