"""`falcon-fast evaluate`."""

from __future__ import annotations

import json

import pytest

from falcon_fast import runs
from falcon_fast.runs import directory as run_directory


def test_evaluate_reproduces_the_result(copied, falcon_fast):
    directory = copied
    code, out, err = falcon_fast("evaluate", directory, "--device", "cpu")
    assert code == 0, err
    assert "verdict" in out
    again = json.loads((directory / "evaluation.json").read_text())
    result = json.loads((directory / "result.json").read_text())
    assert again["raw_pixels"] == result["raw_pixels"]
    for name in ("probe", "knn", "nmi_codes"):
        assert again["trained"][name] == pytest.approx(result["trained"][name], abs=0.01)
    assert again["trained"]["codes_used"] == result["trained"]["codes_used"]


def test_other_images_are_seen_as_the_run_saw_its_own(copied, image_folder, falcon_fast, monkeypatch):
    from falcon_fast.evaluation import protocol

    sources = []
    extract = protocol.extract_features
    monkeypatch.setattr(protocol, "extract_features", lambda *a: sources.append(a[2]) or extract(*a))
    code, out, err = falcon_fast("evaluate", copied, "--data", image_folder)
    assert code == 0, err
    assert "held out" in out
    trained = runs.load_trained(copied, "cpu")
    assert {(source.size, source.mean, source.std) for source in sources} == {(16, trained.mean, trained.std)}


def test_figures_are_shown_though_they_cannot_be_written(copied, monkeypatch, falcon_fast):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "write_json", full)
    code, out, err = falcon_fast("evaluate", copied)
    assert code == 1 and "trained by FALCON" in out and "No space left" in err


def test_the_published_protocol_stands_beside_ours(copied, falcon_fast):
    code, out, err = falcon_fast("evaluate", copied, "--protocol", "published")
    assert code == 0, err
    assert "published: batches of 64, not sorted by class" in out and "without eval()" in out
    found = json.loads((copied / "evaluation.json").read_text())
    result = json.loads((copied / "result.json").read_text())
    assert found["trained"]["nmi_codes"] == pytest.approx(result["trained"]["nmi_codes"], abs=0.01)
    assert found["published"]["batch_size"] == 64 and 0 <= found["published"]["nmi_codes"] <= 1


@pytest.mark.parametrize(
    ("protocol", "line"), [("published", "have no labels: sort them"), ("Published", "unknown --protocol 'Published'")]
)
def test_a_protocol_that_does_not_fit_is_refused_before_anything_is_evaluated(
    copied, image_folder, falcon_fast, protocol, line
):
    for image in sorted(image_folder.rglob("*.png")):  # one flat folder: no labels
        image.rename(image_folder / f"{image.parent.name}-{image.name}")
    for folder in ("dark", "light"):
        (image_folder / folder).rmdir()
    code, out, err = falcon_fast("evaluate", copied, "--data", image_folder, "--protocol", protocol)
    assert code == 2 and line in err and err.count("\n") == 1
    assert "evaluating" not in out and not (copied / "evaluation.json").exists()
