"""Backbones and the network: against torchvision's parameters, hand counts, a functional forward and He's deviations."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from falcon_fast.config import Config, ModelConfig, load_recipe, override
from falcon_fast.errors import UsageError
from falcon_fast.models import network as module
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import (
    FalconNetwork,
    ResNet8,
    blocks_of,
    build_backbone,
    build_codes,
    build_criterion,
    build_network,
)
from falcon_fast.objective import HadamardCodes, RademacherCodes, falcon_loss


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def output_sizes(model: nn.Module, names: list[str], image_size: int) -> list[tuple[int, ...]]:
    """(channels, height, width) of what each named module gives for one image."""
    sizes: dict[str, tuple[int, ...]] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
        for name in names
    ]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    for hook in hooks:
        hook.remove()
    return [sizes[name] for name in names]


# ---- ResNet-8 ----


@pytest.mark.parametrize("width", [1, 8, 32])
def test_resnet8_has_the_parameters_of_the_paper(width: int) -> None:
    w = width
    stem = 27 * w + 2 * w
    first = 2 * 9 * w * w + 2 * 2 * w
    second = 9 * w * 2 * w + 9 * 4 * w * w + 2 * 2 * 2 * w + (w * 2 * w + 2 * 2 * w)
    third = 9 * 2 * w * 4 * w + 9 * 16 * w * w + 2 * 2 * 4 * w + (2 * w * 4 * w + 2 * 4 * w)
    model = build_backbone(ModelConfig("resnet8", width=w), 32)
    assert count(model) == stem + first + second + third
    assert model.num_features == 4 * w
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4 * w)


def test_resnet8_halves_the_image_twice() -> None:
    names = ["stem", "stages.0", "stages.1", "stages.2"]
    sizes = output_sizes(ResNet8(4), names, 32)
    assert sizes == [(4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert output_sizes(ResNet8(4), names, 17)[3] == (16, 5, 5)
    assert output_sizes(ResNet8(4), names, 1)[3] == (16, 1, 1)


# In a process of its own: the fault that is avoided ends the process.
NARROW = """
import copy, torch
from falcon_fast.models.network import ResNet8
torch.manual_seed(0)
network, images = ResNet8(8).to(memory_format=torch.channels_last), torch.randn(16, 3, 64, 64)
exact = copy.deepcopy(network).double()
for block in exact.stages:
    block.every = 1
    if len(list(block.shortcut.children())):
        block.shortcut[0].stride = block.conv1.stride
exact.to(memory_format=torch.contiguous_format)(images.double()).square().sum().backward()
network(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
pairs = zip(network.parameters(), exact.parameters())
print(max(float((mine.grad - right.grad).norm() / right.grad.norm()) for mine, right in pairs))
"""


def test_narrow_networks_have_the_gradient_of_a_strided_shortcut() -> None:
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.02  # rounding flips ReLUs: .004; the fault: .08 to .2


def test_resnet8_is_a_residual_network() -> None:
    model = ResNet8(4).eval()
    for name, buffer in model.named_buffers():  # away from the identity, so that a BatchNorm left out shows
        if "running" in name:
            buffer.uniform_(-0.2, 0.2).add_(name.endswith("var"))
    s = model.state_dict()

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return F.batch_norm(x, s[f"{key}.running_mean"], s[f"{key}.running_var"], s[f"{key}.weight"], s[f"{key}.bias"])

    x = images = torch.randn(3, 3, 12, 12)
    x = norm(F.conv2d(x, s["stem.0.weight"], padding=1), "stem.1").relu()
    for k, stride in enumerate((1, 2, 2)):
        b = f"stages.{k}"
        y = norm(F.conv2d(x, s[f"{b}.conv1.weight"], stride=stride, padding=1), f"{b}.bn1").relu()
        y = norm(F.conv2d(y, s[f"{b}.conv2.weight"], padding=1), f"{b}.bn2")
        if k:
            x = norm(F.conv2d(x, s[f"{b}.shortcut.0.weight"], stride=stride), f"{b}.shortcut.1")
        x = (x + y).relu()
    features = F.adaptive_avg_pool2d(x, 1).flatten(1)
    assert (features > 0.01).float().mean() > 0.5  # or the last ReLU would hide whatever comes before it
    torch.testing.assert_close(model(images), features)


@pytest.mark.parametrize("stem", ["imagenet", "cifar-padded"])
def test_resnet8_refuses_a_stem_it_has_not(stem: str) -> None:
    build_backbone(ModelConfig("resnet8", 4, "cifar"), 32)
    with pytest.raises(UsageError, match=f"model.stem={stem}"):
        build_backbone(ModelConfig("resnet8", 4, stem), 32)


# ---- timm's ResNets ----


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_are_torchvisions_but_for_the_stem(name: str, features: int) -> None:
    import torchvision

    theirs = getattr(torchvision.models, name)()
    without_head = count(theirs) - count(theirs.fc)
    imagenet = build_backbone(ModelConfig(name, stem="imagenet"), 32)
    cifar = build_backbone(ModelConfig(name, stem="cifar"), 32)
    assert count(imagenet) == without_head
    assert count(cifar) == without_head - 64 * 3 * 49 + 64 * 3 * 9
    assert imagenet.num_features == cifar.num_features == features
    assert cifar.training and imagenet.training


@pytest.mark.parametrize(
    ("stem", "size", "conv1", "into_layer1", "last"),
    [
        ("cifar", 32, 32, 32, 4),
        ("cifar-padded", 32, 34, 34, 5),
        ("imagenet", 32, 16, 8, 1),
        ("imagenet", 96, 48, 24, 3),
        ("cifar", 96, 96, 96, 12),
        ("auto", 64, 64, 64, 8),
        ("auto", 65, 33, 17, 3),
    ],
)
def test_stems_by_their_sizes(stem: str, size: int, conv1: int, into_layer1: int, last: int) -> None:
    model = build_backbone(ModelConfig("resnet18", stem=stem), size)
    sizes = output_sizes(model, ["conv1", "maxpool", "layer4"], size)
    assert sizes == [(64, conv1, conv1), (64, into_layer1, into_layer1), (512, last, last)]
    has_pool = any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    assert has_pool == (into_layer1 < conv1)


def test_resnet50_takes_the_cifar_stem_too() -> None:
    model = build_backbone(ModelConfig("resnet50"), 32)
    assert output_sizes(model, ["conv1", "maxpool", "layer1", "layer4"], 32) == [
        (64, 32, 32),
        (64, 32, 32),
        (256, 32, 32),
        (2048, 4, 4),
    ]
    assert model.conv1.kernel_size == (3, 3) and model.conv1.bias is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "config", [ModelConfig("resnet8", width=32), ModelConfig("resnet18"), ModelConfig("resnet18", stem="imagenet")]
)
def test_convolutions_start_as_he_has_them(config: ModelConfig) -> None:
    torch.manual_seed(3)
    convolutions = [m for m in build_backbone(config, 32).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) in (9, 20)
    for conv in convolutions:
        weight = conv.weight.detach()
        expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]))
        n = weight.numel()
        assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * n)
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(n)
        # Normal, not uniform: the fourth moment is 3 (1.8 for a uniform one), its deviation sqrt(96 / n).
        assert abs((weight**4).mean().item() / expected**4 - 3) < 0.3 + 5 * math.sqrt(96 / n)


# ---- other timm models ----


@pytest.mark.parametrize(("size", "tokens"), [(32, 4), (224, 196)])
def test_vit_takes_the_size_of_the_images(size: int, tokens: int) -> None:
    model = build_backbone(ModelConfig("vit_small_patch16_224"), size)
    assert model.num_features == 384
    assert model.pos_embed.shape == (1, tokens + 1, 384)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 384)


def test_a_model_with_batchnorm_and_activation_in_one() -> None:
    from timm.layers import BatchNormAct2d

    model = build_backbone(ModelConfig("mobilenetv3_small_050"), 32)
    assert any(isinstance(m, BatchNormAct2d) for m in model.modules())
    features = model.num_features
    assert isinstance(features, int)
    images = torch.randn(8, 3, 32, 32)
    views = images.chunk(2)
    apart = torch.cat([model(view) for view in views])
    together = per_view_batchnorm(model)(images)
    assert together.shape == (8, features)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet8"),
        ("resnet_18", "resnet18"),
        ("vit_small_patch16_244", "vit_small_patch16_224"),
        ("resnet18.a1_in1k", "resnet18"),  # the name of weights, which would not be loaded
        ("resnet18.none", "resnet18"),
    ],
)
def test_an_unknown_backbone_gives_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_backbone(ModelConfig(name), 32)
    assert str(caught.value) == f"unknown backbone {name!r}: did you mean {near!r}?"


@pytest.mark.parametrize("name", ["", "zzzzqqq", "hf-hub:timm/resnet18", "/etc/passwd"])
def test_a_name_far_from_all_gives_some_name(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown backbone .* did you mean '"):
        build_backbone(ModelConfig(name), 32)


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (ModelConfig("vit_small_patch16_224"), 40, ["vit_small_patch16_224", "40 px", "data.size=32"]),
        (ModelConfig("vit_small_patch16_224"), 8, ["data.size=16"]),
        (ModelConfig("inception_v3"), 32, ["inception_v3", "32 px", "data.size"]),
        (ModelConfig("vit_small_patch16_224", stem="cifar"), 32, ["model.stem=cifar", "auto"]),
        (ModelConfig("resnet50d", stem="cifar-padded"), 32, ["model.stem=cifar-padded", "auto"]),
        (ModelConfig("mobilenetv3_small_050", stem="cifar"), 32, ["model.stem=cifar", "auto"]),
    ],
)
def test_a_backbone_that_cannot_take_the_images(config: ModelConfig, size: int, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build_backbone(config, size)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


class Odd(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return x if self.output == "map" else (x.mean((2, 3)), x.mean((2, 3)))


@pytest.mark.parametrize("output", ["map", "pair"])
def test_a_backbone_without_one_vector_an_image(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_a, **_k: Odd(output))
    with pytest.raises(UsageError, match="not one vector per image"):
        build_backbone(ModelConfig("resnet18", stem="imagenet"), 8)


# ---- the network ----

SMALL = {"model.width": 4, "loss.num_codes": 64, "loss.embedding_dim": 16}


def small(seed: int, **values: object) -> Config:
    return override(load_recipe("digits"), SMALL | {"training.seed": seed} | values)


def test_the_network_is_backbone_then_projector() -> None:
    network = build_network(small(0), 16)
    assert isinstance(network, FalconNetwork) and network.training
    features, embeddings = network(torch.randn(6, 3, 16, 16))
    assert features.shape == (6, 16) and embeddings.shape == (6, 16) and embeddings.dtype == torch.float32
    network.eval()
    images = torch.randn(6, 3, 16, 16)
    features, embeddings = network(images)
    torch.testing.assert_close(features, network.backbone(images))
    torch.testing.assert_close(embeddings, network.projector(network.backbone(images)))


def test_the_projector_follows_the_configuration() -> None:
    network = build_network(small(0, **{"loss.activation": "l2", "loss.temperature_batch": 4}), 16)
    _, embeddings = network(torch.randn(6, 3, 16, 16))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.full((6,), math.sqrt(16 / 4)))


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "vit_tiny_patch16_224"])
def test_the_initial_weights_come_from_the_seed_alone(name: str) -> None:
    config = small(5, **{"model.name": name})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_network(config, 32).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_network(config, 32).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

    other = build_network(small(6, **{"model.name": name}), 32).state_dict()
    drawn = [k for k in first if first[k].is_floating_point() and first[k].unique().numel() > 1]
    assert len(drawn) > 5 and all(not torch.equal(first[k], other[k]) for k in drawn)


def test_building_a_network_does_not_reseed_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    assert seeded == [0]  # that is where torch would do it
    build_network(small(5), 16)
    assert seeded == [0]


def test_the_dictionary_is_the_one_configured() -> None:
    codes = build_codes(small(7))
    assert isinstance(codes, RademacherCodes) and (codes.f, codes.c) == (16, 64)
    assert torch.equal(codes.words, RademacherCodes(16, 64, seed=7).words)
    assert not torch.equal(codes.words, build_codes(small(8)).words)
    hadamard = build_codes(small(7, **{"loss.codes": "hadamard"}))
    assert isinstance(hadamard, HadamardCodes)
    w = hadamard.dense(torch.float64).numpy()
    assert np.array_equal(w @ w.T, 64 * np.eye(16))


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_the_criterion_is_the_loss_configured(prior: str) -> None:
    config = small(7, **{"loss.beta": 0.7, "loss.prior": prior, "loss.temperature_batch": 5})
    codes = build_codes(config)
    h1, h2 = torch.randn(2, 12, 16).tanh()
    ours = build_criterion(config, codes)(h1, h2)
    theirs = falcon_loss(h1, h2, codes, config.tau, beta=0.7, prior=prior, implementation="reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain = falcon_loss(h1, h2, codes, 2 * config.tau, beta=0.7, prior=prior, implementation="reference")
    assert (ours.loss - plain.loss).abs() > 0.01  # the temperature shows


def test_the_criterion_gets_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        module, "FalconLoss", lambda codes, tau, **settings: seen.update(settings, codes=codes, tau=tau)
    )
    config = small(
        7,
        **{
            "loss.beta": 0.7,
            "loss.prior": "forward",
            "loss.implementation": "reference",
            "loss.plan": "streaming",
            "loss.memory_budget": 3,
        },
    )
    codes, group = build_codes(config), object()
    build_criterion(config, codes, group)  # type: ignore[arg-type]
    assert seen == {
        "codes": codes,
        "tau": config.tau,
        "beta": 0.7,
        "prior": "forward",
        "group": group,
        "implementation": "reference",
        "plan": "streaming",
        "memory_budget": 3 * 2**20,
    }
    build_criterion(small(7), codes)
    assert seen["memory_budget"] is None and seen["group"] is None


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("resnet8", 3, "BasicBlock"), ("resnet18", 8, "BasicBlock"), ("vit_tiny_patch16_224", 12, "Block")],
)
def test_the_blocks_of_a_backbone_are_those_it_repeats(name: str, count: int, kind: str) -> None:
    blocks = blocks_of(build_backbone(ModelConfig(name, 4), 32))
    assert [type(block).__name__ for block in blocks] == [kind] * count
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []  # of one layer each
