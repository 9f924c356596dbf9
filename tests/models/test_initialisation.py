"""The published start of a CIFAR ResNet-18, against torchvision's own network changed as the published code changes it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from scipy import stats
from torch import nn

from falcon_fast.config import ModelConfig, dump_config, load_config, load_recipe, override, validate
from falcon_fast.errors import UsageError
from falcon_fast.models.network import build_backbone, build_network
from falcon_fast.training.run import prepare


def published_resnet18(stem: bool = True) -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    if stem:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        network.maxpool = nn.Identity()
    return network


@pytest.fixture(scope="module")
def mine() -> nn.Module:
    return build_network(override(load_recipe("cifar10"), {"training.seed": 5, "loss.num_codes": 64}), 32).backbone


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100"])
def test_published_recipes_start_as_published(recipe: str) -> None:
    assert load_recipe(recipe).model == ModelConfig("resnet18", stem="cifar-padded", initialisation="torchvision")


def test_names_shapes_and_numbers_of_a_seed_are_torchvisions(mine: nn.Module) -> None:
    torch.manual_seed(5)
    theirs = published_resnet18().state_dict()
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_equal_weights_give_equal_features(mine: nn.Module, training: bool) -> None:
    mine, theirs = copy.deepcopy(mine), published_resnet18()
    theirs.load_state_dict(mine.state_dict())
    for network in (mine, theirs):
        network.train(training)
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(mine(images), theirs(images), rtol=0, atol=1e-6)


def test_every_tensor_has_its_distribution(mine: nn.Module) -> None:
    """He's normal for the convolutions, torch's default for the stem, 1 for every scale: from the definitions."""
    bound = 1 / math.sqrt(27)
    for name, tensor in mine.state_dict().items():
        values = tensor.flatten().double().numpy()
        if name == "conv1.weight":
            assert abs(values).max() <= bound and values.std() == pytest.approx(0.111, rel=0.03)
            assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4
            assert stats.kurtosis(values) == pytest.approx(-1.2, abs=0.1)
        elif tensor.dim() == 4:
            deviation = math.sqrt(2 / (tensor.shape[0] * tensor.shape[2] * tensor.shape[3]))
            assert values.std() == pytest.approx(deviation, rel=0.03), name
            assert stats.kstest(values[:50_000], stats.norm(0, deviation).cdf).pvalue > 1e-4, name
            assert stats.kurtosis(values) == pytest.approx(0, abs=0.15), name
        else:
            expected = 1.0 if name.endswith((".weight", "running_var")) else 0.0
            assert (values == expected).all(), name


def test_timm_starts_blocks_as_their_shortcut_and_the_stem_as_he() -> None:
    torch.manual_seed(0)
    network = build_backbone(ModelConfig("resnet18", stem="cifar-padded"), 32)
    last = [network.state_dict()[f"layer{i}.{j}.bn2.weight"] for i in range(1, 5) for j in range(2)]
    assert all((scale == 0).all() for scale in last)
    assert network.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)  # .059


def test_without_a_cifar_stem_the_7x7_one_is_torchvisions() -> None:
    torch.manual_seed(3)
    network = build_backbone(ModelConfig("resnet18", stem="imagenet", initialisation="torchvision"), 64)
    torch.manual_seed(3)
    theirs = published_resnet18(stem=False).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8", "resnet50d", "vit_tiny_patch16_224", "resnetv2_50", "resnet26"])
def test_other_networks_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"model\.initialisation=torchvision is for .*use"):
        build_backbone(ModelConfig(name, initialisation="torchvision"), 32)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown model\.initialisation 'he': choose one of timm, torchvision"):
        validate(override(load_recipe("cifar10"), {"model.initialisation": "he"}))


def test_the_run_records_it_and_old_runs_keep_their_meaning(tmp_path) -> None:
    config = override(load_recipe("digits"), {"model.name": "resnet18", "loss.num_codes": 64, "training.device": "cpu"})
    new = override(config, {"model.initialisation": "torchvision"})
    path = tmp_path / "config.toml"
    path.write_text(dump_config(new))
    assert 'initialisation = "torchvision"' in path.read_text() and load_config(path) == new
    path.write_text(
        path.read_text().replace('initialisation = "torchvision"\n', "")
    )  # of a run before there was a choice
    assert load_config(path).model.initialisation == "timm"
    assert prepare(config).facts["model"] == "resnet18, width 32, stem auto, tanh to f = 256"
    assert "initialised as torchvision" in prepare(new).facts["model"]
