"""Choose the loader of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from falcon_fast.data.loaders import resident
from falcon_fast.data.sources.images import ImageFiles, Source
from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.errors import UsageError
from falcon_fast.kernels import cpu_extension

if TYPE_CHECKING:
    from falcon_fast.config import DataConfig


def choose_loader(
    config: DataConfig, source: Source, augmentation: Augmentation, device: torch.device
) -> tuple[str, tuple[str, ...]]:
    """Return the name of the loader that `data.loader` stands for here, and lines to show to the user.

    `auto` takes the resident loader for images that fit into `data.resident_mib` (on a CPU without the C++ kernels only for
    affine maps), else DALI for image files, else `workers`. Any other value is returned as it is, once it is known to work.

    Raises:
        UsageError: a loader that was named explicitly cannot load this source, or cannot run here.
    """
    images, mib = source.train.images, config.resident_mib
    needed = resident.required_bytes(images)
    fits = needed is not None and needed <= mib * 2**20
    files = isinstance(images, ImageFiles)

    if config.loader == "resident" and not fits:
        if needed is None:
            raise UsageError("the resident loader needs to know the images' sizes: use --loader workers")
        raise UsageError(
            f"the decoded images take {needed / 2**20:,.0f} MiB, more than data.resident_mib {mib}: "
            "raise it, or use another loader"
        )
    if config.loader == "dali":
        if augmentation.crop is None:
            raise UsageError(
                f"DALI can only crop, but augmentation {augmentation.name} uses affine maps: use --loader resident"
            )
        if not files:
            raise UsageError("DALI decodes image files, but these images lie in memory: use --loader resident")
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
    from falcon_fast.data.loaders import dali_pipeline

    return dali_pipeline.why_not(device)
