"""Random pixels that are on the device already: the speed that a run would have if its loader cost nothing.

Compare a run with `--loader synthetic` and the same run with its own loader to see whether the loader is the bottleneck. The
synthetic run learns nothing.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from falcon_fast.data.loaders.batch import Batch, labels_of
from falcon_fast.data.sources.images import Split
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import Clock


def training_batches(
    split: Split,
    clock: Clock,
    size: int,
    steps: range,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """Yield the batches of `steps`: the same random pixels each time, with the clock's photometric parameters and labels.

    The arguments are those of `workers.training_batches`.
    """
    share = clock.batch_size // world_size
    generator = torch.Generator().manual_seed((clock.seed + rank) % 2**63)
    pixels = torch.randint(0, 256, (2 * share, size, size, 3), dtype=torch.uint8, generator=generator)
    views = pixels.to(device).permute(0, 3, 1, 2)
    for step in steps:
        plan = clock.at(step, rank, world_size)
        labels = labels_of(split.labels, plan.indices, device)
        yield Batch(step, views, to_tensors(plan.photometric, device), labels)
