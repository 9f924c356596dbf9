"""What a checkpoint holds in these tests: a small network, a probe and their optimiser."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from falcon_fast.config import OptimizerConfig
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.saver import Saver
from falcon_fast.training.optimizer import build_optimizer


def trained(name: str = "adamw", steps: int = 3):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    probe = nn.Linear(5, 2)
    optimizer = build_optimizer(OptimizerConfig(name=name), network, probe, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        probe(network(torch.randn(6, 3, 4, 4))).square().mean().backward()
        optimizer.step()
    return network, probe, optimizer


def save(tmp_path: Path, parts, step: int = 3, keep: int = 2, asynchronous: bool = False) -> Path:
    with Saver(tmp_path / "checkpoints", keep, asynchronous) as writer:
        writer.save(step, checkpoint.collect(*parts), {"seconds": 1.5})
    return tmp_path / "checkpoints" / f"step-{step:08d}"
