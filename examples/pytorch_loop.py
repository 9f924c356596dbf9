"""The FALCON loss in a plain PyTorch training loop: dictionary, temperature, projector and loss; the rest is ordinary PyTorch.

    python examples/pytorch_loop.py --steps 400

Trains on the 1,797 digit images of scikit-learn, then prints the kNN accuracy before and after and the four collapse checks.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from falcon_fast import FalconLoss, FalconProjector, RademacherCodes, temperature
from falcon_fast.evaluation.collapse import collapse_checks
from falcon_fast.evaluation.knn import weighted_knn
from falcon_fast.models.batchnorm import per_view_batchnorm

WIDTH, CODES, TEMPERATURE_BATCH = 256, 1024, 8  # f, c and the n of the temperature, which is not the batch size
TRAIN = 1437  # images; the last 360 are for testing


def digit_images() -> tuple[torch.Tensor, np.ndarray]:
    """All digits: float32 (1797, 1, 16, 16) in [0, 1], and their labels (1797,)."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    return F.interpolate(small, size=(16, 16), mode="bilinear"), digits.target


def random_view(images: torch.Tensor) -> torch.Tensor:
    """One random view of each image: rotated by up to 15 degrees, scaled, shifted, and changed in brightness."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(15)
    scale = 1 / (0.7 + 0.4 * torch.rand(n))
    shift = (torch.rand(n, 2) * 2 - 1) * 0.4
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2) * scale.view(n, 1, 1)
    theta = torch.cat([rotation, shift[:, :, None]], 2)
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    return moved * (0.7 + 0.6 * torch.rand(n, 1, 1, 1))


class Network(nn.Module):
    """Any backbone, followed by FALCON's projector: images to features (N, 128) and embeddings (N, f)."""

    def __init__(self) -> None:
        super().__init__()

        def stage(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        layers = [*stage(1, 32, 1), *stage(32, 64, 2), *stage(64, 128, 2)]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = FalconProjector(128, WIDTH)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(images)
        return features, self.projector(features)


def build(group: torch.distributed.ProcessGroup | None = None) -> tuple[Network, FalconLoss]:
    """The network, whose BatchNorm layers keep the two views of a batch apart, and the loss, over `group` if one is given."""
    network = per_view_batchnorm(Network())
    assert isinstance(network, Network)
    tau = temperature(WIDTH, CODES, TEMPERATURE_BATCH)
    return network, FalconLoss(RademacherCodes(WIDTH, CODES, seed=0), tau, group=group)


@torch.inference_mode()
def judge(network: Network, criterion: FalconLoss) -> str:
    """kNN accuracy and collapse checks on the test images, in evaluation mode."""
    images, labels = digit_images()
    network.eval()
    features, embeddings = (x.numpy() for x in network(images))
    network.train()
    codes = (torch.from_numpy(embeddings[TRAIN:]) @ criterion.codes.dense()).argmax(1).numpy()
    accuracy = weighted_knn(features[:TRAIN], labels[:TRAIN], features[TRAIN:], labels[TRAIN:])
    checks = collapse_checks(embeddings[TRAIN:], features[TRAIN:], codes, num_classes=10)
    verdicts = ", ".join(f"{name} {'ok' if check.ok else 'FAILED'}" for name, check in checks.items())
    return f"kNN {accuracy:.3f}; {len(set(codes.tolist()))} codes in use; {verdicts}"


def main() -> None:
    """Train and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images = digit_images()[0][:TRAIN]
    network, criterion = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    print(f"random weights: {judge(network, criterion)}")
    for step in range(1, arguments.steps + 1):
        batch = images[torch.randint(len(images), (arguments.batch_size,))]
        _, embeddings = network(torch.cat([random_view(batch), random_view(batch)]))  # view 1, then view 2
        h1, h2 = embeddings.chunk(2)
        loss, prior, invariance, codes_used = criterion(h1, h2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == arguments.steps:
            print(f"step {step}: loss {loss:.3f} (prior {prior:.3f}, invariance {invariance:.3f}), {codes_used} codes")
    print(f"trained: {judge(network, criterion)}")


if __name__ == "__main__":
    main()
