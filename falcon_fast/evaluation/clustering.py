"""Agreement of clusters (codes, or k-means on features) with labels: NMI, ARI, Hungarian accuracy.

None of the measures depends on how the clusters are numbered. With labels Y, clusters Z, mutual information I and entropy H:
NMI = 2 I(Y; Z) / (H(Y) + H(Z)), normalised by the arithmetic mean, which is scikit-learn's default and the paper's.
"""

from __future__ import annotations

import warnings

import numpy as np

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.arrays import check_features, check_labels, standardise

# Restarts of k-means. The best of ten is common practice in the field and differs little between seeds.
RESTARTS = 10

# Above this n * d * clusters, full k-means takes minutes on two cores (10 restarts of about 50 passes at 2 FLOP each), and
# mini-batches of 4,096 are used instead.
FULL_KMEANS_WORK = 2e9


def nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the normalised mutual information, in [0, 1], of two integer (n,) arrays; 1 for the same partition."""
    from sklearn.metrics import normalized_mutual_info_score

    _check_pair(labels, clusters)
    return float(normalized_mutual_info_score(labels, clusters))


def ari(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the adjusted Rand index of two integer (n,) arrays: 1 for the same partition, 0 for chance, at least -0.5."""
    from sklearn.metrics import adjusted_rand_score

    _check_pair(labels, clusters)
    return float(adjusted_rand_score(labels, clusters))


def hungarian_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the accuracy, in [0, 1], under the best one-to-one matching of clusters with classes (integer (n,) arrays).

    If there are more clusters than classes, the clusters left without a class count as errors: a class that is spread over many
        codes
    lowers this accuracy much, but NMI hardly.
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
    """Return the NMI, in [0, 1], of labels and k-means clusters of standardised features.

    k-means is Lloyd's, best of 10 restarts. If n * d * k exceeds 2e9 (50,000 x 512 with 78 clusters), it is scikit-learn's
    MiniBatchKMeans.

    Args:
        features: (n, d), floating point.
        labels: (n,) integers.
        num_clusters: k, from 1 to n; usually the number of classes.
        seed: for the initialisation of k-means.

    Raises:
        UsageError: shapes do not match, features hold NaN or infinity, or num_clusters is out of range.
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
        # Collapsed features have fewer distinct points than clusters; the NMI shows this better than a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = kmeans.fit_predict(points)
    return nmi(labels, clusters)


def _check_pair(labels: np.ndarray, clusters: np.ndarray) -> None:
    check_labels(labels, len(labels))
    if len(labels) == 0:
        raise UsageError("there are no labels to compare clusters with")
    check_labels(clusters, len(labels), "clusters")
