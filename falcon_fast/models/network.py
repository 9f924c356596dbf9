"""Backbones by name, and the network that FALCON trains: backbone, then projector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from falcon_fast.config import Config, ModelConfig, nearest, shown
from falcon_fast.errors import UsageError
from falcon_fast.models.initialisation import initialise_as_torchvision
from falcon_fast.objective import FalconLoss, FalconProjector, HadamardCodes, RademacherCodes
from falcon_fast.objective.codes import Codes

# Bytes of packed codes, which take three times as much while they are drawn. The largest dictionary that was measured, 524,288
# codes of 2,048 entries, has 2**27.
LARGEST_DICTIONARY = 2**30
# In pixels. For larger images, a stem that reduces both sides to a quarter loses little detail and saves 16 times the work.
CIFAR_STEM_UP_TO = 64


# oneDNN's backward pass of a strided 1x1 convolution in channels_last, as torch 2.14 calls it, overruns memory below this number
# of input channels: segmentation faults, or gradients that are wrong by 8 to 20 %.
NARROWEST_STRIDED = 16


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); the shortcut is a 1x1 convolution if the shape changes.

    Narrow strided shortcuts take every `stride`-th pixel first and then convolve without a stride, which is the same function and
    avoids a fault (`NARROWEST_STRIDED`). Wider ones do not: slicing takes 1.2 to 2 times as long.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.every = stride if in_channels < NARROWEST_STRIDED else 1
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride // self.every, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        seen = x[:, :, :: self.every, :: self.every] if self.every > 1 else x
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(seen))


class ResNet8(nn.Module):
    """The CIFAR backbone of the first paper.

    It has a 3x3 stem and three stages of one basic block each, with `width`, 2 `width` and 4 `width` channels.

    Takes images (N, 3, H, W) and returns the pooled features (N, 4 width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 4 * width, 2)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stages(self.stem(x))
        return features.mean((2, 3))


def build_backbone(config: ModelConfig, image_size: int) -> nn.Module:
    """Return a randomly initialised backbone that maps (N, 3, S, S) to features (N, d); its `num_features` is d.

    Raises:
        UsageError: the name is neither `resnet8` nor a model of timm (the message gives the most similar name), or the backbone
            does not accept images of this size.
    """
    with _size_fits(config, image_size):
        backbone = assemble_backbone(config, image_size)
        if config.name == "resnet8":
            return backbone
        backbone.eval()
        with torch.inference_mode():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    if not isinstance(features, torch.Tensor) or features.dim() != 2:
        what = f"of shape {tuple(features.shape)}" if isinstance(features, torch.Tensor) else "in several parts"
        raise UsageError(f"backbone {config.name!r} gives features {what}, not one vector per image: choose another")
    backbone.num_features = features.shape[1]  # type: ignore[assignment]
    return backbone.train()


@contextmanager
def _size_fits(config: ModelConfig, image_size: int) -> Iterator[None]:
    """Turn what a library raises while it builds or runs a backbone into a UsageError about the image size."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"backbone {config.name!r} does not take {image_size} px images ({reason}): try another data.size"
        ) from None


def assemble_backbone(config: ModelConfig, image_size: int) -> nn.Module:
    """Return what `build_backbone` returns, without the check that images of this size go through it, and so without knowing d.

    Raises:
        UsageError: the name or the stem does not fit, or the image is no multiple of the patch size.
    """
    if config.name == "resnet8":
        if config.stem not in ("auto", "cifar"):
            raise UsageError(f"model.stem={config.stem} is for ResNets with a plain 7x7 stem: use auto with resnet8")
        if config.initialisation != "timm":
            raise UsageError("model.initialisation=torchvision is for ResNets of torchvision: use timm with resnet8")
        return ResNet8(config.width)
    import timm

    # A tag after a dot names pretrained weights, which are not loaded.
    if not timm.is_model(config.name) or "." in config.name:
        raise UsageError(
            f"unknown backbone {shown(config.name)}: {nearest(config.name, ['resnet8', *timm.list_models()])}"
        )
    random_state = torch.get_rng_state()
    try:
        backbone = timm.create_model(config.name, num_classes=0, img_size=image_size)
    except TypeError:  # convolutional models accept images of any size and have no argument img_size
        backbone = timm.create_model(config.name, num_classes=0)
    _check_patches(backbone, config.name, image_size)
    _set_stem(backbone, config.stem, image_size)
    if config.initialisation == "torchvision":
        torch.set_rng_state(random_state)  # as if timm had drawn nothing
        initialise_as_torchvision(backbone, config.name)
    return backbone


def _check_patches(backbone: nn.Module, name: str, image_size: int) -> None:
    """Raise UsageError if the image's side is not a multiple of the patch size.

    timm only uses whole patches and silently ignores the rest of an image at its right and lower edge.
    """
    patch_size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    patch = patch_size[0] if isinstance(patch_size, tuple) else 1
    if image_size % patch:
        fitting = max(patch, image_size - image_size % patch)
        raise UsageError(
            f"backbone {name!r} cuts the image into {patch} px patches, but {image_size} px is not a multiple of {patch}: "
            f"set data.size={fitting}"
        )


def _has_plain_stem(backbone: nn.Module) -> bool:
    return isinstance(getattr(backbone, "conv1", None), nn.Conv2d) and hasattr(backbone, "maxpool")


def resolved_stem(backbone: nn.Module, stem: str, image_size: int) -> str:
    """Return what `model.stem` is for this backbone and image size, never auto; `imagenet` stands for timm's own stem."""
    if stem != "auto":
        return stem
    if isinstance(backbone, ResNet8):
        return "cifar"
    return "cifar" if _has_plain_stem(backbone) and image_size <= CIFAR_STEM_UP_TO else "imagenet"


def _set_stem(backbone: nn.Module, stem: str, image_size: int) -> None:
    """Replace a ResNet's 7x7 stride-2 stem and max-pool, which would reduce a 32 px image to one pixel in the last stage."""
    stem = resolved_stem(backbone, stem, image_size)
    if stem == "imagenet":
        return
    if not _has_plain_stem(backbone):
        raise UsageError(f"model.stem={stem} is for ResNets with a plain 7x7 stem: use auto")
    assert isinstance(backbone.conv1, nn.Conv2d)
    padding = 2 if stem == "cifar-padded" else 1
    conv = nn.Conv2d(3, backbone.conv1.out_channels, 3, 1, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1 = conv
    backbone.maxpool = nn.Identity()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that a backbone repeats, in order. They are compiled, or gathered from their shards, one at a time.

    A group of blocks is two or more modules of one type in a row, each with several layers: the stages of ResNet-8, the residual
    blocks of timm's ResNets, the blocks of its ViTs. Blocks inside blocks do not count.
    """
    children = list(module.children())
    alike = isinstance(module, nn.Sequential | nn.ModuleList) and len({type(child) for child in children}) == 1
    if alike and len(children) > 1 and any(True for _ in children[0].children()):
        return children
    return [block for child in children for block in blocks_of(child)]


class FalconNetwork(nn.Module):
    """Backbone and projector: maps images (N, 3, S, S) to features (N, d) and float32 embeddings (N, f)."""

    def __init__(self, backbone: nn.Module, projector: FalconProjector) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(images)
        return features, self.projector(features)


def build_network(config: Config, image_size: int) -> FalconNetwork:
    """Return a run's network with its initial weights, which depend on `training.seed` alone.

    The caller's random state is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.training.seed)  # torch.manual_seed would reseed the GPUs too
        backbone = build_backbone(config.model, image_size)
        loss = config.loss
        projector = FalconProjector(backbone.num_features, loss.embedding_dim, loss.activation, loss.temperature_batch)  # type: ignore[arg-type]
    return FalconNetwork(backbone, projector)


def build_codes(config: Config) -> Codes:
    """Return the run's dictionary, from `training.seed`. Raises UsageError if it is larger than LARGEST_DICTIONARY."""
    f, c = config.loss.embedding_dim, config.loss.num_codes
    rows = c if config.loss.codes == "rademacher" else c // f
    if (size := 4 * rows * -(-f // 32)) > LARGEST_DICTIONARY:
        raise UsageError(
            f"{c} {config.loss.codes} codes of {f} entries take {size / 2**30:,.1f} GiB, but at most "
            f"{LARGEST_DICTIONARY / 2**30:.0f} GiB are supported: reduce loss.num_codes or loss.embedding_dim"
        )
    kind = RademacherCodes if config.loss.codes == "rademacher" else HadamardCodes
    return kind(config.loss.embedding_dim, config.loss.num_codes, config.training.seed)


def build_criterion(config: Config, codes: Codes, group: dist.ProcessGroup | None = None) -> FalconLoss:
    """Return the run's loss over `codes`. The prior is taken over the processes of `group`, if one is given."""
    loss = config.loss
    return FalconLoss(
        codes,
        config.tau,
        beta=loss.beta,
        prior=loss.prior,
        group=group,
        implementation=loss.implementation,
        plan=loss.plan,
        memory_budget=loss.memory_budget * 2**20 or None,
    )
