"""The photometric stage in Triton against the eager reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.views.photometric import augment, normalize, to_tensors
from falcon_fast.data.views.photometric_stage import photometric_stage, triton_stage
from falcon_fast.errors import UsageError
from falcon_fast.kernels.gpu import resources
from falcon_fast.kernels.gpu.views import augmentation

from ....data.views.colours import EVERYTHING, MEAN, STD, drawn, off, photos

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS_LAST = torch.channels_last
mean, std = MEAN.to(DEVICE), STD.to(DEVICE)


@pytest.fixture
def in_blocks(monkeypatch):
    """Several blocks a view at these sizes too: three of 12 rows of 20 pixels, the last one cut off."""
    monkeypatch.setattr(augmentation, "WHOLE", 0)
    monkeypatch.setattr(augmentation, "BLOCK", 256)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is not initialised holds NaN."""
    empty = torch.empty

    def poisoned_empty(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(augmentation.torch, "empty", poisoned_empty)


def check(images: torch.Tensor, parameters, recipe: Augmentation, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images, p = images.to(DEVICE), to_tensors(parameters, DEVICE)
    before = images.clone()
    ours = triton_stage(recipe, dtype)(images, p, mean, std)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=CHANNELS_LAST) and torch.equal(images, before)
    difference = (ours.float() - augment(images, p, mean, std, recipe).to(dtype).float()).abs()
    # A pixel that rounding puts on the other side of the solarisation threshold moves by one level.
    rounding = 0.0 if dtype == torch.float32 else 2e-3
    assert difference.mean() < (1e-6 if dtype == torch.float32 else 1e-5)
    assert difference.max() < 0.02 + rounding
    assert (difference > 1e-5 + rounding).float().mean() < 1e-3
    return ours


def strong(n: int):
    """All four jitters, by each of the 24 orders in turn."""
    orders = np.array(list(permutations(range(4))), dtype=np.int8)
    return off(n)._replace(
        brightness=np.full(n, 1.6, np.float32),
        contrast=np.full(n, 1.5, np.float32),
        saturation=np.full(n, 1.7, np.float32),
        hue=np.full(n, 0.15, np.float32),
        order=orders[np.arange(n) % 24],
    )


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the bit, but on a GPU, where torch divides by multiplying."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if DEVICE.type == "cpu" else 2e-6)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize"])
def test_each_operation_alone(in_blocks, operation: str) -> None:
    values = getattr(drawn(6, dataclasses.replace(EVERYTHING, jitter_probability=1.0)), operation)
    if operation == "sigma":
        values = np.linspace(0.1, 2.0, 6, dtype=np.float32)
    elif operation in ("gray", "solarize"):
        values = np.arange(6) % 2 == 0
    images = photos(6).contiguous(memory_format=CHANNELS_LAST)
    ours = check(images, off(6)._replace(**{operation: values}), EVERYTHING)
    assert (ours - normalize(images.to(DEVICE), mean, std)).abs().max() > 0.1  # it did something


def test_all_orders(request: pytest.FixtureRequest) -> None:
    images = photos(1).expand(24, -1, -1, -1)
    p = strong(24)
    views = check(images, p, EVERYTHING).flatten(1)
    assert (torch.cdist(views, views) + torch.eye(24, device=DEVICE) * 9).min() > 1e-2  # 24 different pictures
    request.getfixturevalue("in_blocks")
    check(images, p, AUGMENTATIONS["cifar-asymmetric"])


@pytest.mark.parametrize("recipe", [EVERYTHING, *AUGMENTATIONS.values()], ids=lambda r: r.name)
def test_whole_recipes(request: pytest.FixtureRequest, recipe: Augmentation) -> None:
    images, p = photos(6), drawn(6, recipe, 3)
    whole = check(images, p, recipe)
    request.getfixturevalue("in_blocks")
    blocks = check(images.contiguous(memory_format=CHANNELS_LAST), p, recipe, torch.float16)
    torch.testing.assert_close(blocks.float(), whole, rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("switched_off", ["brightness", "contrast", "saturation", "hue"])
def test_recipes_without_one_of_the_jitters(switched_off: str) -> None:
    recipe = dataclasses.replace(EVERYTHING, **{switched_off: 0.0})
    check(photos(8), drawn(8, recipe), recipe)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 40), (1, 7), (17, 19), (3, 300)])
def test_odd_sizes_and_windows_wider_than_the_image(request: pytest.FixtureRequest, size, blocks: bool) -> None:
    if blocks:
        request.getfixturevalue("in_blocks")
    p = strong(3)._replace(sigma=np.linspace(0, 2.0, 3, dtype=np.float32), solarize=np.arange(3) > 1)
    check(torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8), p, EVERYTHING)


@pytest.mark.parametrize("recipe", [EVERYTHING, AUGMENTATIONS["digits"]], ids=lambda r: r.name)
def test_identity_is_normalisation_exactly(request: pytest.FixtureRequest, recipe: Augmentation) -> None:
    images = photos(3).to(DEVICE)
    for blocks in (False, True):
        if blocks:
            request.getfixturevalue("in_blocks")
        ours = triton_stage(recipe, torch.float32)(images, to_tensors(off(3), DEVICE), mean, std)
        assert_same(ours, normalize(images, mean, std))


def test_the_threshold_is_the_references() -> None:
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, -1)
    p = off(2)._replace(solarize=np.array([True, False]))
    for threshold in (0, 77, 128, 255):
        recipe = dataclasses.replace(EVERYTHING, solarize_threshold=threshold)
        ours = triton_stage(recipe, torch.float32)(images.to(DEVICE), to_tensors(p, DEVICE), mean, std)
        assert_same(ours, augment(images.to(DEVICE), to_tensors(p, DEVICE), mean, std, recipe))


def test_rows_of_a_larger_table_and_images_of_any_stride() -> None:
    images = photos(8)[:, :, ::2, 3:17].flip(0)[::2]
    rows = slice(3, 7)
    p = to_tensors(drawn(16, EVERYTHING), DEVICE)
    part = type(p)(*(column[rows] for column in p))
    ours = triton_stage(EVERYTHING, torch.float32)(images.to(DEVICE), part, mean, std)
    torch.testing.assert_close(ours, augment(images.to(DEVICE), part, mean, std, EVERYTHING), rtol=0, atol=0.02)


def test_no_views() -> None:
    nothing = to_tensors(off(0), DEVICE)
    images = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=DEVICE)
    assert triton_stage(EVERYTHING, torch.float16)(images, nothing, mean, std).shape == (0, 3, 8, 8)


def test_gray_and_extreme_pixels_stay_finite() -> None:
    images = torch.tensor([0, 255, 7, 7], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    check(images, strong(4), EVERYTHING)


# ---- kernels that are wrong must be found out -----------------------------------------------------------------------------

# What is wrong: the right source and the wrong one.
MUTANTS = {
    "luma of blue for red": ("0.2989 * b_red + 0.587 * b_green + 0.114", "0.114 * b_red + 0.587 * b_green + 0.2989"),
    "levels of 256": ("tl.full(b_red.shape, 255.0", "tl.full(b_red.shape, 256.0"),
    "nothing clamped": ("return tl.minimum(tl.maximum(b_x, 0.0), 1.0)", "return b_x"),
    "hue turned back": ("+ 6.0 * turns", "- 6.0 * turns"),
    "hue of a green pixel": ("tl.where(m_green, 2.0, 4.0)", "tl.where(m_green, 3.0, 4.0)"),
    "hue not modulo a turn": ("b_sextant - 6.0 * tl.floor(b_sextant * (1.0 / 6.0))", "b_sextant"),
    "green as blue": ("b_sextant + 3.0", "b_sextant + 1.0"),
    "order ignored": ("operation = tl.load(p_order + i_place).to(tl.int32)", "operation = i_place"),
    "saturation towards black": ("tl.where(operation == SATURATION, 1.0 - factor, 0.0)", "0.0"),
    "contrast towards black": ("tl.where(operation == CONTRAST, 1.0 - factor, 0.0)", "0.0"),
    "mean of the finished jitter": ("== CONTRAST, i_place, 0)", "== CONTRAST, 4, 0)"),
    "mean over a block's pixels": ("tl.sum(b_sums) / pixels", "tl.sum(b_sums) / block_pixels"),
    "left border repeated": ("o_before = tl.abs(o_along - k)", "o_before = tl.maximum(o_along - k, 0)"),
    "right border repeated": (
        "o_after = side - 1 - tl.abs(side - 1 - o_along - k)",
        "o_after = tl.minimum(o_along + k, side - 1)",
    ),
    "window not normalised": ("return b_sum / total", "return b_sum"),
    "sigma for its square": ("-0.5 / (sigma * sigma)", "-0.5 / sigma"),
    "window too narrow": ("reach = math.ceil(3 * recipe.max_sigma)", "reach = math.ceil(recipe.max_sigma)"),
    "columns of the red plane alone": ("p_plane + CHANNEL * pixels", "p_plane"),
    "gray of the first view": ("tl.load(p_gray + i_image)", "tl.load(p_gray)"),
    "blue left out of gray": ("b_blue = tl.where(m_gray, b_gray, b_blue)", "b_blue = b_blue"),
    "all solarised": (" & (invert != 0)", ""),
    "threshold itself left": ("b_x >= threshold", "b_x > threshold"),
    "std of red": ("tl.load(p_std + CHANNEL)", "tl.load(p_std)"),
    "mean of red": ("tl.load(p_mean + CHANNEL)", "tl.load(p_mean)"),
    "blocks of their padded size": ("o = i_block * block_pixels + o_local", "o = i_block * BLOCK + o_local"),
    "rows of a table taken for packed": ("p_factors += i_image * stride_factors", "p_factors += i_image * 4"),
    "pixels taken for packed": ("(o % WIDTH) * stride_w", "(o % WIDTH)"),
}


def is_right(module) -> bool:
    """Whether the stage of this module does everything to some views as the reference does, in one block a view and in three."""
    images = photos(6, 29, 20).to(DEVICE, memory_format=CHANNELS_LAST)
    images[5, 0].view(-1)[:256] = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    p = strong(6)._replace(
        order=np.array([[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [0, 1, 2, 3], [1, 3, 2, 0], [0, 1, 2, 3]], np.int8),
        gray=np.array([0, 0, 0, 0, 1, 0], bool),
        sigma=np.array([0, 2.0, 0, 1.2, 0, 0], np.float32),
        solarize=np.array([0, 0, 0, 1, 0, 1], bool),
    )
    for factors, off_ in ((p.brightness, 1), (p.contrast, 1), (p.saturation, 1), (p.hue, 0)):
        factors[5] = off_  # only solarised, which no rounding excuses
    p = to_tensors(p, DEVICE)
    recipe = module.Recipe((True,) * 4, True, 2.0, True, 128 / 255)
    expected = augment(images, p, mean, std, EVERYTHING)
    for whole, block in ((module.WHOLE, module.BLOCK), (0, 256)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WHOLE", whole)
            patch.setattr(module, "BLOCK", block)
            ours = module.augment_views_triton(
                images, p.factors, p.order, p.gray, p.sigma, p.solarize, mean, std, recipe, torch.float32
            )
        if not torch.equal(ours[5], expected[5]) or (ours - expected).abs().mean().nan_to_num(nan=1.0) > 1e-6:
            return False
    return True


def test_the_right_kernels_are_right() -> None:
    assert is_right(augmentation)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_found_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[name]
    source = Path(augmentation.__file__).read_text()
    assert right in source
    module = f"augmentation_mutant_{list(MUTANTS).index(name)}"
    (tmp_path / f"{module}.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert not is_right(importlib.import_module(module))
    finally:
        sys.modules.pop(module, None)


# ---- which implementation a run takes ----------------------------------------------------------------------------------------


def test_it_is_a_setting_and_says_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_fast.data.views import photometric_stage as module

    images, p = photos(4).to(DEVICE), to_tensors(drawn(4, EVERYTHING), DEVICE)
    stage = photometric_stage(EVERYTHING, "triton", device=DEVICE, dtype=torch.float16)
    views = stage(images, p, mean, std)
    assert views.dtype == torch.float16 and torch.equal(views, stage(images, p, mean, std))
    monkeypatch.setattr(module, "why_no_triton", lambda device: "it needs an NVIDIA GPU")
    with pytest.raises(UsageError, match=r"does not work here \(it needs an NVIDIA GPU\): set data.photometric=auto"):
        photometric_stage(EVERYTHING, "triton", device=DEVICE)


def test_it_is_taken_when_asked_for_and_not_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_fast.data.views import photometric_stage as module

    monkeypatch.setattr(module, "why_no_triton", lambda device: None)
    monkeypatch.setattr(module, "triton_stage", lambda recipe, dtype: lambda *_: "triton")
    monkeypatch.setattr(module, "compiled_stage", lambda recipe: lambda *_: "compiled")
    for mode, expected in (("auto", "compiled"), ("triton", "triton")):
        stage = photometric_stage(EVERYTHING, mode, device=torch.device("cuda"))
        assert stage(*[torch.empty(0)] * 4) == expected


# ---- launches, recorded on tensors without values, and compiled ahead of time -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "launches"),
    [
        ("cifar-asymmetric", 32, 1),
        ("symmetric", 32, 1),  # with blur
        ("digits", 224, 1),  # neither contrast nor blur
        ("cifar-asymmetric", 224, 2),  # no blur
        ("imagenet-asymmetric", 224, 3),
        ("symmetric", 224, 3),
    ],
)
def test_launches(name: str, size: int, launches: int) -> None:
    from falcon_fast.kernels.gpu.launch import recording

    images = torch.empty(256, 3, size, size, dtype=torch.uint8, device="meta")
    p = to_tensors(drawn(256, AUGMENTATIONS[name]), "cpu")
    with recording((9, 0), 132) as found:
        out = triton_stage(AUGMENTATIONS[name], torch.bfloat16)(
            images, type(p)(*(column.to("meta") for column in p)), MEAN.to("meta"), STD.to("meta")
        )
    assert len(found) == launches
    assert out.shape == images.shape and out.is_contiguous(memory_format=CHANNELS_LAST)


# In a process of its own: under TRITON_INTERPRET kernels are Python functions, which nothing compiles.
PROGRAM = """
import json, sys
from falcon_fast.kernels.gpu import resources
for found in resources.augmentation_resources(int(sys.argv[1]), getattr(resources, sys.argv[2])):
    print(json.dumps(found._asdict()), flush=True)
"""


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        (80, "AUGMENTATION_SHAPES"),
        *(
            pytest.param(architecture, shapes, marks=pytest.mark.slow)
            for architecture in (80, 90, 100)
            for shapes in ("AUGMENTATION_SHAPES", "MORE_AUGMENTATION_SHAPES")
            if (architecture, shapes) != (80, "AUGMENTATION_SHAPES")
        ),
    ],
)
def test_compiled_ahead_of_time_without_spills(architecture: int, shapes: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", PROGRAM, str(architecture), shapes]
    output = subprocess.run(arguments, env=environment, text=True, stdout=subprocess.PIPE, check=True).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "contrast_sums_kernel",
        "colours_kernel",
        "blur_columns_kernel",
        "resize_kernel",
    }
    for kernel in kernels:
        what = f"{kernel['name']} {kernel['constants']} with {kernel['warps']} warps"
        assert kernel["stack"] == 0 and not {"LDL", "STL"} & kernel["instructions"].keys(), f"{what} spills"
        assert not {"ATOM", "ATOMG", "RED"} & kernel["instructions"].keys(), f"{what} is not deterministic"
        assert kernel["shared"] <= resources.SHARED_LIMIT[architecture], what
