"""What a step is fed with: a run's batches, its photometric stage, and the images that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_inputs
from falcon_fast.data.views.photometric_stage import Photometric, photometric_stage
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import Run


def photometric_of(run: Run, say: Callable[[str], None]) -> Photometric:
    """The run's photometric stage."""
    dtype = run.amp_dtype or torch.float32
    return photometric_stage(run.augmentation, run.config.data.photometric, say, run.device, dtype)


class Feed(NamedTuple):
    """What the steps of a run are fed with.

    inputs: one a step, in order, each with its number in `step`.
    views_of: of an input the normalised views (2 B, 3, S, S) and the labels (B,), or None, of this process's share. On the device
        alone: a CUDA graph can hold it.
    """

    inputs: Generator[Any]
    views_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]]


def feed_of(run: Run, steps: range, quarantine: Quarantine, photometric: Photometric) -> Feed:
    """The run's loader and photometric stage for `steps`."""
    rank, world_size = run.processes.rank, run.processes.world_size
    inputs, batch_of = training_inputs(
        run.loader, run.source, run.clock, steps, run.device, run.workers, rank, world_size, quarantine
    )
    mean, std = run.source.normalization(run.device)

    def views_of(given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch = batch_of(given)
        return photometric(batch.views, batch.parameters, mean, std), batch.labels

    return Feed(inputs, views_of)


def quarantine_of(run: Run, say: Callable[[str], None], path: Path | None = None) -> Quarantine:
    """The bad images known when training begins, the same in every process; listed at `path` by process 0."""
    images, limit = run.source.train.images, run.config.data.max_bad_fraction
    known, left_out, processes = dict(run.source.known_bad), run.source.left_out, run.processes
    quarantine: Quarantine | None = None
    with processes.together():
        if processes.main:
            quarantine = Quarantine(images, limit, path, known=known, left_out=left_out, say=say)
    listed = processes.from_main({} if quarantine is None else quarantine.bad)
    return quarantine or Quarantine(images, limit, known=listed, left_out=left_out, say=say)


def share_bad(quarantine: Quarantine, processes: Processes) -> None:
    """What each process found bad becomes known to all. Raises UsageError in all, where that is too much."""
    with processes.together():
        for bad in processes.everyone(dict(quarantine.bad)):
            for index, reason in bad.items():
                quarantine.add(index, reason)
