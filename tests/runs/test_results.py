"""The results of a run: what is kept of the network, and how it is loaded."""

from __future__ import annotations

import json
import re
import resource
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import falcon_fast
from falcon_fast import runs
from falcon_fast.errors import UsageError
from falcon_fast.models import network
from falcon_fast.runs import results
from falcon_fast.training.checkpoints.integrity import SEAL, sealed
from falcon_fast.training.checkpoints.storage import INDEX

from ..fuzz import COUNTS, MIB, fuzz
from ..training.tiny import start


def test_the_backbone_is_the_trained_one(finished):
    directory, _ = finished
    trained = runs.load_trained(str(directory), "cpu")
    weights = load_file(directory / "backbone.safetensors")
    state = trained.network.backbone.state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in state)
    with safe_open(directory / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "resnet8" and metadata["image_size"] == "16"
    assert (metadata["stem"], metadata["layout"], metadata["initialisation"]) == ("cifar", "falcon_fast", "timm")
    assert metadata["width"] == str(trained.config.model.width) and metadata["falcon_fast"] == falcon_fast.__version__
    assert json.loads(metadata["mean"]) == list(trained.mean) and json.loads(metadata["std"]) == list(trained.std)


def test_a_run_is_named_by_text_or_by_a_path(finished, tmp_path):
    directory, _ = finished
    assert runs.load_trained(str(directory), "cpu").config == runs.load_trained(directory, "cpu").config
    for missing in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(UsageError, match="no such run directory"):
            runs.load_trained(missing)


def test_the_backbones_file_is_enough(finished, tmp_path):
    directory, _ = finished
    whole = runs.load_run(directory, "cpu")
    alone = runs.load_trained(
        shutil.copy(directory / "backbone.safetensors", tmp_path / "elsewhere.safetensors"), "cpu"
    )
    assert isinstance(alone, runs.TrainedBackbone)
    assert (alone.mean, alone.std, alone.facts.image_size) == (whole.mean, whole.std, whole.config.data.size)
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(alone.backbone(images), whole.network.backbone(images))


def seal(checkpoint: Path, change: Callable[[dict[str, Any]], object] = lambda facts: None) -> None:
    """Change a checkpoint's run.json, and give it the right checksums, as somebody who wants to deceive can."""
    facts = {k: v for k, v in json.loads((checkpoint / "run.json").read_text()).items() if k not in (SEAL, INDEX)}
    change(facts)
    (checkpoint / "run.json").write_text(sealed(facts, checkpoint / INDEX))


def change_settings(directory: Path, changes: dict[str, object]) -> None:
    """Write other values to config.toml and to the checkpoints, without a check."""

    def change(facts: dict[str, Any]) -> None:
        for name, value in changes.items():
            section, key = name.split(".")
            facts["settings"][section][key] = tomllib.loads(f"x = {value}")["x"]

    for checkpoint in (directory / "checkpoints").glob("step-*"):
        seal(checkpoint, change)
    path = directory / "config.toml"
    text = path.read_text()
    for name, value in changes.items():
        section, key = name.split(".")
        start, table, rest = text.partition(f"[{section}]\n")
        text = start + table + re.sub(rf"^{key} = .*$", f"{key} = {value}", rest, count=1, flags=re.MULTILINE)
    path.write_text(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 10**5}, r"has shape .* in the network: it belongs to another network"),
        ({"model.width": 10**12}, "model.width must be at most"),
        ({"model.width": 2**20}, "belongs to another network|cannot be built"),
        ({"loss.embedding_dim": 10**7}, "belongs to another network"),
        ({"loss.num_codes": 2**40, "loss.epsilon": "1e-30"}, "loss.num_codes must be at most"),
        ({"data.size": 10**6}, "data.size must be at most 4096, not 1000000"),
        ({"model.name": '"hf-hub:somebody/model"', "data.size": 32}, "unknown backbone 'hf-hub:somebody/model'"),
        ({"model.name": '"local-dir:/tmp/model"', "data.size": 32}, "unknown backbone"),
        ({"model.name": '"resnet18"'}, "belongs to another network"),
        ({"optimizer.ema_decay": 0.5}, "has no average"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused_before_they_take_memory(copied, changes, message):
    change_settings(copied, changes)
    before = peak()
    with pytest.raises(UsageError, match=message) as caught:
        runs.load_trained(copied, "cpu")
    assert "\n" not in str(caught.value)
    assert peak() - before < 400 * MIB  # importing timm takes some


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_checkpoint_without_a_normalisation_is_one_line(copied):
    for path in (copied / "checkpoints").glob("step-*"):
        seal(path, lambda facts: facts.pop("mean"))
    with pytest.raises(UsageError, match="names no mean or std"):
        runs.load_trained(copied, "cpu")


@pytest.mark.parametrize("count", COUNTS)
def test_a_run_whose_files_are_mutated_is_loaded_or_refused_in_one_line(copied, count, monkeypatch):
    """The settings, the facts and the index of one run, which have to agree with one another, behind the right checksums."""
    monkeypatch.setattr(network, "LARGEST_DICTIONARY", 2**20)
    for old in sorted((copied / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(old)
    (index,) = copied.glob("checkpoints/step-*/index.json")
    files = [copied / "config.toml", index, index.with_name("run.json")]

    def sealed_again() -> None:
        with suppress(Exception):  # what the mutation left is no JSON
            seal(index.parent)

    def read() -> object:
        return runs.load_trained(copied, "cpu")

    outcome = fuzz(read, files, count, name="a run (load_trained)", memory=256 * MIB, then=sealed_again)
    assert outcome.refused > count // 4 and outcome.accepted > count // 50


def test_a_damaged_metrics_csv_costs_the_picture_and_nothing_else(tmp_path):
    run, said = start(tmp_path / "run"), []
    (tmp_path / "run" / "metrics.csv").write_bytes(b"\xff")
    results.finish(run, run.network, tmp_path / "run", 1.0, said.append)
    assert any("no picture of the curves" in line and "metrics.csv is damaged" in line for line in said)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"result.json", "backbone.safetensors"} <= names and "curves.png" not in names
