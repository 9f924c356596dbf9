"""The results of a run: what is kept of the network, and how it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from falcon_fast import runs
from falcon_fast.errors import UsageError


def test_the_backbone_is_the_trained_one(finished):
    directory, _ = finished
    trained = runs.load_trained(str(directory), "cpu")
    weights = load_file(directory / "backbone.safetensors")
    state = trained.network.backbone.state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in state)
    with safe_open(directory / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "resnet8" and metadata["image_size"] == "16"
    assert json.loads(metadata["mean"]) == list(trained.mean) and json.loads(metadata["std"]) == list(trained.std)


def test_a_run_is_named_by_text_or_by_a_path(finished, tmp_path):
    directory, _ = finished
    assert runs.load_trained(str(directory), "cpu").config == runs.load_trained(directory, "cpu").config
    for missing in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(UsageError, match="no such run directory"):
            runs.load_trained(missing)
