"""The four checks: closed forms, and simulated representations that are healthy or fail in a known way."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_fast.errors import UsageError
from falcon_fast.evaluation import collapse
from falcon_fast.evaluation.collapse import (
    cluster_spread,
    collapse_checks,
    effective_rank,
    energy_share,
    singular_values,
)

NAMES = ["representation", "dimensional", "cluster", "intracluster"]


def clusters(number: int, spread: float, n: int = 360, f: int = 256, seed: int = 0):
    """Embeddings around +-1 codes, one code for each cluster."""
    rng = np.random.default_rng(seed)
    codes = rng.choice([-1.0, 1.0], (number, f))
    code = rng.integers(0, number, n)
    return (codes[code] + spread * rng.standard_normal((n, f))).astype(np.float32), code


def backbone(embeddings: np.ndarray, d: int = 128, seed: int = 1) -> np.ndarray:
    """Non-negative features of the same images, as a ReLU leaves them."""
    weights = np.random.default_rng(seed).standard_normal((embeddings.shape[1], d)) / math.sqrt(embeddings.shape[1])
    return np.maximum(embeddings @ weights, 0).astype(np.float32)


def failed(checks) -> list[str]:
    assert list(checks) == NAMES
    return [name for name, check in checks.items() if not check.ok]


@pytest.mark.parametrize("number", [10, 20, 50])
@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_healthy_clusters_pass_with_margin(number, spread):
    embeddings, code = clusters(number, spread)
    checks = collapse_checks(embeddings, backbone(embeddings), code, None, 10)
    assert failed(checks) == []
    for name, check in checks.items():
        for value in (check.value, check.backbone_value):
            if name == "intracluster":
                assert value > check.threshold + 1
            elif value is not None:
                assert value > 1.8 * check.threshold


# In each case the embeddings fail, the features fail, or both: the check must see all three.
@pytest.mark.parametrize("where", ["embeddings", "features", "both"])
@pytest.mark.parametrize("kind", ["constant", "noisy constant", "rank 1", "rank 2", "points 10", "points 50", "jitter"])
def test_each_collapse_fails_its_own_check(kind, where):
    rng = np.random.default_rng(0)
    embeddings, code = clusters(50, 0.2)
    features = backbone(embeddings)

    def collapsed(x):
        if kind == "constant":
            bad = np.full(x.shape, 0.7)
        elif kind == "noisy constant":
            bad = 0.7 + 1e-6 * rng.standard_normal(x.shape)
        elif kind.startswith("rank"):
            rank = int(kind[-1])
            bad = rng.standard_normal((len(x), rank)) @ rng.standard_normal((rank, x.shape[1]))
            bad += 0.01 * rng.standard_normal(x.shape)
        else:
            number = int(kind.split()[-1]) if "points" in kind else 50
            bad = rng.choice([-1.0, 1.0], (number, x.shape[1]))[code % number]
            bad += (0.002 if kind == "jitter" else 0) * rng.standard_normal(x.shape)
        return bad.astype(np.float32)

    own = {"c": "representation", "n": "representation", "r": "dimensional", "p": "intracluster", "j": "intracluster"}
    checks = collapse_checks(
        collapsed(embeddings) if where != "features" else embeddings,
        collapsed(features) if where != "embeddings" else features,
        code,
        None,
        10,
    )
    others = {"constant": ["dimensional", "intracluster"], "noisy constant": ["intracluster"]}.get(kind, [])
    assert own[kind[0]] in failed(checks)
    assert set(failed(checks)) <= {own[kind[0]], *others}
    bad = checks[own[kind[0]]]
    if where != "features":
        assert bad.value <= bad.threshold
    if where != "embeddings":
        assert bad.backbone_value <= bad.threshold


@pytest.mark.parametrize("codes", [1, 2, 4])
def test_too_few_codes_fail_the_cluster_check_alone(codes):
    embeddings, code = clusters(50, 0.2)
    checks = collapse_checks(embeddings, backbone(embeddings), code % codes, None, 10)
    assert failed(checks) == ["cluster"]
    assert checks["cluster"].backbone_value is None
    assert checks["cluster"].value == pytest.approx(codes, rel=0.02)


def test_points_that_share_one_code_and_points_beyond_the_largest_mixture_are_found():
    points, code = clusters(10, 0.0)
    assert cluster_spread(points, np.zeros_like(code)) < math.log(0.002)
    points, code = clusters(500, 0.0, n=3000, f=128)
    assert cluster_spread(points, code) == pytest.approx(math.log(0.001))


def test_points_that_agree_in_many_coordinates_are_found():
    # Three codes agree in a quarter of their coordinates, where only jitter varies.
    points, code = clusters(3, 0.001)
    assert cluster_spread(points, code) < math.log(0.005)


def test_cluster_threshold_follows_the_classes():
    embeddings, code = clusters(20, 0.2)

    def check(assignments, num_classes):
        return collapse_checks(embeddings, embeddings, assignments, None, num_classes)["cluster"]

    assert check(code, None).threshold == check(code, 1).threshold == 2
    assert check(code, 2).threshold == check(code, 3).threshold == 1.5
    assert check(code, 10).threshold == 5
    assert check(code, 40).threshold == 20 and not check(code, 40).ok
    two = np.arange(360) % 2
    assert check(two, 2).ok and not check(two, None).ok
    # One code for each of ten unequal classes (15:1) is no collapse.
    unequal = np.repeat(np.arange(10), [90, 60, 50, 40, 36, 30, 24, 16, 8, 6])
    assert check(unequal, 10).ok


def test_dimensional_threshold_is_the_bits_of_the_codes():
    embeddings, code = clusters(50, 0.2)
    checks = collapse_checks(embeddings, embeddings, code)
    assert checks["dimensional"].threshold == pytest.approx(math.log2(checks["cluster"].value))
    assert collapse_checks(embeddings, embeddings, code * 0)["dimensional"].threshold == 2.5


def with_energy_share(x: np.ndarray, share: float) -> np.ndarray:
    """x moved so that sqrt(variance / mean squared norm) is `share`."""
    x = x.astype(np.float64) - x.mean(0)
    variance = (x**2).sum(1).mean()
    direction = np.ones(x.shape[1]) / math.sqrt(x.shape[1])
    return x + direction * math.sqrt(variance * (1 / share**2 - 1))


def with_effective_rank(rank: float, n: int, f: int) -> np.ndarray:
    """(n, f) centred vectors along floor(rank) directions of equal energy and one weaker; their effective rank is `rank`."""
    equal = math.floor(rank)

    def energies(weak: float) -> np.ndarray:
        return np.array([(1 - weak) / equal] * equal + [weak])

    low, high = 1e-12, 1 / (equal + 1)
    for _ in range(100):
        middle = (low + high) / 2
        p = energies(middle)
        low, high = (middle, high) if math.exp(-(p * np.log(p)).sum()) < rank else (low, middle)
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((n, equal + 1))
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    directions = np.linalg.qr(rng.standard_normal((f, equal + 1)))[0].T
    return (basis * np.sqrt(energies(low))) @ directions


# The published lines, written out a second time: `value > line` is ok.
LINES = {"representation": 0.02, "dimensional": 2.5, "intracluster": math.log(0.01)}


@pytest.mark.parametrize("where", ["value", "backbone_value"])
@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("name", LINES)
def test_either_side_of_the_published_lines(name: str, side: str, where: str) -> None:
    """Just below its line a check fails, just above it passes, on the embeddings as on the features."""
    line = LINES[name]
    healthy, code = clusters(4, 0.2, n=400, f=64)  # log2 of four codes is less than 2.5
    if name == "intracluster":
        ratio, tolerance = (0.0075 if side == "below" else 0.0135), 0.15
        expected = math.log(ratio)
        tested, code = clusters(20, ratio, n=400, f=64)  # the codes +-1 have a spread near 1
        healthy = clusters(20, 0.2, n=400, f=64)[0]
    elif name == "representation":
        expected, tolerance = line * (0.95 if side == "below" else 1.05), 1e-4
        tested = with_energy_share(healthy, expected)
    else:
        expected, tolerance = line + (-0.05 if side == "below" else 0.05), 1e-4
        tested = with_effective_rank(expected, 400, 64)
    arrays = (tested, healthy) if where == "value" else (healthy, tested)
    check = collapse_checks(*arrays, code, None, 10)[name]
    assert check.threshold == pytest.approx(line, rel=1e-12)
    assert getattr(check, where) == pytest.approx(expected, abs=tolerance)
    assert check.ok == (side == "above")


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize(("codes", "line"), [(16, 4.0), (64, 6.0)])
def test_either_side_of_the_bits_of_many_codes(codes: int, line: float, side: str) -> None:
    healthy, code = clusters(codes, 0.2, n=640, f=64)[0], np.arange(640) % codes
    rank = line + (-0.05 if side == "below" else 0.05)
    check = collapse_checks(with_effective_rank(rank, 640, 64), healthy, code, None, 10)["dimensional"]
    assert check.threshold == pytest.approx(line) and check.value == pytest.approx(rank, abs=1e-4)
    assert check.ok == (side == "above")


@pytest.mark.parametrize(
    ("num_classes", "line", "below", "above"),
    [  # images of each code; equally many in k codes have the perplexity k
        (10, 5.0, [82, 80, 80, 80, 78], [79, 79, 79, 79, 79, 5]),
        (40, 20.0, [21] + [20] * 18 + [19], [20] * 19 + [19, 1]),
        (3, 1.5, [345, 55], [339, 61]),
        (2, 1.5, [345, 55], [339, 61]),
        (None, 2.0, [202, 198], [199, 199, 2]),
        (1, 2.0, [202, 198], [199, 199, 2]),
    ],
)
def test_either_side_of_the_line_of_the_perplexity(
    num_classes: int | None, line: float, below: list[int], above: list[int]
) -> None:
    embeddings, _ = clusters(20, 0.2, n=400, f=64)
    for counts, ok in ((below, False), (above, True)):
        code = np.repeat(np.arange(len(counts)), counts)
        shares = np.array(counts) / 400
        check = collapse_checks(embeddings, embeddings, code, None, num_classes)["cluster"]
        assert check.threshold == line and check.ok == ok
        assert check.value == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
        assert abs(check.value - line) < 0.05 * line


def test_energy_share_is_variance_over_energy():
    x = np.random.default_rng(0).exponential(size=(2000, 30)).astype(np.float32)
    centred = x - x.mean(0)
    assert energy_share(x) == pytest.approx(math.sqrt((centred**2).sum() / (x**2).sum()), rel=1e-5)
    assert energy_share(x) == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert energy_share(centred) == pytest.approx(1)
    assert energy_share(np.zeros((5, 3))) == 0


@pytest.mark.parametrize("shape", [(200, 12), (12, 200)])
def test_singular_values_are_those_of_the_covariance(shape):
    x = (np.random.default_rng(0).standard_normal(shape) * np.logspace(0, -3, shape[1]) + 3).astype(np.float32)
    covariance = np.cov(x.astype(np.float64).T, bias=True)
    expected = np.linalg.svd(covariance, compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(singular_values(x), expected, rtol=1e-6, atol=1e-12)


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((400, 5)) - 0.0)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    directions = np.linalg.qr(rng.standard_normal((64, 5)))[0].T
    assert effective_rank(basis @ directions + 9) == pytest.approx(5, abs=1e-6)
    # Energies 1/2, 1/4, 1/8, 1/16, 1/16: an entropy of 15/8 bits.
    energies = np.array([8, 4, 2, 1, 1]) / 16
    assert effective_rank((basis * np.sqrt(energies)) @ directions) == pytest.approx(2 ** (15 / 8), abs=1e-6)
    assert effective_rank(np.ones((30, 4))) == 0


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_rank_and_share_do_not_depend_on_scale_or_rotation(seed, scale):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 8)) * rng.uniform(0.1, 1, 8) + rng.standard_normal(8)
    turned = scale * x @ np.linalg.qr(rng.standard_normal((8, 8)))[0]
    assert effective_rank(turned) == pytest.approx(effective_rank(x), rel=1e-6)
    assert energy_share(turned) == pytest.approx(energy_share(x), rel=1e-6)
    assert 1 <= effective_rank(x) <= 8


@pytest.mark.parametrize("f", [20, 64, 300])
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.5])
def test_cluster_spread_of_separate_clusters_is_the_log_of_the_ratio(f, spread):
    x, code = clusters(20, spread, n=900, f=f)
    means = np.stack([x[code == c].mean(0) for c in range(20)])
    expected = math.log(spread / math.sqrt(means.var(axis=0).mean() + spread**2))
    assert cluster_spread(x, code) == pytest.approx(expected, abs=0.25)


def test_mixture_alone_measures_the_spread():
    # Each image is its own code, so only the mixtures can see the clusters.
    x, code = clusters(10, 0.1, n=600, f=64)
    expected = math.log(0.1 / math.sqrt(x.var(axis=0).mean()))
    assert cluster_spread(x, np.arange(600)) == pytest.approx(expected, abs=0.25)
    assert cluster_spread(x, code) == pytest.approx(cluster_spread(x, np.arange(600)), abs=0.25)


def test_codes_of_two_images_each_are_not_tight_by_chance():
    x = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    assert cluster_spread(x, np.arange(600) // 2) > -0.2


def test_one_gaussian_has_no_clusters():
    x = np.random.default_rng(0).standard_normal((900, 100)).astype(np.float32)
    code = np.random.default_rng(1).integers(0, 30, 900)
    assert -0.2 < cluster_spread(x, code) < 0.05


@settings(max_examples=5)
@given(st.floats(1e-4, 1e4), st.integers(0, 100))
def test_verdicts_do_not_depend_on_scale_or_numbering_of_codes(scale, seed):
    embeddings, code = clusters(12, 0.2, n=120, f=32, seed=seed)
    base = collapse_checks(embeddings, embeddings, code, None, 10)
    numbers = np.random.default_rng(seed).permutation(12)
    scaled = np.float32(scale) * embeddings
    other = collapse_checks(scaled, scaled, 5 * numbers[code], None, 10)
    for name in NAMES:
        assert other[name].value == pytest.approx(base[name].value, rel=1e-2)
        assert other[name].ok == base[name].ok


def test_same_arguments_same_result():
    embeddings, code = clusters(30, 0.2, n=800, f=16)
    # With a code for each image, too, the mixtures alone decide.
    for assignments in (code, np.arange(800)):
        first = collapse_checks(embeddings, embeddings, assignments, None, 10, seed=3)
        assert collapse_checks(embeddings, embeddings, assignments, None, 10, seed=3) == first


def test_mean_assignment_informs_the_explanation():
    embeddings, code = clusters(20, 0.2)
    explanation = collapse_checks(embeddings, embeddings, code, np.full(4096, 1 / 4096))["cluster"].explanation
    assert "20 of 4,096" in explanation


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["embeddings", "features", "mean_assignment"])
def test_what_is_not_finite_is_not_ok(bad, where):
    embeddings, code = clusters(10, 0.2, n=100, f=16)
    arguments = {"embeddings": embeddings, "features": embeddings.copy(), "mean_assignment": np.full(10, 0.1)}
    arguments[where].flat[7] = bad
    checks = collapse_checks(assignments=code, num_classes=10, **arguments)
    assert failed(checks) == NAMES
    for check in checks.values():
        assert math.isnan(check.value) and "NaN or infinity" in check.explanation


def test_too_few_images_are_not_ok_and_twenty_are_enough():
    embeddings, code = clusters(5, 0.2, n=20, f=16)
    checks = collapse_checks(embeddings[:19], embeddings[:19], code[:19], None, 5)
    assert failed(checks) == NAMES
    assert all(math.isnan(c.value) and "too few images (19" in c.explanation for c in checks.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(math.isfinite(c.value) for c in collapse_checks(embeddings, embeddings, code, None, 5).values())


def test_more_images_than_needed_are_sampled(monkeypatch):
    x, code = clusters(10, 0.2, n=600, f=16)
    rank, spread = effective_rank(x), cluster_spread(x, code)
    monkeypatch.setattr(collapse, "SPECTRUM_IMAGES", 300)
    monkeypatch.setattr(collapse, "MIXTURE_IMAGES", 300)
    assert effective_rank(x) != rank and effective_rank(x) == pytest.approx(rank, rel=0.1)
    assert cluster_spread(x, code) == pytest.approx(spread, abs=0.2)


def test_shapes_that_do_not_fit_get_one_line():
    x, code = clusters(5, 0.2, n=40, f=8)
    for arguments, message in [
        ((x, x[:30], code), "features has 30 rows"),
        ((x, x, code[:30]), "assignments has 30"),
        ((x[0], x, code), "embeddings must be"),
        ((x, x.astype(np.int64), code), "features must be"),
        ((x, x, code.astype(np.float32)), "assignments must be"),
    ]:
        with pytest.raises(UsageError, match=message):
            collapse_checks(*arguments)


def test_the_digits_size_takes_seconds():
    embeddings, code = clusters(26, 0.2)
    start = time.process_time()
    collapse_checks(embeddings, backbone(embeddings), code, None, 10)
    assert time.process_time() - start < 20
