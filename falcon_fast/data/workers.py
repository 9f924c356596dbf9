"""The DataLoader loader: worker processes decode and crop by the clock's numbers and yield two uint8 views on the device.

One item of the underlying data set is one whole batch, and its index is the step: the sampler is a range of steps. So there
is no epoch boundary at which workers start anew, resuming is a range that starts later, and which worker makes a batch
changes nothing in it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from falcon_fast.data.augmentation import Augmentation
from falcon_fast.data.images import Images, Split
from falcon_fast.data.photometric import PhotometricTensors, to_tensors
from falcon_fast.data.sampling import BatchPlan, Clock, PhotometricParameters, affine_matrices, crop_boxes
from falcon_fast.errors import UsageError

EVALUATION_CROP = 224 / 256  # of the short side, from this size up; smaller images are taken whole
EVALUATION_CROP_FROM = 96


class Batch(NamedTuple):
    """What every loader yields for one step, on the device.

    Attributes:
        step: the optimisation step, counted over the whole run.
        views: uint8 (2 B, 3, S, S), channels_last: view 1 of the B images, then view 2 of the same.
        parameters: what the photometric stage does to each of the 2 B views.
        labels: int64 (B,), or None without labels.
    """

    step: int
    views: torch.Tensor
    parameters: PhotometricTensors
    labels: torch.Tensor | None


def auto_workers(augmentation: Augmentation) -> int:
    """How many worker processes suit this machine: none where a batch is one tensor operation, else all cores but one."""
    if augmentation.affine is not None:
        return 0
    return min(16, max(1, len(os.sched_getaffinity(0)) - 1))


class _Undecodable(NamedTuple):
    """Travels from a worker in place of a batch: an exception would arrive wrapped in the worker's traceback."""

    message: str


class _StepBatches(Dataset):
    """Item `step` is the batch of that step: uint8 views (2 B, S, S, 3), the photometric parameters, the image numbers."""

    def __init__(self, images: Images, clock: Clock, size: int, rank: int, world_size: int) -> None:
        self.images, self.clock, self.size = images, clock, size
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> tuple[torch.Tensor, PhotometricParameters, np.ndarray] | _Undecodable:
        plan = self.clock.at(step, self.rank, self.world_size)
        loaded = []
        for index in plan.indices:
            try:
                loaded.append(self.images.image(int(index)))
            except Exception as error:  # Pillow raises whatever its decoders do
                return _Undecodable(
                    f"{self.images.name(int(index))} cannot be decoded ({error}): "
                    "mend it, then --resume; or remove it and start anew"
                )
        crop = self.clock.augmentation.crop is not None
        views = _cropped(loaded, plan, self.clock, self.size) if crop else _warped(loaded, plan, self.clock, self.size)
        return views, plan.photometric, plan.indices


def _cropped(images: list, plan: BatchPlan, clock: Clock, size: int) -> torch.Tensor:
    """uint8 (2 B, S, S, 3): the random resized crop of each view, antialiased bicubic, mirrored where the clock says so."""
    from PIL import Image

    rule = clock.augmentation.crop
    assert rule is not None
    width = np.array([image.width for image in images])
    height = np.array([image.height for image in images])
    views = np.empty((2, len(images), size, size, 3), np.uint8)
    for view in range(2):
        boxes = crop_boxes(plan.geometry[view], height, width, rule)
        for i, (image, (top, left, rows, columns)) in enumerate(zip(images, boxes.tolist(), strict=True)):
            # Cropped before resizing, as torchvision does: resize(box=...) would let pixels outside the box bleed in.
            region = image.crop((left, top, left + columns, top + rows))
            pixels = np.asarray(region.resize((size, size), Image.Resampling.BICUBIC))
            views[view, i] = pixels[:, ::-1] if plan.flips[view, i] else pixels
    return torch.from_numpy(views.reshape(-1, size, size, 3))


def _warped(images: list, plan: BatchPlan, clock: Clock, size: int) -> torch.Tensor:
    """uint8 (2 B, S, S, 3): the random affine map of each view, bilinear, black outside, mirrored where the clock says so."""
    rule = clock.augmentation.affine
    assert rule is not None
    whole = torch.from_numpy(np.stack([np.asarray(_fit(image, size)) for image in images]))
    source = whole.permute(0, 3, 1, 2).float().repeat(2, 1, 1, 1)
    theta = torch.from_numpy(np.concatenate([affine_matrices(plan.geometry[view], rule) for view in range(2)]))
    grid = torch.nn.functional.affine_grid(theta, list(source.shape), align_corners=False)
    flips = torch.from_numpy(plan.flips.reshape(-1))
    grid = torch.where(flips[:, None, None, None], grid.flip(2), grid)
    warped = torch.nn.functional.grid_sample(source, grid, align_corners=False)
    return warped.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _fit(image, size: int):  # type: ignore[no-untyped-def]  # PIL.Image, which is imported where it is used
    """The image as evaluation sees it: short side resized, centre cropped, to the pixel as torchvision's transforms do.

    An image that has the size of a view already is taken as it is.
    """
    from PIL import Image

    if image.size == (size, size):
        return image
    crop = EVALUATION_CROP if size >= EVALUATION_CROP_FROM else 1.0
    width, height = (round(size / crop) * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer still needs its batches to end the step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked with the trainer's own handler


def _as_is(item: object) -> object:
    """Instead of DataLoader's conversion, which would turn the parameters into tensors here and again on the device."""
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
) -> Generator[Batch]:
    """Yield the batches of `steps`, in order, on `device`.

    Args:
        split: images and labels; labels only ride along.
        clock: which image, which crop, which jitter at each step.
        size: side S of a view in pixels.
        workers: worker processes; -1 for what suits the machine (`auto_workers`).
        rank, world_size: this process's share of the global batch.

    Raises:
        UsageError: an image cannot be decoded; the message names the file.
    """
    count = auto_workers(clock.augmentation) if workers < 0 else workers
    dataset = _StepBatches(split.images, clock, size, rank, world_size)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=min(count, max(1, len(steps))) if count else 0,
        collate_fn=_as_is,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if count else None,
    )
    labels = None if split.labels is None else torch.from_numpy(split.labels)
    for step, item in zip(steps, loader, strict=True):
        if isinstance(item, _Undecodable):
            raise UsageError(item.message)
        views, parameters, indices = item
        yield Batch(
            step=step,
            views=views.to(device, non_blocking=True).permute(0, 3, 1, 2),
            parameters=to_tensors(parameters, device),
            labels=None if labels is None else labels[torch.as_tensor(indices)].to(device, non_blocking=True),
        )


class _Evaluated(Dataset):
    """Item i is (uint8 (S, S, 3), i) of the image as evaluation sees it, or what is wrong with it."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray | _Undecodable:
        try:
            return np.asarray(_fit(self.images.image(index), self.size))
        except Exception as error:  # Pillow raises whatever its decoders do
            return _Undecodable(f"{self.images.name(index)} cannot be decoded ({error}): mend or remove it")


def _stack(items: list[np.ndarray | _Undecodable]) -> torch.Tensor | _Undecodable:
    for item in items:
        if isinstance(item, _Undecodable):
            return item
    return torch.from_numpy(np.stack(items))


def evaluation_batches(
    split: Split, size: int, device: torch.device, batch_size: int = 256, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Yield the split's images once, in order, centred and without augmentation: uint8 (<= batch_size, 3, S, S), channels_last.

    Raises:
        UsageError: an image cannot be decoded; the message names the file.
    """
    loader = DataLoader(
        _Evaluated(split.images, size),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
    )
    for item in loader:
        if isinstance(item, _Undecodable):
            raise UsageError(item.message)
        yield item.to(device, non_blocking=True).permute(0, 3, 1, 2)
