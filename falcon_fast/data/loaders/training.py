"""The batches of a training run, from whichever loader `choose_loader` named."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch

from falcon_fast.data.loaders import resident, synthetic, workers
from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.sources.images import Source
from falcon_fast.data.views.sampling import Clock


def training_inputs(
    loader: str,
    source: Source,
    clock: Clock,
    steps: range,
    device: torch.device,
    workers_count: int = -1,
    rank: int = 0,
    world_size: int = 1,
    quarantine: Quarantine | None = None,
) -> tuple[Generator[Any], Callable[[Any], Batch]]:
    """Return the inputs of `steps`, in order, and a function `batch_of` that turns one input into a `Batch` on `device`.

    What an input is depends on the loader. Only the resident loader yields something unfinished: `ViewInstructions`, from which
    `batch_of` cuts the views out of the resident images. That part runs on the device alone, so a CUDA graph can hold it. The
    inputs of the other three loaders (`dali`, `workers`, `synthetic`) are finished batches already, and their `batch_of`
    returns its argument. The field `step` of every input is the number of its step.

    Args:
        loader: `dali`, `resident`, `workers` or `synthetic`, as `choose_loader` returned it.
        source: the data set; the training split is shown, in views of `source.size` pixels a side.
        clock: decides which image, which crop and which jitter each step sees.
        workers_count: worker processes of the `workers` loader; -1 for the number that suits the machine.
        rank, world_size: select this process's share of the global batch.
        quarantine: the bad images known so far; images that turn out bad are added to it.

    Raises:
        UsageError: more images are bad than the quarantine allows.
    """
    common = (source.train, clock, source.size, steps, device)
    if loader == "resident":
        return resident.training_inputs(*common, rank, world_size, quarantine)
    if loader == "synthetic":
        batches = synthetic.training_batches(*common, rank, world_size)
    elif loader == "workers":
        batches = workers.training_batches(*common, workers_count, rank, world_size, quarantine)
    else:
        from falcon_fast.data.loaders import dali

        batches = dali.training_batches(*common, rank, world_size, quarantine)
    return batches, lambda batch: batch


def training_batches(*arguments: Any, **options: Any) -> Generator[Batch]:
    """Yield finished batches: the inputs of `training_inputs`, which takes the same arguments, turned into batches."""
    inputs, batch_of = training_inputs(*arguments, **options)
    with closing(inputs):
        for each in inputs:
            yield batch_of(each)
