"""The figures of a run: each is the measure that its name says, of the features and the split that it belongs to."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch

from falcon_fast.config import load_recipe, override
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.evaluation import protocol
from falcon_fast.evaluation.clustering import ari, hungarian_accuracy, kmeans_nmi, nmi
from falcon_fast.evaluation.collapse import collapse_checks
from falcon_fast.evaluation.features import Assigned
from falcon_fast.evaluation.knn import weighted_knn
from falcon_fast.evaluation.probe import linear_probe
from falcon_fast.evaluation.protocol import UNLABELLED, evaluate_network, scores
from falcon_fast.models.network import build_codes, build_network

CPU = torch.device("cpu")


def split(labels):
    count = 40 if labels is None else len(labels)
    return Split(ImageArray(np.zeros((count, 4, 4, 3), np.uint8)), None if labels is None else np.asarray(labels))


@pytest.fixture
def blobs():
    """Two far clusters in 5 dimensions, their labels in turn."""
    labels = np.arange(40) % 2
    features = np.random.RandomState(0).randn(40, 5).astype(np.float32) + 20 * (2 * labels[:, None] - 1).astype(
        np.float32
    )
    return features, labels


def test_separate_clusters_score_full_marks(blobs):
    features, labels = blobs
    assert scores(features, features, split(labels), split(labels), 2, CPU) == {
        "probe": 1.0,
        "knn": 1.0,
        "nmi_kmeans": 1.0,
    }


def test_without_labels_there_is_nothing_to_score(blobs):
    assert scores(blobs[0], blobs[0], split(None), split(None), 0, CPU) == UNLABELLED


def test_fewer_test_images_than_classes(blobs):
    features, _ = blobs
    labels = np.arange(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(features, features[:3], split(labels), split(labels[:3]), 40, CPU)
    assert found["nmi_kmeans"] is None and found["probe"] is not None


# ---- the figures of result.json ----

CONFIG = override(load_recipe("digits"), {"model.width": 4, "loss.embedding_dim": 16, "loss.num_codes": 64})
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def source():
    """Two splits of different sizes, of three classes that differ a little in brightness."""
    random = np.random.RandomState(0)

    def noisy(n: int) -> Split:
        labels = random.randint(0, 3, n)
        pixels = (random.randint(0, 216, (n, 16, 16, 3)) + 20 * labels[:, None, None, None]).astype(np.uint8)
        return Split(ImageArray(pixels), labels)

    return Source(noisy(90), noisy(60), ("a", "b", "c"), 16, MEAN, STD, "x")


@pytest.fixture
def trained():
    """Weights other than those at initialisation, and running statistics of its own."""
    network = build_network(override(CONFIG, {"training.seed": 77}), 16)
    network(torch.randn(64, 3, 16, 16))
    return network


def frozen(network, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Features and embeddings of a split, of a copy of the network in evaluation mode, without the package's own code."""
    pixels = torch.from_numpy(split.images.pixels).float() / 255
    with torch.no_grad():
        features, embeddings = copy.deepcopy(network).eval()(
            ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        )
    return features.numpy(), embeddings.numpy()


def test_each_row_is_its_own_networks_and_each_figure_its_own_measures(source, trained):
    train, test = source.train, source.test
    codes = build_codes(CONFIG)
    result = evaluate_network(CONFIG, trained, codes, source, CPU)

    def figures(train_x: np.ndarray, test_x: np.ndarray) -> dict[str, float]:
        return {
            "probe": linear_probe(train_x, train.labels, test_x, test.labels),
            "knn": weighted_knn(train_x, train.labels, test_x, test.labels),
            "nmi_kmeans": kmeans_nmi(test_x, test.labels, 3),
        }

    train_features, _ = frozen(trained, train)
    test_features, embeddings = frozen(trained, test)
    logits = torch.from_numpy(embeddings) @ codes.dense() / CONFIG.tau
    assigned = logits.argmax(1).numpy()
    expected = {
        "raw_pixels": figures(
            *(x.images.pixels.transpose(0, 3, 1, 2).reshape(len(x.images), -1) / 255 for x in (train, test))
        ),
        "random_init": figures(*(frozen(build_network(CONFIG, 16), x)[0] for x in (train, test))),
        "trained": figures(train_features, test_features)
        | {
            "nmi_codes": nmi(test.labels, assigned),
            "ari_codes": ari(test.labels, assigned),
            "accuracy_codes": hungarian_accuracy(test.labels, assigned),
            "codes_used": len(set(assigned.tolist())),
        },
    }
    for row, values in expected.items():
        for name, value in values.items():
            # The features agree up to rounding, which moves at most one of 60 images; the codes agree exactly.
            tolerance = 1e-9 if "codes" in name else 0.021
            assert result[row][name] == pytest.approx(value, abs=tolerance), (row, name)
    # The rows differ, or the comparison above would show nothing.
    shown = [tuple(result[row][name] for name in ("probe", "knn", "nmi_kmeans")) for row in expected]
    assert len(set(shown)) == 3
    checks = collapse_checks(embeddings, test_features, assigned, logits.softmax(1).mean(0).numpy(), 3)
    assert list(result["trained"]["collapse"]) == list(checks)
    for name, check in checks.items():
        ours = result["trained"]["collapse"][name]
        assert ours["value"] == pytest.approx(check.value, rel=0.05) and ours["ok"] == check.ok
        assert ours["threshold"] == pytest.approx(check.threshold) and ours["explanation"] == check.explanation
        assert ours["backbone_value"] == (None if name == "cluster" else pytest.approx(check.backbone_value, rel=0.05))


def test_each_measure_of_the_codes_is_its_own(source, trained, monkeypatch):
    """With assignments that tell some images apart: an untrained network puts all of them into one code."""
    labels, random = source.test.labels, np.random.RandomState(3)
    assigned = np.where(random.rand(60) < 0.6, labels, random.randint(0, 8, 60))
    seen = Assigned(random.randn(60, 16), random.randn(60, 16), assigned, np.full(64, 1 / 64, np.float32))
    monkeypatch.setattr(protocol, "extract_assigned", lambda *_: seen)
    result = evaluate_network(CONFIG, trained, build_codes(CONFIG), source, CPU)["trained"]
    expected = nmi(labels, assigned), ari(labels, assigned), hungarian_accuracy(labels, assigned)
    assert (result["nmi_codes"], result["ari_codes"], result["accuracy_codes"]) == pytest.approx(expected)
    assert min(abs(a - b) for k, a in enumerate(expected) for b in expected[:k]) > 0.01  # they can be told apart
    assert result["codes_used"] == len(set(assigned.tolist())) > 3
    assert "of 64" in result["collapse"]["cluster"]["explanation"]


def test_the_probe_and_the_vote_learn_from_the_training_split_alone():
    random = np.random.RandomState(1)
    features, labels = random.randn(90, 20).astype(np.float32), random.randint(0, 3, 90)
    # Noise: only a classifier that has seen the test labels can know them.
    train, test = split(labels[:60]), split(labels[60:])
    found = scores(features[:60], features[60:], train, test, 3, CPU)
    assert max(found["probe"], found["knn"]) < 0.7
    assert scores(features[60:], features[60:], test, test, 3, CPU)["probe"] > 0.85


def test_a_source_without_labels_has_collapse_checks_alone(source, trained):
    unlabelled = dataclasses.replace(
        source, train=Split(source.train.images, None), test=Split(source.test.images, None), classes=()
    )
    result = evaluate_network(CONFIG, trained, build_codes(CONFIG), unlabelled, CPU)
    assert result["raw_pixels"] == result["random_init"] == UNLABELLED
    assert result["trained"]["probe"] is None and result["trained"]["nmi_codes"] is None
    assert result["trained"]["collapse"]["cluster"]["threshold"] == 2  # of an unknown number of classes
