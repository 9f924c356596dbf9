"""The inputs of a run's steps: its batches, its photometric stage, and the images that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_inputs
from falcon_fast.data.sources.listing import NAME as LISTING
from falcon_fast.data.sources.listing import write_listing
from falcon_fast.data.sources.opening import root_of
from falcon_fast.data.views.photometric_stage import Photometric, photometric_stage
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import Run


def photometric_of(run: Run, say: Callable[[str], None]) -> Photometric:
    """Return the run's photometric stage; `say` is told what is slower than it could be."""
    dtype = run.amp_dtype or torch.float32
    return photometric_stage(run.augmentation, run.config.data.photometric, say, run.device, dtype)


class Feed(NamedTuple):
    """The inputs of a run's steps.

    Attributes:
        inputs: what the loader yields, one for each step and in order. Each has the number of its step, from 0, in `step`.
            Resident
            images: the random choices of the batch, a PlannedBatch; other loaders: the batch of uint8 views, a Batch.
        views_of: makes of one of `inputs` this process's share of the normalised views (2 B, 3, S, S) and of the labels (B,), or
            None. It works on the device alone, so that a CUDA graph can hold it.
    """

    inputs: Generator[Any]
    views_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]]


def feed_of(run: Run, steps: range, quarantine: Quarantine, photometric: Photometric) -> Feed:
    """Return what the run's loader and the photometric stage make for `steps` (numbered from 0)."""
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
    """Return the unreadable images that are known when training begins, the same in every process.

    path: where process 0 lists them; it also writes the list of all images to the same folder.
    """
    images, limit = run.source.train.images, run.config.data.max_bad_fraction
    known, processes = dict(run.source.known_bad), run.processes
    quarantine: Quarantine | None = None
    with processes.together():
        if processes.main:
            if path is not None:
                write_listing(path.with_name(LISTING), run.source, root_of(run.config.data))
            quarantine = Quarantine(images, limit, path, known=known, say=say)
    listed = processes.from_main({} if quarantine is None else quarantine.bad)
    return quarantine or Quarantine(images, limit, known=listed, say=say)


def share_bad(quarantine: Quarantine, processes: Processes) -> None:
    """Tell every process which images each of them found unreadable, and which files have changed.

    Raises:
        UsageError: in all processes, where together they are more than `data.max_bad_fraction` allows.
    """
    with processes.together():
        for bad, changed in processes.everyone((dict(quarantine.bad), dict(quarantine.changes.seen))):
            quarantine.changes.add(changed)
            for index, reason in bad.items():
                quarantine.add(index, reason)
