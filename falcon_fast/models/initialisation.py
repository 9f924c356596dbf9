"""The initial weights of a ResNet as torchvision draws them, which is how the published recipes start.

timm and torchvision build the same ResNets with the same names, and both draw the convolutions from a normal distribution with
the deviation of He et al. 2015 (fan-out, ReLU). They differ in the last BatchNorm of each block: its scale is 0 in timm, so that
a block starts as its shortcut, and 1 in torchvision. The published code takes torchvision's network and puts in a 3x3 stem, whose
weights have the default of `torch.nn.Conv2d`: uniform in ±1/sqrt(27), deviation .111 (He's would be .059).
"""

from __future__ import annotations

import torch
from torch import nn

from falcon_fast.errors import UsageError


def initialise_as_torchvision(backbone: nn.Module, name: str) -> None:
    """Give a ResNet of timm, which may have a CIFAR stem, the initial weights of torchvision's ResNet of that name.

    The weights come from torch's default generator in the order of the published code (the whole network with its classifier,
    then the stem), so that the same seed gives the same numbers.

    Raises:
        UsageError: torchvision has no ResNet of this name, or timm's has other layers.
    """
    import torchvision

    build = getattr(torchvision.models, name, None) if "resnet" in name or "resnext" in name else None
    theirs = build(weights=None) if callable(build) else None
    mine = backbone.state_dict()
    weights = {} if theirs is None else {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    if weights.keys() != mine.keys():
        raise UsageError(
            f"model.initialisation=torchvision is for the ResNets of torchvision (resnet18, resnet50), not for {name!r}: use "
            "model.initialisation=timm"
        )
    stem = backbone.conv1
    assert isinstance(stem, nn.Conv2d)
    if weights["conv1.weight"].shape != stem.weight.shape:
        weights["conv1.weight"] = nn.Conv2d(stem.in_channels, stem.out_channels, 3, bias=False).weight.detach()
    with torch.no_grad():
        backbone.load_state_dict(weights)
