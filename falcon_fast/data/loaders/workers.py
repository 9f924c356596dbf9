"""The loader of PyTorch worker processes: they decode and crop as the clock says and yield two uint8 views on the device.

One item of the underlying data set is one whole batch, and its index is the step; the sampler is a range of steps. Therefore the
workers do not restart between epochs, a resumed run only needs a range that starts later, and it does not matter which
worker makes a batch.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from falcon_fast.data.loaders.batch import Batch, labels_of
from falcon_fast.data.loaders.forking import started
from falcon_fast.data.loaders.quarantine import Quarantine, load_share
from falcon_fast.data.loaders.shared_memory import advice, handed_over, received
from falcon_fast.data.loaders.signals import hold_signals, leave_signals_to_the_trainer
from falcon_fast.data.sources.changes import changes_of
from falcon_fast.data.sources.images import Images, Split
from falcon_fast.data.views.affine import warp
from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.data.views.crops_cpu import pillow_crop
from falcon_fast.data.views.evaluation_view import evaluation_view
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import BatchPlan, Clock, PhotometricParameters, affine_matrices, crop_boxes
from falcon_fast.errors import TemporaryError
from falcon_fast.hardware.processors import usable_threads

if TYPE_CHECKING:
    from PIL.Image import Image


def auto_workers(augmentation: Augmentation) -> int:
    """Return the number of worker processes that suits this machine.

    It is 0 if a batch is one tensor operation (affine maps), else one less than the number of processors that this process may
    use (affinity and cgroup quota), at least 1 and at most 16.
    """
    if augmentation.affine is not None:
        return 0
    return min(16, max(1, usable_threads() - 1))


class _LoadedBatch(NamedTuple):
    """One batch as a worker process hands it over: decoded and cropped, on the host."""

    views: torch.Tensor | np.ndarray  # uint8 (2 B, S, S, 3)
    parameters: PhotometricParameters
    indices: np.ndarray
    met: dict[int, str]  # bad images that others stand in for, number -> reason
    changed: dict[int, str]  # images whose files have changed since the run began, number -> change


# What a worker process makes of a step: a batch; or the bad images, if they are too many; or why the files could not be read.
_Item = _LoadedBatch | dict[int, str] | TemporaryError


class _StepBatches(Dataset[_Item]):
    """Item `step` is the batch of that step; or, if more than `limit` images are bad, only the bad images.

    A TemporaryError is an item, too: DataLoader would put the worker's traceback into its message.
    """

    def __init__(
        self, images: Images, clock: Clock, size: int, rank: int, world_size: int, bad: dict[int, str], limit: int
    ) -> None:
        self.images, self.clock, self.size = images, clock, size
        self.rank, self.world_size = rank, world_size
        self.bad, self.limit = bad, limit

    def __getitem__(self, step: int) -> _Item:
        plan = self.clock.at(step, self.rank, self.world_size)
        try:
            share = load_share(self.clock, plan, self.images.image, self.bad, self.limit)
        except TemporaryError as error:
            return error
        if isinstance(share, dict):
            return share
        make = _cropped if self.clock.augmentation.crop is not None else _warped
        views = handed_over(make(share.images, plan, self.clock, self.size))
        changed = changes_of(self.images, share.indices)
        return _LoadedBatch(views, plan.photometric, share.indices, share.met, changed)


def _cropped(images: list[Image], plan: BatchPlan, clock: Clock, size: int) -> torch.Tensor:
    """Return the random resized crop of each view, bicubic, mirrored where the clock says so: uint8 (2 B, S, S, 3)."""
    rule = clock.augmentation.crop
    assert rule is not None
    width = np.array([image.width for image in images])
    height = np.array([image.height for image in images])
    views = np.empty((2, len(images), size, size, 3), np.uint8)
    for view in range(2):
        boxes = crop_boxes(plan.geometry[view], height, width, rule)
        for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
            views[view, i] = pillow_crop(image, box, bool(plan.flips[view, i]), size)
    return torch.from_numpy(views.reshape(-1, size, size, 3))


def _warped(images: list[Image], plan: BatchPlan, clock: Clock, size: int) -> torch.Tensor:
    """Return the random affine map of each view: uint8 (2 B, S, S, 3)."""
    rule = clock.augmentation.affine
    assert rule is not None
    whole = torch.from_numpy(np.stack([np.asarray(evaluation_view(image, size)) for image in images]))
    theta = torch.from_numpy(np.concatenate([affine_matrices(plan.geometry[view], rule) for view in range(2)]))
    return warp(whole, theta, torch.from_numpy(plan.flips.reshape(-1)))


def _as_is(item: object) -> object:
    """Return the item unchanged, because `to_tensors` converts it later; for DataLoader's `collate_fn`."""
    return item


def training_batches(
    split: Split,
    clock: Clock,
    size: int,
    steps: range,
    device: torch.device,
    workers: int = -1,
    rank: int = 0,
    world_size: int = 1,
    quarantine: Quarantine | None = None,
) -> Generator[Batch]:
    """Yield the batches of `steps`, in order, on `device`.

    Args:
        split: images and labels; the labels are only passed on.
        clock: decides which image, which crop and which jitter each step sees.
        size: side S of a view in pixels.
        workers: number of worker processes; -1 for the number that suits the machine (`auto_workers`).
        rank, world_size: select this process's share of the global batch.
        quarantine: the bad images known so far; new ones are added to it. If None, a new quarantine that is not saved.

    Raises:
        UsageError: more images are bad than the quarantine allows; the message names one.
        TemporaryError: a file cannot be read, though it may be good.
    """
    quarantine = quarantine or Quarantine(split.images)
    count = auto_workers(clock.augmentation) if workers < 0 else workers
    known, limit = dict(quarantine.bad), quarantine.limit
    loader = DataLoader(
        _StepBatches(split.images, clock, size, rank, world_size, known, limit),
        batch_size=None,
        sampler=steps,
        num_workers=min(count, max(1, len(steps))) if count else 0,
        collate_fn=_as_is,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # without it each start draws from the random state that the run's dropout uses
        prefetch_factor=2 if count else None,
    )
    with hold_signals():
        batches = started(loader)
    told = False
    try:
        for step, item in zip(steps, batches, strict=True):
            if isinstance(item, TemporaryError):
                raise item
            for index, reason in (item if isinstance(item, dict) else item.met).items():
                quarantine.add(index, reason)
            # A dictionary means too many bad images, and the quarantine has raised.
            assert isinstance(item, _LoadedBatch)
            quarantine.changes.add(item.changed)
            if isinstance(item.views, np.ndarray) and not told:
                told = True
                quarantine.say(
                    f"/dev/shm has too little room for a batch of {item.views.nbytes / 2**20:,.0f} MiB: {advice()}"
                )
            yield Batch(
                step=step,
                views=received(item.views).to(device, non_blocking=True).permute(0, 3, 1, 2),
                parameters=to_tensors(item.parameters, device),
                labels=labels_of(split.labels, item.indices, device),
            )
    finally:
        del batches  # a traceback would keep it, and with it the worker processes
