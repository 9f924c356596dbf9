"""The published way to train: torchvision's transforms on PIL images in DataLoader workers, and a step in plain eager PyTorch.

The recipe is that of `cifar10.toml`: torchvision's ResNet-18 with the published stem in channels_last, tanh projector to f =
2048, c = 16384, Adam, float16 mixed precision with a GradScaler, online probe. The views go through the network one after the
other, and the dictionary is dense float32. It uses nothing of falcon_fast except the numbers of the recipe, and the class that
records a CUDA graph where ours is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from falcon_fast.training.graphed import Graphed

from .rivals import published_loss


class TwoViews(Dataset):
    """Two augmented views of images in memory, uint8 (n, S, S, 3), and their labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, size: int) -> None:
        self.pixels, self.labels = pixels, labels
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        self.views = [
            v2.Compose(
                [
                    v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
                    v2.RandomHorizontalFlip(),
                    jitter,
                    v2.RandomGrayscale(0.2),
                    v2.RandomSolarize(128, solarize),
                    v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize((0.5,) * 3, (0.25,) * 3),
                ]
            )
            for solarize in (0.0, 0.2)
        ]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.pixels[index])
        return self.views[0](image), self.views[1](image), int(self.labels[index])


def loaded(dataset: TwoViews, batch: int, workers: int) -> Iterator[list[torch.Tensor]]:
    """Yield batches without end, shuffled in each epoch, from persistent workers."""
    loader = DataLoader(
        dataset, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=True, persistent_workers=True
    )
    while True:
        yield from loader


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the published stem for small images, as the published code makes it."""
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 2, bias=False)
    network.maxpool = nn.Identity()
    return network


def stepper(
    device: torch.device,
    f: int,
    c: int,
    tau: float,
    lr: float,
    probe_lr: float,
    classes: int,
    autocast: torch.dtype | None,
    graph: bool = False,
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Return a function that takes a step on a batch (view 1, view 2, labels) and returns its loss, on the device.

    Network and views are channels_last, as in the published code.

    Args:
        autocast: dtype of mixed precision; None for float32.
        graph: replay the step as one CUDA graph, as `--cuda-graph` does here: recorded by the same class, after as many ordinary
            steps. The published code has no such mode. The optimiser is then the fused one, because the others ask on the host
            whether the scaled gradients overflowed.
    """
    backbone = resnet18()
    projector = nn.Sequential(nn.Linear(512, f), nn.BatchNorm1d(f), nn.Tanh())
    network = nn.ModuleList([backbone, projector]).to(device=device, memory_format=torch.channels_last)
    probe = nn.Linear(512, classes).to(device)
    codes = torch.randint(0, 2, (f, c), device=device).float() * 2 - 1
    groups = [
        {"params": [*network.parameters()]},
        {"params": [*probe.parameters()], "lr": probe_lr, "weight_decay": 0.0},
    ]
    options = {"fused": True, "capturable": device.type == "cuda"} if graph else {}
    optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=1e-4, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)

    def step(batch: list[torch.Tensor]) -> torch.Tensor:
        x1, x2, labels = batch
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            y1, y2 = backbone(x1), backbone(x2)
            h1, h2 = projector(y1), projector(y2)
            loss = published_loss(h1, h2, codes, tau)
            probed = sum(F.cross_entropy(probe(y.detach()), labels) for y in (y1, y2)) / 2
        scaler.scale(loss + probed).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    taken = Graphed(step, device, lambda: optimizer.zero_grad(set_to_none=True)) if graph else step

    def moved(batch: list[torch.Tensor]) -> torch.Tensor:
        *views, labels = (x.to(device, non_blocking=True) for x in batch)
        return taken([*(view.contiguous(memory_format=torch.channels_last) for view in views), labels])

    moved.modules, moved.codes, moved.optimizer = (network, probe), codes, optimizer  # for tests
    return moved
