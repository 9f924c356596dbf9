"""A trained backbone in one file: weights, and metadata that rebuild the network around them.

`backbone.safetensors` holds the tensors under timm's names, which for ResNets are torchvision's. Its metadata say which network
that is (model, stem, width, image size, initial weights), how images are normalised, and who wrote it. A file may come from a
stranger: every value is checked, and nothing is allocated before the file is known to hold such a network.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import nn

from falcon_fast.config import INITIALISATIONS, STEMS, ModelConfig
from falcon_fast.errors import UsageError
from falcon_fast.models.network import assemble_backbone, build_backbone, resolved_stem
from falcon_fast.reading import one_line

FORMAT = "falcon_fast backbone 1"
LONGEST = 1000  # characters of a value in the metadata
WIDEST, LARGEST_IMAGE = 10_000, 4096  # width of resnet8, side of an image in pixels
SPARE = 2**30  # bytes that a network may take in addition to four times its file: tables that are computed, not stored
HEADS = ("fc.", "head.", "classifier.")  # classifiers of torchvision and timm, which a backbone does not have

# Kernel, stride and padding of a ResNet's first convolution, and whether max-pooling follows.
STEM_LAYERS = {"cifar": (3, 1, 1, False), "cifar-padded": (3, 1, 2, False), "imagenet": (7, 2, 3, True)}


@dataclass(frozen=True)
class BackboneFacts:
    """What the metadata of a file say.

    Attributes:
        model: the network; its stem is never auto.
        image_size: side of the images that it was trained on, in pixels.
        mean, std: of each channel, which normalise images with pixels in [0, 1].
        version: the falcon_fast that wrote the file.
    """

    model: ModelConfig
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    version: str


@dataclass(frozen=True)
class TrainedBackbone:
    """A trained backbone in evaluation mode, with everything that its use depends on; `facts` as its file says.

    Attributes:
        backbone: maps normalised images (N, 3, S, S) to features (N, d).
    """

    backbone: nn.Module
    facts: BackboneFacts
    device: torch.device

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.facts.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.facts.std


def backbone_metadata(
    model: ModelConfig, backbone: nn.Module, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, str]:
    """Return the metadata of a backbone that `build_backbone(model, image_size)` has made."""
    return {
        "format": FORMAT,
        "falcon_fast": packages.version("falcon_fast"),
        "layout": "falcon_fast" if model.name == "resnet8" else "timm",  # whose names the tensors have
        "model": model.name,
        "stem": resolved_stem(backbone, model.stem, image_size),
        "width": str(model.width),
        "initialisation": model.initialisation,
        "image_size": str(image_size),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
    }


def read_backbone_facts(path: str | os.PathLike[str]) -> BackboneFacts:
    """Return what the metadata of `backbone.safetensors` say.

    Raises:
        UsageError: there is no such file, it is not one of falcon_fast, or its metadata are not valid.
    """
    with _opened(Path(path)) as file:
        return _facts(Path(path), file.metadata() or {})


def load_backbone(path: str | os.PathLike[str], device: torch.device) -> TrainedBackbone:
    """Rebuild the backbone of a `backbone.safetensors` from the file alone. The caller's random state is not changed.

    Raises:
        UsageError: as `read_backbone_facts`, or the tensors are not those of the network that the metadata name.
    """
    path = Path(path)
    with _opened(path) as file:
        facts = _facts(path, file.metadata() or {})
        try:
            with torch.device("meta"):  # takes no memory, whatever the metadata say
                outline = build_backbone(facts.model, facts.image_size)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        _check_shapes(path, facts, _shapes(file), {k: tuple(v.shape) for k, v in outline.state_dict().items()})
        needed = sum(tensor.nbytes for tensor in (*outline.parameters(), *outline.buffers()))
        if needed > 4 * path.stat().st_size + SPARE:
            raise UsageError(
                f"{path}: a {facts.model.name} for {facts.image_size} px takes {needed / 2**30:,.1f} GiB, far more than the file"
            )
        with torch.random.fork_rng(devices=[]):
            backbone = assemble_backbone(facts.model, facts.image_size)
        backbone.num_features = outline.num_features
        backbone.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict
    backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainedBackbone(backbone.eval(), facts, device)


def load_weights(path: str | os.PathLike[str], network: nn.Module) -> BackboneFacts:
    """Load a `backbone.safetensors` into a ResNet of torchvision or a network of timm that was built elsewhere.

    Its classifier, if it has one, stays as it is. Returns the facts, which hold the normalisation of its images.

    Raises:
        UsageError: as `read_backbone_facts`, or the network differs. Where only the stem of a ResNet differs, the message has the
            two lines that change it: the shapes alone do not tell `cifar` from `cifar-padded`.
    """
    path = Path(path)
    with _opened(path) as file:
        facts = _facts(path, file.metadata() or {})
        _check_stem(path, facts, network)
        held, theirs = _shapes(file), {k: tuple(v.shape) for k, v in network.state_dict().items()}
        # Some backbones have a layer below the same name (convnext's head.norm), which the file then holds.
        _check_shapes(path, facts, held, {k: v for k, v in theirs.items() if k in held or not k.startswith(HEADS)})
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118
    return facts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UsageError if it is not one."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as safetensors ({one_line(error)}): copy it again") from None


def _facts(path: Path, found: Mapping[str, str]) -> BackboneFacts:
    def wrong(key: str, valid: str) -> UsageError:
        said = "is missing" if key not in found else f"is {found[key][:60]!r}"
        return UsageError(
            f"{path}: {key} in its metadata {said}, not {valid}: load its run directory, or copy the file again"
        )

    def one_of(key: str, valid: tuple[str, ...]) -> str:
        if found.get(key) not in valid:
            raise wrong(key, "one of " + ", ".join(valid))
        return found[key]

    def integer(key: str, most: int) -> int:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", found.get(key, "")) or int(found[key]) > most:
            raise wrong(key, f"an integer from 1 to {most}")
        return int(found[key])

    def channels(key: str, least: float) -> tuple[float, float, float]:
        text = found.get(key, "")
        try:
            values = json.loads(text) if len(text) <= LONGEST else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list) or len(values) != 3 or not all(type(x) in (int, float) for x in values):
            raise wrong(key, "three numbers")
        numbers = [float(x) if abs(x) < 1e6 else math.inf for x in values]
        if not all(least < x < 1e6 for x in numbers):  # of pixels in [0, 1]
            raise wrong(key, f"three numbers above {least:g}")
        return numbers[0], numbers[1], numbers[2]

    if found.get("format") != FORMAT:
        raise wrong("format", repr(FORMAT))
    name = found.get("model", "")
    if not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise wrong("model", "the name of a backbone")
    stems = tuple(stem for stem in STEMS if stem != "auto")
    model = ModelConfig(
        name, integer("width", WIDEST), one_of("stem", stems), one_of("initialisation", INITIALISATIONS)
    )
    size, version = integer("image_size", LARGEST_IMAGE), found.get("falcon_fast", "")[:60]
    return BackboneFacts(model, size, channels("mean", -1e6), channels("std", 0.0), version)


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_shapes(
    path: Path, facts: BackboneFacts, held: Mapping[str, tuple[int, ...]], asked: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise UsageError unless the file holds tensors of just these names and shapes."""
    for name in sorted(held.keys() | asked.keys()):
        if held.get(name) != asked.get(name):
            mine, theirs = (f"of shape {x[name]}" if name in x else "missing" for x in (held, asked))
            name = name[:100] if name.isprintable() else repr(name[:100])
            raise UsageError(
                f"{path} holds a {facts.model.name} for {facts.image_size} px, which does not fit: {name} is {mine} in the "
                f"file and {theirs} in the network"
            )


def _check_stem(path: Path, facts: BackboneFacts, network: nn.Module) -> None:
    """Raise UsageError if the network is a ResNet with another stem than the file's."""
    conv, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or facts.model.name == "resnet8":
        return
    mine = (conv.kernel_size[0], conv.stride[0], conv.padding[0], not isinstance(pool, nn.Identity))
    kernel, stride, padding, pooled = wanted = STEM_LAYERS[facts.model.stem]
    if mine != wanted and mine in STEM_LAYERS.values():
        pooling = "nn.MaxPool2d(3, 2, 1)" if pooled else "nn.Identity()"
        raise UsageError(
            f"{path} has the stem {facts.model.stem} ({kernel}x{kernel} convolution, stride {stride}, padding {padding}, "
            f"{'then' if pooled else 'no'} max-pooling), and this network has another: set network.conv1 = nn.Conv2d(3, "
            f"{conv.out_channels}, {kernel}, {stride}, {padding}, bias=False) and network.maxpool = {pooling}"
        )
