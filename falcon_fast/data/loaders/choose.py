"""The one door to the loaders: which of them a run uses, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from falcon_fast.data.loaders import resident, synthetic, workers
from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.sources.images import ImageFiles, Source
from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError
from falcon_fast.kernels import cpu_extension

if TYPE_CHECKING:
    from falcon_fast.config import DataConfig


def choose_loader(
    config: DataConfig, source: Source, augmentation: Augmentation, device: torch.device
) -> tuple[str, tuple[str, ...]]:
    """The loader that `data.loader` means here, and lines for the user.

    auto: resident for what fits into `data.resident_mib` (without a GPU and the C++ kernels only for affine maps); DALI for image
    files; else workers.

    Raises:
        UsageError: the loader that was asked for by name cannot do this.
    """
    images, mib = source.train.images, config.resident_mib
    needed = resident.required_bytes(images)
    fits = needed is not None and needed <= mib * 2**20
    files = isinstance(images, ImageFiles)

    if config.loader == "resident" and not fits:
        if needed is None:
            raise UsageError("the resident loader needs to know the images' sizes: use --loader workers")
        raise UsageError(
            f"the images take {needed / 2**20:,.0f} MiB decoded, more than data.resident_mib {mib}: "
            "raise it, or use another loader"
        )
    if config.loader == "dali":
        if augmentation.crop is None:
            raise UsageError(f"DALI makes crops, augmentation {augmentation.name} affine maps: use --loader resident")
        if not files:
            raise UsageError("DALI decodes image files, these images lie in memory: use --loader resident")
        if reason := _why_no_dali(device):
            raise UsageError(f"DALI cannot start: {reason}; use --loader workers")
    if config.loader != "auto":
        return config.loader, ()

    # Crops of 32 px on two CPU cores without the C++ kernels: resident 5,600 images/s, Pillow in two workers 18,300.
    if fits and (device.type == "cuda" or augmentation.affine is not None or cpu_extension is not None):
        return "resident", ()
    if files and augmentation.crop is not None:
        if reason := _why_no_dali(device):
            return "workers", (f"DALI cannot start ({reason}): worker processes decode instead, more slowly",)
        return "dali", ()
    return "workers", ()


def _why_no_dali(device: torch.device) -> str | None:
    from falcon_fast.data.loaders import dali

    return dali.why_not(device)


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
    """The batches of `steps`, in order, on `device`, in two parts: inputs, and the function on the device that makes batches of
    them. By a loader that `choose_loader` named.

    Resident images are cropped by the function, which a CUDA graph can hold; the other loaders' inputs are batches already.

    Args:
        source: its training split is shown, in views of its size.
        clock: which image, which crop, which jitter at each step.
        workers_count: processes of the workers loader; -1 for what suits the machine.
        rank, world_size: this process's share of the global batch.
        quarantine: the bad images known so far, to which new ones are added.

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
    """The batches that the two parts of `training_inputs` make, whose arguments these are."""
    inputs, batch_of = training_inputs(*arguments, **options)
    with closing(inputs):
        for each in inputs:
            yield batch_of(each)
