"""The backbone in a file: rebuilt from the file alone, loaded into torchvision and timm, and refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from falcon_fast.config import ModelConfig
from falcon_fast.errors import UsageError
from falcon_fast.models.exported import backbone_metadata, load_backbone, load_weights, read_backbone_facts
from falcon_fast.models.network import build_backbone

from ..fuzz import COUNTS, MIB, fuzz

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
# Model, image size, and the stem that `auto` stands for.
MODELS = {
    "resnet8": (ModelConfig("resnet8", width=4), 32, "cifar"),
    "resnet18-cifar": (ModelConfig("resnet18"), 32, "cifar"),
    "resnet18-padded": (ModelConfig("resnet18", stem="cifar-padded", initialisation="torchvision"), 32, "cifar-padded"),
    "resnet18-imagenet": (ModelConfig("resnet18"), 96, "imagenet"),
    "vit": (ModelConfig("vit_tiny_patch16_224"), 48, "imagenet"),
    "swin": (ModelConfig("swin_tiny_patch4_window7_224"), 56, "imagenet"),
}


def trained_looking(backbone: nn.Module) -> nn.Module:
    """With statistics that are not those of a new network."""
    for name, buffer in backbone.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return backbone.eval()


def saved(path: Path, config: ModelConfig, size: int, **changes: str | None) -> nn.Module:
    backbone = trained_looking(build_backbone(config, size))
    metadata: dict[str, Any] = backbone_metadata(config, backbone, size, MEAN, STD) | changes
    weights = {k: v.contiguous() for k, v in backbone.state_dict().items()}
    save_file(weights, path, metadata={k: v for k, v in metadata.items() if v is not None})
    return backbone


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_rebuilds_its_network_alone(kind: str, tmp_path: Path) -> None:
    config, size, stem = MODELS[kind]
    backbone = saved(tmp_path / "b.safetensors", config, size)
    state = torch.get_rng_state()
    found = load_backbone(tmp_path / "b.safetensors", CPU)
    assert torch.equal(state, torch.get_rng_state()) and not found.backbone.training
    model = found.facts.model
    assert (model.name, model.stem, model.initialisation) == (config.name, stem, config.initialisation)
    assert (found.facts.image_size, found.mean, found.std) == (size, MEAN, STD)
    assert found.backbone.num_features == backbone.num_features
    images = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(found.backbone(images), backbone(images), rtol=1e-4, atol=1e-5)


def with_stem(network: nn.Module, padding: int) -> nn.Module:
    network.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    network.maxpool = nn.Identity()
    return network


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.startswith("resnet18")])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_torchvision_and_timm_take_it_where_the_stem_fits(kind: str, library: str, tmp_path: Path) -> None:
    config, size, stem = MODELS[kind]
    backbone = saved(path := tmp_path / "b.safetensors", config, size)
    network = (
        torchvision.models.resnet18() if library == "torchvision" else timm.create_model("resnet18", num_classes=7)
    )
    head = network.fc.weight.detach().clone()
    if stem != "imagenet":
        with pytest.raises(
            UsageError, match=rf"has the stem {stem} \(3x3 .*nn\.Conv2d\(3, 64, 3, 1, ., bias=False\)"
        ) as error:
            load_weights(path, network)
        assert "\n" not in str(error.value)
        with_stem(network, 2 if stem == "cifar-padded" else 1)
    assert load_weights(path, network).mean == MEAN
    assert torch.equal(network.fc.weight, head)
    network.fc = nn.Identity()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), backbone(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_other_networks_of_timm_take_it_beside_their_classifier(name: str, tmp_path: Path) -> None:
    backbone = saved(path := tmp_path / "b.safetensors", ModelConfig(name), 224)
    network = timm.create_model(name, num_classes=5)
    load_weights(path, network)
    held = backbone.state_dict()
    assert held and all(torch.equal(network.state_dict()[key], held[key]) for key in held)


def test_stems_of_one_shape_are_told_apart(tmp_path: Path) -> None:
    """Padding 1 and 2 have the same weights: loading would succeed, and give another function."""
    saved(path := tmp_path / "b.safetensors", *MODELS["resnet18-padded"][:2])
    with pytest.raises(UsageError, match=r"stem cifar-padded \(3x3 convolution, stride 1, padding 2, no max-pooling\)"):
        load_weights(path, with_stem(torchvision.models.resnet18(), 1))
    saved(path, *MODELS["resnet18-imagenet"][:2])
    with pytest.raises(
        UsageError, match=r"nn\.Conv2d\(3, 64, 7, 2, 3, bias=False\) and network\.maxpool = nn\.MaxPool2d"
    ):
        load_weights(path, with_stem(torchvision.models.resnet18(), 1))


def test_another_network_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    saved(path := tmp_path / "b.safetensors", *MODELS["resnet18-imagenet"][:2])
    with pytest.raises(UsageError, match=r"holds a resnet18 .* is missing in the file and of shape"):
        load_weights(path, torchvision.models.resnet34())
    saved(path, *MODELS["resnet8"][:2])
    with pytest.raises(UsageError, match="holds a resnet8 for 32 px, which does not fit"):
        load_weights(path, with_stem(torchvision.models.resnet18(), 1))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": None}, "format in its metadata is missing"),
        ({"format": "falcon_fast backbone 2"}, "format in its metadata is 'falcon_fast backbone 2'"),
        ({"model": "../../etc/passwd"}, "model in its metadata"),
        ({"model": "hf-hub:somebody/something"}, "model in its metadata"),
        ({"model": "resnet18x"}, "unknown backbone 'resnet18x'"),
        ({"model": None}, "model in its metadata is missing"),
        ({"model": "resnet34"}, "does not fit"),
        ({"model": "eva02_enormous_patch14_clip_224", "stem": "imagenet", "image_size": "224"}, "does not fit"),
        ({"stem": "auto"}, "stem in its metadata is 'auto'"),
        ({"stem": "imagenet"}, "does not fit: conv1.weight"),
        ({"initialisation": "he"}, "initialisation in its metadata"),
        ({"image_size": "0"}, "image_size"),
        ({"image_size": "4097"}, "an integer from 1 to 4096"),
        ({"image_size": "1e3"}, "image_size"),
        ({"image_size": "9" * 5000}, "image_size"),
        ({"image_size": "٣٢"}, "image_size"),
        ({"width": "-1"}, "width"),
        ({"mean": "[" * 900}, "mean in its metadata"),
        ({"mean": "[0.5, 0.5, NaN]"}, "mean in its metadata"),
        ({"mean": "[0.5, 0.5]"}, "three numbers"),
        ({"mean": '[0.5, 0.5, "0.5"]'}, "three numbers"),
        ({"mean": f"[0.5, 0.5, 1{'0' * 400}]"}, "mean in its metadata"),
        ({"std": "[0.5, 0.5, 0]"}, "three numbers above 0"),
        ({"std": "[0.5, 0.5, true]"}, "three numbers"),
        ({"std": " " * 10**6 + "[1, 1, 1]"}, "std in its metadata"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
)
def test_what_the_metadata_say_is_checked(changes: dict[str, str | None], line: str, tmp_path: Path) -> None:
    saved(path := tmp_path / "b.safetensors", *MODELS["resnet18-cifar"][:2], **changes)
    with pytest.raises(UsageError) as error:
        load_backbone(path, CPU)
    assert line in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_network_far_larger_than_its_file_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that a network computes are in no file: their size follows from the metadata alone."""
    monkeypatch.setattr("falcon_fast.models.exported.SPARE", -(2**40))
    saved(path := tmp_path / "b.safetensors", *MODELS["resnet8"][:2])
    with pytest.raises(UsageError, match="far more than the file"):
        load_backbone(path, CPU)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"{}", b"\x02\0\0\0\0\0\0\0{}", json.dumps({}).encode() * 9])
def test_what_is_no_such_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(content)
    for function in (
        lambda: load_backbone(path, CPU),
        lambda: read_backbone_facts(path),
        lambda: load_weights(path, nn.Linear(1, 1)),
    ):
        with pytest.raises(UsageError) as error:
            function()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_backbone_facts(tmp_path / "none")
    with pytest.raises(UsageError, match="not a file"):
        read_backbone_facts(str(tmp_path))


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_are_loaded_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "b.safetensors"
    saved(path, MODELS["resnet8"][0], 32)

    outcome = fuzz(lambda: load_backbone(path, CPU), [path], count, name="backbone.safetensors", memory=256 * MIB)
    assert outcome.refused > count // 10 and outcome.accepted > count // 50
