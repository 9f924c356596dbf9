"""The comparison at the end of a run: raw pixels, the untrained network, the trained network; then the four collapse checks.

All three are evaluated by the same probes on the same splits, so the difference between two rows is what training added. This
needs a network and a source, nothing from the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from falcon_fast.config import Config
from falcon_fast.data.sources.changes import Changes
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.evaluation.clustering import ari, hungarian_accuracy, kmeans_nmi, nmi
from falcon_fast.evaluation.collapse import collapse_checks
from falcon_fast.evaluation.features import extract_assigned, extract_features, raw_pixels
from falcon_fast.evaluation.knn import weighted_knn
from falcon_fast.evaluation.probe import linear_probe
from falcon_fast.models.network import FalconNetwork, build_network
from falcon_fast.objective.codes import Codes

UNLABELLED: dict[str, Any] = {"probe": None, "knn": None, "nmi_kmeans": None}


def scores(
    train_features: np.ndarray,
    test_features: np.ndarray,
    train: Split,
    test: Split,
    num_classes: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return linear probe and weighted kNN accuracy and the NMI of k-means on the test split; all None without labels.

    k-means has as many clusters as there are classes; its NMI is None if there are fewer test images than classes.
    """
    if train.labels is None or test.labels is None:
        return dict(UNLABELLED)
    return {
        "probe": linear_probe(train_features, train.labels, test_features, test.labels),
        "knn": weighted_knn(train_features, train.labels, test_features, test.labels, device=device),
        # Each cluster needs an image; a small held-out tenth may have fewer images than classes.
        "nmi_kmeans": kmeans_nmi(test_features, test.labels, num_classes) if len(test.labels) >= num_classes else None,
    }


def evaluate_network(
    config: Config,
    network: FalconNetwork,
    codes: Codes,
    source: Source,
    device: torch.device,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return the figures of `result.json`: `raw_pixels`, `random_init` and `trained` (with `collapse`).

    Args:
        config: of the run; it also builds the untrained network.
        network, codes: what was trained, and its dictionary.
        source: the data set; both splits are used.
        device: where the networks run.
        workers: worker processes that decode.
        say: receives one line per stage, and one for each image that cannot be decoded.
    """
    train, test, k = source.train, source.test, len(source.classes)
    labelled = train.labels is not None and test.labels is not None
    bad_train: dict[int, str] = {}
    bad_test: dict[int, str] = {}

    def report(split: Split, bad: dict[int, str]) -> Split:
        """Report the images of a split that cannot be decoded, after the first pass over it; return the split without them."""
        for index, reason in bad.items():
            say(f"left out, cannot be decoded: {split.images.name(index)} ({reason})")
        return split.without(bad)

    results: dict[str, Any] = {"raw_pixels": dict(UNLABELLED), "random_init": dict(UNLABELLED)}
    if labelled:
        say("evaluating raw pixels")
        train_pixels, test_pixels = (
            raw_pixels(train, source, workers, bad_train),
            raw_pixels(test, source, workers, bad_test),
        )
        train, test = report(train, bad_train), report(test, bad_test)
        results["raw_pixels"] = scores(train_pixels, test_pixels, train, test, k, device)

        say("evaluating the network at random initialisation")
        untrained = build_network(config, source.size).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        train_features = extract_features(untrained, train, source, device, workers)
        test_features = extract_features(untrained, test, source, device, workers)
        results["random_init"] = scores(train_features, test_features, train, test, k, device)

    say("evaluating the trained network")
    seen = extract_assigned(network, codes, config.tau, test, source, device, workers, None if labelled else bad_test)
    if not labelled:
        report(test, bad_test)
    trained = dict(UNLABELLED) | {"nmi_codes": None, "ari_codes": None, "accuracy_codes": None}
    if labelled:
        trained = scores(
            extract_features(network, train, source, device, workers), seen.features, train, test, k, device
        )
        assert test.labels is not None
        trained["nmi_codes"] = nmi(test.labels, seen.assignments)
        trained["ari_codes"] = ari(test.labels, seen.assignments)
        trained["accuracy_codes"] = hungarian_accuracy(test.labels, seen.assignments)
    for split in (source.train, source.test):
        Changes(split.images, say).look()
    trained["codes_used"] = len(np.unique(seen.assignments))
    checks = collapse_checks(
        seen.embeddings, seen.features, seen.assignments, seen.mean_assignment, k if labelled else None
    )
    trained["collapse"] = {
        name: {
            "value": check.value,
            "threshold": check.threshold,
            "ok": check.ok,
            "backbone_value": check.backbone_value,
            "explanation": check.explanation,
        }
        for name, check in checks.items()
    }
    results["trained"] = trained
    return results
