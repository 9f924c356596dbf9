"""The four ways in which a representation collapses, measured without labels and independently of scale.

x are vectors over the test images: the embeddings of the projector, which the theory is about, and the features of the backbone,
which the user keeps; n images, f dimensions. Each check has a line, its threshold. A check is ok only if both the embeddings and
the features are above the line. The lines follow from what collapse and arithmetic do, not from any data set.

**representation**: everything maps to one point. The value is the share of the energy that varies, sqrt(E|x - Ex|^2 / E|x|^2), in
[0, 1]. Collapse gives 0, or what rounding leaves: one bfloat16 rounding has a relative error of 0.002 (rms; at most 2^-8), and
the twenty to fifty layers of a network add up to 0.01. Centred embeddings give 1, non-negative features 0.3 to 0.7. Line: 0.02,
which rounding alone cannot reach.

**dimensional**: everything lies in few directions. The value is the effective rank exp(-sum_i p_i ln p_i) of the centred
second-moment matrix, where p are its eigenvalues divided by their sum (Roy and Vetterli, 2007). A straight line has rank 1, a
plane at most 2, and noise of 0.01 of its size adds less than 0.01. A saturated direction of tanh carries one bit, so K clusters
need at least log2 K directions; K is the number of clusters that the codes distinguish, measured by their perplexity (below).
Healthy embeddings of K separate clusters have about K - 1. Line: the larger of log2 K and 2.5 (a plane plus a third direction
with a tenth of the energy). Two or three tight clusters span a straight line or a plane and fail, as they should: a dictionary
has many codes to use.

**cluster**: only some codes are used. The value is the perplexity exp(-sum_j q_j ln q_j), where q_j is the share of the images
whose largest logit is code j; total collapse gives 1. A perfect clustering gives the perplexity of the classes: K if K classes
are equally frequent, less if they are not, and by chance about (K - 1) / (2n) nats less (Miller, 1955). One bit, ln 2 nats,
leaves room for both: the chance part fits from n = 0.72 K images on. Line: K / 2, where two classes have to share each cluster;
1.5 for K of 2 or 3, which lies between the one cluster of collapse and the two that any distinction needs; 2 if K is unknown,
which only more than two clusters can pass. The backbone has no codes and therefore no value.

**intracluster**: each cluster shrinks to a point. The value is the entropy of a mixture of diagonal Gaussians minus that of one
Gaussian with the same variances, divided by the number of dimensions: about ln(standard deviation within clusters / overall). It
is 0 if there are no clusters and minus infinity for points. The mixtures have K = 10, 20, 50, 100, 200 components (at least 10
images each); their entropy is estimated by Monte Carlo with 10,000 samples, as in the paper. A mixture with fewer components than
there are points sees wide components and misses the collapse, so there is one more mixture whose components are the codes: equal
vectors have equal codes. The value is the smallest over all mixtures. A floor of 0.001 under every standard deviation (in units
of the overall one) limits the value to ln 0.001 = -6.9. Near +-1 a bfloat16 tanh has steps of 2^-8, an rms error of 0.001, so
points give -6.9 to about -6. Clusters that keep a spread of 5 to 30 % give -3 to -1. Line: ln 0.01 = -4.6. Before the fit, the
vectors are projected on 64 random orthogonal directions, and each direction is scaled to unit variance, which makes the fit cheap
and well posed. Principal components or an earlier standardisation would not do: the clusters lie in the few leading components,
and some coordinates are equal for all clusters; the other components or coordinates are noise, which scaling would amplify until
it hides the collapse. In a random direction, the ratio of the spread within clusters to the overall spread is that of the whole
space.

One failure can make other checks fail too: equal vectors fail all four; five points have too few codes for eleven classes. If
`representation` fails, ignore the other three: they then describe rounding noise, and noise has every direction.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.arrays import CONSTANT, check_features, check_labels, moments

MIN_IMAGES = 20
MIN_ENERGY_SHARE = 0.02
MIN_DIRECTIONS = 2.5
MIN_PERPLEXITY_UNKNOWN, MIN_PERPLEXITY = 2.0, 1.5
MIN_SPREAD, SPREAD_FLOOR = 0.01, 0.001

MIXTURE_SIZES = (10, 20, 50, 100, 200)
IMAGES_PER_COMPONENT = 10
MIXTURE_DIMENSIONS = 64
MONTE_CARLO_SAMPLES = 10_000
# What the largest mixture needs; more images would only cost time.
MIXTURE_IMAGES = MIXTURE_SIZES[-1] * IMAGES_PER_COMPONENT
# More images change no eigenvalue that matters, and this limits memory (10,000 x 2048 float64: 160 MB).
SPECTRUM_IMAGES = 10_000


@dataclass(frozen=True)
class CollapseCheck:
    """The result of one check.

    Attributes:
        value: on the embeddings; NaN if nothing can be measured.
        threshold: the line that `value` and `backbone_value` must exceed.
        ok: whether both exceed it.
        backbone_value: on the backbone's features; None if the check has no meaning there.
        explanation: a short phrase for a table.
    """

    value: float
    threshold: float
    ok: bool
    backbone_value: float | None
    explanation: str


def collapse_checks(
    embeddings: np.ndarray,
    features: np.ndarray,
    assignments: np.ndarray,
    mean_assignment: np.ndarray | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> dict[str, CollapseCheck]:
    """Return the four checks by name: `representation`, `dimensional`, `cluster`, `intracluster` (see the module's docstring).

    NaN or infinity anywhere, or fewer than 20 images, give checks that are not ok, and no exception.

    Args:
        embeddings: (n, f) floating point, the projector's outputs in evaluation mode on test images.
        features: (n, d) floating point, the backbone's outputs for the same images.
        assignments: (n,) integers, the code with the largest logit.
        mean_assignment: (c,) floating point, the mean softmax over the images; used only in the explanation.
        num_classes: number of classes, if known.
        seed: for subsampling, projection and mixtures; the result is a function of the arguments.

    Raises:
        UsageError: the shapes do not match.
    """
    check_features(embeddings, "embeddings", finite=False)
    check_features(features, "features", finite=False)
    check_labels(assignments, len(embeddings), "assignments")
    if len(features) != len(embeddings):
        raise UsageError(f"features has {len(features)} rows, embeddings {len(embeddings)}: both need one per image")

    perplexity = _perplexity(np.unique(assignments, return_counts=True)[1])
    thresholds = {
        "representation": MIN_ENERGY_SHARE,
        "dimensional": max(MIN_DIRECTIONS, math.log2(perplexity)),
        "cluster": _least_perplexity(num_classes),
        "intracluster": math.log(MIN_SPREAD),
    }
    unmeasurable = _why_unmeasurable(embeddings, features, mean_assignment)
    if unmeasurable:
        return {
            name: CollapseCheck(math.nan, threshold, False, None if name == "cluster" else math.nan, unmeasurable)
            for name, threshold in thresholds.items()
        }

    values: dict[str, tuple[float, float | None]] = {
        "representation": (energy_share(embeddings), energy_share(features)),
        "dimensional": (effective_rank(embeddings, seed), effective_rank(features, seed)),
        "cluster": (perplexity, None),
        "intracluster": (cluster_spread(embeddings, assignments, seed), cluster_spread(features, assignments, seed)),
    }
    in_use = f"{len(np.unique(assignments)):,}"
    if mean_assignment is not None:
        in_use += f" of {len(mean_assignment):,}"
    explanations = {
        "representation": "share of the energy that varies; a constant output has 0",
        "dimensional": "effective rank; one direction has 1",
        "cluster": f"perplexity of the codes, {in_use} in use; one code has 1",
        "intracluster": "ln(spread within clusters / in all); points have -6.9",
    }
    checks = {}
    for name, (value, backbone_value) in values.items():
        threshold = thresholds[name]
        ok = value > threshold and (backbone_value is None or backbone_value > threshold)
        checks[name] = CollapseCheck(value, threshold, ok, backbone_value, explanations[name])
    return checks


def energy_share(x: np.ndarray) -> float:
    """Return sqrt(total variance / mean squared norm) of (n, f) vectors, in [0, 1]; 0 for constant vectors, including zeros."""
    mean, std, _ = moments(x)
    variance, energy = float(std @ std), float(std @ std + mean @ mean)
    return math.sqrt(variance / energy) if energy > 0 else 0.0


def singular_values(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the singular values of the centred second-moment matrix of (n, f) vectors: min(n, f) values, float64, descending.

    They are for the figure in which dimensional collapse shows as a drop on a logarithmic axis (Jing et al., 2022). Of more than
    10,000 images, a random 10,000 are used. Values below about 1e-15 of the first are rounding noise; negative ones are set to 0.
    """
    x = _some(x, SPECTRUM_IMAGES, seed).astype(np.float64)
    x -= x.mean(axis=0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return np.linalg.eigvalsh(gram / len(x))[::-1].clip(min=0)


def effective_rank(x: np.ndarray, seed: int = 0) -> float:
    """Return exp(entropy) of the normalised spectrum of (n, f) vectors, from 1 to min(n - 1, f); 0 for constant vectors."""
    return _perplexity(singular_values(x, seed))


def cluster_spread(x: np.ndarray, assignments: np.ndarray, seed: int = 0) -> float:
    """Return about ln(standard deviation within clusters / overall) of (n, f) vectors, at least ln 0.001.

    See `intracluster` in the module's docstring.
    """
    chosen = _some(np.arange(len(x)), MIXTURE_IMAGES, seed)
    x, assignments = _project(x[chosen], seed), assignments[chosen]
    if x.shape[1] == 0:
        return math.log(SPREAD_FLOOR)
    sizes = [k for k in MIXTURE_SIZES if k * IMAGES_PER_COMPONENT <= len(x)] or [len(x) // IMAGES_PER_COMPONENT]
    spreads = [_mixture_spread(x, k, seed) for k in sizes]
    return max(min(*spreads, _code_spread(x, assignments)), math.log(SPREAD_FLOOR))


def _mixture_spread(x: np.ndarray, components: int, seed: int) -> float:
    """Return the entropy of a fitted diagonal mixture minus that of one Gaussian, per dimension.

    x: (n, f), of unit variance in each dimension.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(components, covariance_type="diag", reg_covar=SPREAD_FLOOR**2, random_state=seed)
    with warnings.catch_warnings():
        # Points make fewer clusters than components; and a fit that has not converged can still be used.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(x)
    samples, _ = mixture.sample(MONTE_CARLO_SAMPLES)
    entropy = -float(mixture.score_samples(samples).mean())
    return entropy / int(x.shape[1]) - 0.5 * math.log(2 * math.pi * math.e)


def _code_spread(x: np.ndarray, assignments: np.ndarray) -> float:
    """Return the same for the mixture whose components are the codes, assuming that they do not overlap.

    x: (n, f), of unit variance in each dimension.
    """
    _, code, counts = np.unique(assignments, return_inverse=True, return_counts=True)
    if len(counts) == len(x):
        return 0.0  # no code has two images, so there is no spread within a cluster
    means = np.zeros((len(counts), x.shape[1]))
    np.add.at(means, code, x)
    means /= counts[:, None]
    # n - codes degrees of freedom, so that small clusters do not look tight by chance.
    within = ((x - means[code]) ** 2).sum(axis=0) / (len(x) - len(counts))
    return 0.5 * float(np.log(within + SPREAD_FLOOR**2).mean())


def _project(x: np.ndarray, seed: int) -> np.ndarray:
    """Project (n, f) on at most 64 random directions of unit variance, float64; (n, 0) if x is constant."""
    if energy_share(x) <= CONSTANT:
        return np.zeros((len(x), 0))
    width = x.shape[1]
    gaussian = np.random.default_rng(seed).standard_normal((width, min(width, MIXTURE_DIMENSIONS)))
    x = (x - x.mean(axis=0, dtype=np.float64)) @ np.linalg.qr(gaussian)[0]
    scaled: np.ndarray = x / x.std(axis=0)
    return scaled


def _some(x: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Return `limit` rows of x, drawn without replacement, in their order; all rows if there are not more."""
    if len(x) <= limit:
        return x
    return x[np.sort(np.random.default_rng(seed).choice(len(x), limit, replace=False))]


def _perplexity(weights: np.ndarray) -> float:
    """Return exp(entropy) of non-negative weights, after normalisation; 0 if all weights are 0."""
    weights = weights[weights > 0]
    if len(weights) == 0:
        return 0.0
    shares = weights / weights.sum()
    return math.exp(-float(shares @ np.log(shares)))


def _least_perplexity(num_classes: int | None) -> float:
    """Return the line of the `cluster` check."""
    if num_classes is None or num_classes < 2:
        return MIN_PERPLEXITY_UNKNOWN
    return max(MIN_PERPLEXITY, num_classes / 2)


def _why_unmeasurable(*arrays: np.ndarray | None) -> str:
    """Return a phrase on why the arrays cannot be measured, empty if they can; the first array has one row per image."""
    if any(array is not None and not np.isfinite(array).all() for array in arrays):
        return "not measurable: NaN or infinity in the network's outputs"
    n = len(arrays[0]) if arrays[0] is not None else 0
    if n < MIN_IMAGES:
        return f"not measurable: too few images ({n}; at least {MIN_IMAGES})"
    return ""
