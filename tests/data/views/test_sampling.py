"""The clock: against splitmix64 in plain integers, torchvision's crops and affine maps, and the laws of chance."""

from __future__ import annotations

import dataclasses
import math
import pickle
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast.data.views import sampling
from falcon_fast.data.views.augmentation import AUGMENTATIONS, AffineRule, Augmentation, CropRule
from falcon_fast.data.views.sampling import (
    AFFINE_DRAWS,
    CROP_DRAWS,
    PHOTOMETRIC_DRAWS,
    BatchPlan,
    Clock,
    PhotometricParameters,
    affine_matrices,
    crop_boxes,
    epoch_order,
    photometric_parameters,
    uniforms,
)
from falcon_fast.errors import UsageError

from .colours import EVERYTHING

GOLDEN = 0x9E3779B97F4A7C15
# Every choice there is, each as likely as not.
HALF = dataclasses.replace(
    EVERYTHING, flip_probability=0.5, jitter_probability=0.5, gray_probability=0.5, solarize_probability=(0.5, 0.5)
)


def mix(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def start(seed: int, epoch: int, purpose: int, position: int) -> int:
    key = 0
    for part in (seed, epoch, purpose):
        key = mix(mix(part + GOLDEN) + key * GOLDEN)
    return mix(key + position * GOLDEN)


def draw(n: int, count: int, seed: int = 0) -> np.ndarray:
    return uniforms(seed, 0, np.arange(n), 0, count)


# ---- the stream ----


def test_the_oracle_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix(1234567 + (k + 1) * GOLDEN) for k in range(4)] == known


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 1))
@settings(max_examples=50)
def test_uniforms_are_the_hash(seed: int, epoch: int, position: int, view: int) -> None:
    first = start(seed, epoch, view + 1, position)
    expected = [(mix(first + (k + 1) * GOLDEN) >> 11) / 2**53 for k in range(5)]
    assert uniforms(seed, epoch, np.array([position]), view, 5)[0].tolist() == expected


def test_golden_values() -> None:
    # If these change, every run that resumes sees other data than the run it resumes.
    assert uniforms(0, 0, np.arange(2), 0, 3).tolist() == [
        [0.8619606451531577, 0.4691076621691217, 0.08186094629303553],
        [0.4609201539072477, 0.2127305407750213, 0.5632231789362215],
    ]
    assert uniforms(-7, 3, np.array([123456789012]), 1, 2).tolist() == [[0.7211092129891847, 0.5173147142161599]]
    assert epoch_order(1, 2, 8).tolist() == [1, 4, 3, 2, 7, 6, 0, 5]


def test_longer_rows_only_append() -> None:
    np.testing.assert_array_equal(draw(7, 40)[:, :11], draw(7, 11))


def test_uniformity() -> None:
    from scipy.stats import chisquare

    u = draw(20_000, 10)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert chisquare(np.histogram(column, 100, (0, 1))[0]).pvalue > 1e-3
    # The lowest of the 53 bits are as random as the highest.
    low = (u * 2**53).astype(np.int64) % 64
    assert chisquare(np.bincount(low.ravel(), minlength=64)).pvalue > 1e-3
    pairs = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), 20, ((0, 1), (0, 1)))[0]
    assert chisquare(pairs.ravel()).pvalue > 1e-3


def test_no_correlation_between_seeds_epochs_views_positions_and_draws() -> None:
    n = 20_000
    positions = np.arange(n)
    streams = [
        uniforms(seed, epoch, positions + shift, view, 3)
        for seed in (0, 1)
        for epoch in (0, 1)
        for view in (0, 1)
        for shift in (0, 10**6)
    ]
    correlation = np.corrcoef(np.concatenate(streams, axis=1).T)
    np.fill_diagonal(correlation, 0)
    # 48 x 47 / 2 pairs: the largest is near 3.5 standard deviations.
    assert np.abs(correlation).max() < 5 / math.sqrt(n)
    u = streams[0]
    for lag in (1, 2, 3, 64, 256):
        assert abs(np.corrcoef(u[lag:].ravel(), u[:-lag].ravel())[0, 1]) < 5 / math.sqrt(u.size)


@given(st.integers(0, 2**64), st.integers(0, 1000), st.integers(1, 300))
@settings(max_examples=50)
def test_epoch_order_is_a_permutation_by_hash(seed: int, epoch: int, n: int) -> None:
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(n), key=lambda position: start(seed, epoch, 0, position))


def test_epoch_orders_are_uniform() -> None:
    from scipy.stats import chisquare

    counts = dict.fromkeys(permutations(range(4)), 0)
    for epoch in range(4800):
        counts[tuple(epoch_order(3, epoch, 4).tolist())] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert not np.array_equal(epoch_order(0, 1, 100), epoch_order(1, 0, 100))


# ---- crops ----


def one_crop(u: np.ndarray, height: int, width: int, rule: CropRule) -> list[int]:
    """The rule once more, one image at a time, as torchvision states it."""
    low, high = rule.ratio
    for k in range(10):
        area = height * width * (rule.scale[0] + u[k] * (rule.scale[1] - rule.scale[0]))
        ratio = math.exp(math.log(low) + u[10 + k] * (math.log(high) - math.log(low)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < low:
        h = round(w / low)
    elif width / height > high:
        w = round(h * high)
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=20), st.integers(0, 2**32))
def test_crop_boxes_are_the_rule(sizes: list[tuple[int, int]], seed: int) -> None:
    height, width = np.array(sizes).T
    u = draw(len(sizes), CROP_DRAWS, seed)
    for rule in (CropRule(), CropRule(scale=(0.9, 1.0), ratio=(0.5, 0.6))):
        boxes = crop_boxes(u, height, width, rule)
        assert boxes.dtype == np.int64
        assert boxes.tolist() == [one_crop(u[i], *sizes[i], rule) for i in range(len(sizes))]
        top, left, h, w = boxes.T
        assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("size", [(375, 500), (32, 32), (300, 90)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    n = 3000
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = crop_boxes(draw(n, CROP_DRAWS), np.full(n, size[0]), np.full(n, size[1]), CropRule())

    def features(boxes: np.ndarray) -> list[np.ndarray]:
        top, left, h, w = boxes.T
        # Places relative to the room there is: (k + 1/2) / number of places.
        return [h * w, w / h, (top + 0.5) / (size[0] - h + 1), (left + 0.5) / (size[1] - w + 1), top + h, left + w]

    for a, b in zip(features(ours), features(theirs), strict=True):
        assert ks_2samp(a, b).pvalue > 0.005


@pytest.mark.parametrize(
    ("size", "box"),
    [((1, 1), (0, 0, 1, 1)), ((1, 1000), (0, 499, 1, 1)), ((1000, 1), (499, 0, 1, 1)), ((10, 1000), (0, 493, 10, 13))],
)
def test_extreme_images(size: tuple[int, int], box: tuple[int, ...]) -> None:
    # Areas of 90 % and more never fit into a long strip: the central fallback.
    rule = CropRule(scale=(0.9, 1.0))
    boxes = crop_boxes(draw(50, CROP_DRAWS), np.full(50, size[0]), np.full(50, size[1]), rule)
    assert (boxes == box).all()


# ---- affine maps ----


def test_affine_matrices_are_torchvisions() -> None:
    from torchvision.transforms.functional import _get_inverse_affine_matrix

    rule = AffineRule(degrees=15, scale=(0.7, 1.1), shift=0.2, shear=8)
    u = draw(200, AFFINE_DRAWS)
    theta = affine_matrices(u, rule)
    assert theta.shape == (200, 2, 3) and theta.dtype == np.float32
    for row, matrix in zip(u, theta, strict=True):
        # In coordinates from -1 to 1 the side is 2 long.
        expected = _get_inverse_affine_matrix(
            center=[0.0, 0.0],
            angle=-15 + 30 * row[0],
            scale=0.7 + 0.4 * row[1],
            translate=[2 * (-0.2 + 0.4 * row[2]), 2 * (-0.2 + 0.4 * row[3])],
            shear=[-8 + 16 * row[4], 0.0],
        )
        np.testing.assert_allclose(matrix, np.reshape(expected, (2, 3)), atol=1e-6)


def test_affine_moves_the_picture_where_it_says() -> None:
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    image = torch.zeros(1, 1, 20, 20)
    image[..., 10, 5] = 1
    # No rotation, no scaling, a shift of +10 % in x (u = 3/4 of +-20 %) and -20 % in y.
    theta = affine_matrices(np.array([[0.5, 0.5, 0.75, 0.0, 0.5]]), AffineRule(15, (1.0, 1.0), 0.2, 8))
    grid = affine_grid(torch.from_numpy(theta), [1, 1, 20, 20], align_corners=False)
    moved = grid_sample(image, grid, align_corners=False)
    assert moved[0, 0, 6, 7] == pytest.approx(1, abs=1e-4) and moved.sum() == pytest.approx(1, abs=1e-4)


# ---- photometric parameters ----


def test_photometric_distributions() -> None:
    from scipy.stats import chisquare, kstest, uniform

    n = 20_000
    a = AUGMENTATIONS["symmetric"]
    p = photometric_parameters(draw(n, PHOTOMETRIC_DRAWS), a, 0)
    factors = np.stack([p.brightness, p.contrast, p.saturation, p.hue], axis=1)
    assert factors.dtype == np.float32 and p.sigma.dtype == np.float32 and p.order.dtype == np.int8
    on = ~(factors == (1, 1, 1, 0)).all(1)
    # Off means off together.
    assert (factors[on] != (1, 1, 1, 0)).mean() > 0.999

    def rate(flags: np.ndarray, probability: float) -> None:
        assert abs(flags.mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / n) + 1e-12

    rate(on, 0.8)
    rate(p.gray, 0.2)
    rate(p.sigma > 0, 0.5)
    for values, low, high in (
        *((factors[on, k], 0.2, 1.8) for k in range(3)),
        (p.hue[on], -0.2, 0.2),
        (p.sigma[p.sigma > 0], 0.1, 2.0),
    ):
        assert kstest(values, uniform(low, high - low).cdf).pvalue > 1e-3
    orders, counts = np.unique(p.order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == sorted(permutations(range(4)))
    assert chisquare(counts).pvalue > 1e-3
    assert not p.solarize.any()


def test_views_differ_where_the_recipe_says() -> None:
    u = draw(5000, PHOTOMETRIC_DRAWS)
    one, two = (photometric_parameters(u, AUGMENTATIONS["imagenet-asymmetric"], view) for view in (0, 1))
    assert (one.sigma >= 0.1).all() and abs((two.sigma > 0).mean() - 0.1) < 0.02
    assert not one.solarize.any() and abs(two.solarize.mean() - 0.2) < 0.03


def test_strong_jitter_does_not_go_below_zero_and_switches_are_off_when_zero() -> None:
    u = draw(500, PHOTOMETRIC_DRAWS)
    strong = Augmentation("mine", crop=CropRule(), jitter_probability=1.0, brightness=1.5)
    p = photometric_parameters(u, strong, 0)
    assert p.brightness.min() >= 0 and 2.4 < p.brightness.max() <= 2.5
    assert (p.contrast == 1).all() and (p.saturation == 1).all() and (p.hue == 0).all()
    assert not p.gray.any() and (p.sigma == 0).all() and not p.solarize.any()


# ---- the clock ----


def leaves(plan: BatchPlan) -> list[Any]:
    return [*plan[:-1], *plan.photometric]


def same(a: BatchPlan, b: BatchPlan) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_ranks_together_see_what_one_sees(name: str) -> None:
    clock = Clock(5, 103, 12, AUGMENTATIONS[name])
    for step in (0, 7, 8, 100):
        whole = clock.at(step)
        parts = [clock.at(step, rank, 3) for rank in range(3)]
        for field in ("positions", "indices"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field))
        for field in ("geometry", "flips"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts], 1), getattr(whole, field))
        for k, values in enumerate(whole.photometric):
            views = [p.photometric[k].reshape(2, 4, *values.shape[1:]) for p in parts]
            np.testing.assert_array_equal(np.concatenate(views, 1).reshape(values.shape), values)


def test_at_is_a_pure_function_of_seed_and_step() -> None:
    clock = Clock(5, 50, 8, AUGMENTATIONS["symmetric"])
    forwards = [clock.at(step) for step in range(20)]
    for step in (19, 3, 11, 0, 12):
        assert same(Clock(5, 50, 8, AUGMENTATIONS["symmetric"]).at(step), forwards[step])
        assert same(clock.at(step), forwards[step])
    assert not same(Clock(6, 50, 8, AUGMENTATIONS["symmetric"]).at(3), forwards[3])


def test_a_caller_cannot_disturb_the_next_step() -> None:
    clock = Clock(5, 50, 50, AUGMENTATIONS["symmetric"])
    before = clock.at(0).indices.copy()
    clock.at(0).indices[:] = 0
    np.testing.assert_array_equal(clock.at(0).indices, before)


def test_an_epoch_visits_each_image_at_most_once() -> None:
    clock = Clock(1, 103, 10, AUGMENTATIONS["digits"])
    assert clock.steps_per_epoch == 10
    plans = [clock.at(step) for step in range(20)]
    for epoch in (0, 1):
        mine = plans[10 * epoch : 10 * epoch + 10]
        assert {p.epoch for p in mine} == {epoch}
        assert np.concatenate([p.positions for p in mine]).tolist() == list(range(100))
        seen = np.concatenate([p.indices for p in mine])
        np.testing.assert_array_equal(seen, epoch_order(1, epoch, 103)[:100])
    assert not np.array_equal(plans[0].indices, plans[10].indices)


def test_plan_shapes_views_and_flips() -> None:
    clock = Clock(2, 5000, 4000, AUGMENTATIONS["cifar-asymmetric"])
    plan = clock.at(0)
    assert plan.geometry.shape == (2, 4000, CROP_DRAWS) and plan.flips.shape == (2, 4000)
    assert plan.flips.dtype == np.bool_ and all(len(field) == 8000 for field in plan.photometric)
    assert np.abs(plan.flips.mean(1) - 0.5).max() < 0.04
    # View 1 comes first: only view 2 is ever solarised by this recipe.
    assert not plan.photometric.solarize[:4000].any() and plan.photometric.solarize[4000:].any()
    # Flip, colours and geometry come from different draws, and the views from different streams.
    rows = [*plan.geometry[0].T, *plan.geometry[1].T, *plan.flips, plan.photometric.gray[:4000]]
    correlation = np.corrcoef(np.array(rows, dtype=float))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)
    digits = Clock(2, 5000, 40, AUGMENTATIONS["digits"]).at(0)
    assert digits.geometry.shape == (2, 40, AFFINE_DRAWS) and not digits.flips.any()


PHOTOMETRIC_COLUMNS = {
    0: {"brightness", "contrast", "saturation", "hue"},  # whether there is jitter at all
    1: {"brightness"},
    2: {"contrast"},
    3: {"saturation"},
    4: {"hue"},
    5: {"order"},
    6: {"gray"},
    7: {"sigma"},  # whether there is blur
    8: {"sigma"},  # how much
    9: {"solarize"},
}


@pytest.mark.parametrize("name", ["cifar-asymmetric", "digits"])
def test_every_choice_reads_a_column_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace one column of the random numbers after the other: exactly the choice that reads it changes."""
    crops = AUGMENTATIONS[name].crop is not None
    recipe = dataclasses.replace(HALF, crop=AUGMENTATIONS[name].crop, affine=AUGMENTATIONS[name].affine)
    clock = Clock(3, 400, 400, recipe)
    before, original = clock.at(0), sampling.uniforms
    geometry = CROP_DRAWS if crops else AFFINE_DRAWS
    changed = []
    for column in range(1 + PHOTOMETRIC_DRAWS + geometry):

        def replaced(
            seed: int, epoch: int, positions: np.ndarray, view: int, count: int, k: int = column
        ) -> np.ndarray:
            u = original(seed, epoch, positions, view, count)
            u[:, k] = original(seed + 99, epoch, positions, view, count)[:, k]
            return u

        monkeypatch.setattr(sampling, "uniforms", replaced)
        after = clock.at(0)
        found: set[object] = {
            field
            for field in PhotometricParameters._fields
            if not np.array_equal(getattr(after.photometric, field), getattr(before.photometric, field))
        }
        found |= {"flips"} if not np.array_equal(after.flips, before.flips) else set()
        found |= set(np.flatnonzero((after.geometry != before.geometry).any((0, 1))).tolist())
        changed.append(found)
        assert np.array_equal(after.indices, before.indices)
    assert changed[0] == {"flips"}
    assert dict(enumerate(changed[1 : 1 + PHOTOMETRIC_DRAWS])) == PHOTOMETRIC_COLUMNS
    assert changed[1 + PHOTOMETRIC_DRAWS :] == [{k} for k in range(geometry)]


def test_every_pair_of_choices_is_independent() -> None:
    """Of 30 choices, 15 for each view: a chi-squared test of independence for each of the 435 pairs, over 20,000 images."""
    from scipy.stats import chi2_contingency

    n, side = 20_000, 1000
    always = dataclasses.replace(HALF, jitter_probability=1.0, blur_probability=(1.0, 1.0))
    plan, strengths = (Clock(8, n, n, recipe).at(0) for recipe in (HALF, always))
    orders = sorted(permutations(range(4)))
    choices: dict[tuple[int, str], np.ndarray] = {}
    for view in (0, 1):
        rows = slice(view * n, (view + 1) * n)
        switch = PhotometricParameters(*(field[rows] for field in plan.photometric))
        strength = PhotometricParameters(*(field[rows] for field in strengths.photometric))
        # A crop of this size always fits at the first try, so area and ratio show the numbers drawn for them.
        rule = CropRule(scale=(0.2, 0.5))
        top, left, height, width = crop_boxes(plan.geometry[view], np.full(n, side), np.full(n, side), rule).T
        named = {
            "flip": plan.flips[view],
            "jitter": switch.brightness != 1,
            "gray": switch.gray,
            "blur": switch.sigma > 0,
            "solarize": switch.solarize,
            "brightness": strength.brightness,
            "contrast": strength.contrast,
            "saturation": strength.saturation,
            "hue": strength.hue,
            "sigma": strength.sigma,
            "order": np.array([orders.index(tuple(row)) for row in strength.order.tolist()]),
            "area": height * width,
            "ratio": width / height,
            "top": (top + 0.5) / (side - height + 1),
            "left": (left + 0.5) / (side - width + 1),
        }
        for name, values in named.items():
            if values.dtype.kind == "f" or name == "area":  # quarters
                values = np.searchsorted(np.quantile(values, (0.25, 0.5, 0.75)), values)
            choices[view, name] = values.astype(np.int64)
    assert len(choices) == 30
    for (one, a), (other, b) in combinations(choices.items(), 2):
        table = np.zeros((a.max() + 1, b.max() + 1), np.int64)
        np.add.at(table, (a, b), 1)
        assert chi2_contingency(table).pvalue > 1e-5, (one, other)  # 435 tests: the smallest is near 2e-3


def test_recipes_share_their_crops() -> None:
    one, other = (Clock(0, 100, 10, AUGMENTATIONS[name]).at(3) for name in ("symmetric", "cifar-asymmetric"))
    np.testing.assert_array_equal(one.geometry, other.geometry)


def test_pickle_carries_no_order() -> None:
    clock = Clock(0, 100_000, 64, AUGMENTATIONS["symmetric"])
    plan = clock.at(0)
    sent = pickle.dumps(clock)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert received == clock and same(received.at(0), plan)


def test_bad_use_is_refused() -> None:
    a = AUGMENTATIONS["symmetric"]
    with pytest.raises(UsageError, match=r"batch size 64 exceeds the 63 training images: lower the batch size to 63"):
        Clock(0, 63, 64, a)
    with pytest.raises(UsageError, match="at least 1"):
        Clock(0, 63, 0, a)
    clock = Clock(0, 64, 64, a)
    with pytest.raises(UsageError, match="multiple of 3"):
        clock.at(0, 0, 3)
    for step, rank in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(UsageError, match="give step >= 0"):
            clock.at(step, rank, 2)
