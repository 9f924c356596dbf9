"""The results of a run: what is kept of the network, and how it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import falcon_fast
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
