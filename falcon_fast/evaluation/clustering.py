"""How well clusters (codes, or k-means on features) agree with labels: NMI, ARI, Hungarian accuracy.

None of the measures depends on how clusters are numbered. With labels Y and clusters Z, I their mutual information and
H the entropy: NMI = 2 I(Y; Z) / (H(Y) + H(Z)), the arithmetic mean, which is scikit-learn's default and the paper's.
"""

from __future__ import annotations

import warnings

import numpy as np

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.arrays import check_features, check_labels, standardise

# Restarts of k-means; the best of ten is the common practice of the field and differs little from one seed to the next.
RESTARTS = 10

# n * d * clusters beyond which full k-means takes minutes on two cores (10 restarts of some 50 passes at 2 FLOP each),
# and mini-batches of 4,096 stand in for it.
FULL_KMEANS_WORK = 2e9


def nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Normalised mutual information in [0, 1] of two integer (n,) arrays; 1 = the same partition."""
    from sklearn.metrics import normalized_mutual_info_score

    _check_pair(labels, clusters)
    return float(normalized_mutual_info_score(labels, clusters))


def ari(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index of two integer (n,) arrays; 1 = the same partition, 0 = what chance gives, at least -0.5."""
    from sklearn.metrics import adjusted_rand_score

    _check_pair(labels, clusters)
    return float(adjusted_rand_score(labels, clusters))


def hungarian_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Accuracy in [0, 1] under the best one-to-one matching of clusters with classes (integer (n,) arrays).

    Where clusters outnumber classes, those left without a class count as errors: a class spread over many codes is
    punished here, and hardly by NMI.
    """
    from scipy.optimize import linear_sum_assignment

    _check_pair(labels, clusters)
    label_names, label_index = np.unique(labels, return_inverse=True)
    cluster_names, cluster_index = np.unique(clusters, return_inverse=True)
    shape = (len(label_names), len(cluster_names))
    cells = np.ravel_multi_index((label_index, cluster_index), shape)
    together = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    return float(together[linear_sum_assignment(together, maximize=True)].sum() / len(labels))


def kmeans_nmi(features: np.ndarray, labels: np.ndarray, num_clusters: int, seed: int = 0) -> float:
    """NMI in [0, 1] between labels and k-means clusters of standardised features.

    Args:
        features: (n, d), floating point.
        labels: (n,) integers.
        num_clusters: k, from 1 to n; the number of classes, as a rule.
        seed: of k-means' initialisation.

    k-means is Lloyd's, best of 10 restarts; above n * d * k = 2e9 (50,000 x 512 with 78 clusters) it is scikit-learn's
    MiniBatchKMeans.

    Raises:
        UsageError: shapes that do not fit, NaN or infinity in features, num_clusters out of range.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    check_features(features)
    check_labels(labels, len(features))
    if not 1 <= num_clusters <= len(features):
        raise UsageError(f"k-means needs from 1 to {len(features)} clusters (one per image), not {num_clusters}")
    (points,) = standardise(features)
    kmeans: KMeans | MiniBatchKMeans
    if points.size * num_clusters <= FULL_KMEANS_WORK:
        kmeans = KMeans(num_clusters, n_init=RESTARTS, random_state=seed)
    else:
        kmeans = MiniBatchKMeans(num_clusters, n_init=RESTARTS, batch_size=4096, random_state=seed)
    with warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters: NMI says so better than a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = kmeans.fit_predict(points)
    return nmi(labels, clusters)


def _check_pair(labels: np.ndarray, clusters: np.ndarray) -> None:
    check_labels(labels, len(labels))
    if len(labels) == 0:
        raise UsageError("there are no labels to compare clusters with")
    check_labels(clusters, len(labels), "clusters")
