"""The resident loader: the whole data set is on the device as uint8, and crops and affine maps are made there.

For data sets that fit (CIFAR, SVHN, digits, folders of small images), nothing is decoded twice and no process copies anything: a
step is a few batched tensor operations on the device. The clock's numbers of a whole epoch are copied to the device at once.

**The crops equal Pillow's, bit for bit.** Pillow resizes with fixed-point weights, integers of 22 bits, first along x and then
along y (`crops_cpu`), and rounds to uint8 after each pass. The C++ kernels on a CPU and the Triton kernel on a GPU (two launches
per batch) do the same. Everywhere else both passes are products with one matrix per image (`crops_torch`), of those same integers
in float64: every sum stays below 2^53 and is therefore exact in any order, so that neither the device, nor the batch size, nor
the number of ranks changes a pixel. (In float32 they would, now and then.) These products take about sixty launches; the Triton
kernel is compared with them before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.sources.decoding import reason_of
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Images, Split
from falcon_fast.data.views.affine import warp
from falcon_fast.data.views.crops_torch import crop
from falcon_fast.data.views.evaluation_view import evaluation_view
from falcon_fast.data.views.photometric import PhotometricTensors, to_tensors
from falcon_fast.data.views.sampling import BatchPlan, Clock, affine_matrices, crop_boxes
from falcon_fast.kernels import cpu_extension, why_no_triton
from falcon_fast.kernels.cpu.views import resize_crops


def kernel_differs(pixels: torch.Tensor, size: int) -> str | None:
    """Compare the Triton kernel with `crops_torch.crop` on four crops of these images.

    pixels: uint8 (N, H, W, 3), on a GPU.  Returns what is wrong with the kernel, or None if both give the same pixels.
    """
    from falcon_fast.kernels.gpu.views.crops import crop_views

    height, width = pixels.shape[1:3]
    whole = torch.tensor([0, 0, height, width])
    part = torch.tensor([height // 3, width // 4, -(-height // 3), -(-width // 2)])
    one = torch.tensor([height - 1, width - 1, 1, 1])
    boxes = torch.stack([whole, part, one, part]).to(pixels.device)
    flips = torch.tensor([False, False, False, True], device=pixels.device)
    indices = torch.tensor([0, len(pixels) - 1], device=pixels.device)
    try:
        found = crop_views(pixels, indices, boxes, flips, size)
        expected = crop(pixels[indices].repeat(2, 1, 1, 1), boxes, flips, size)
        return None if torch.equal(found.permute(0, 3, 1, 2), expected) else "gives other pixels"
    except Exception as error:  # a compiler may raise anything
        return f"fails ({reason_of(error)})"


def required_bytes(images: Images) -> int | None:
    """Return the bytes that the images take on the device, all padded to the largest height and width.

    None if the sizes are not known, because no header was scanned.
    """
    if isinstance(images, ImageArray):
        return images.pixels.nbytes
    if isinstance(images, ImageFiles) and images.sizes is not None:
        width, height = (int(side) for side in np.array(images.sizes).max(0))
        return len(images) * width * height * 3
    return None


class _Epoch(NamedTuple):
    """The clock's numbers for T steps of one epoch, one rank's share, on the device."""

    number: int
    first_step: int
    indices: torch.Tensor  # int64 (T, n)
    geometry: torch.Tensor  # boxes int64 (T, 2, n, 4), or affine maps float32 (T, 2, n, 2, 3)
    flips: torch.Tensor  # bool (T, 2, n)
    parameters: PhotometricTensors  # (T 2 n) rows


class ViewInstructions(NamedTuple):
    """Which views of which images one step needs, on the device: the clock's numbers as crop boxes or affine maps.

    `ResidentImages.batch` carries them out and returns the finished batch.

    Attributes:
        step: number of the optimisation step, counted over the whole run.
        indices: int64 (B,), the numbers of the images.
        geometry: crop boxes int64 (2, B, 4), or affine maps float32 (2, B, 2, 3), for each view.
        flips: bool (2, B), which views are mirrored.
        parameters: for the photometric stage, 2 B rows.
    """

    step: int
    indices: torch.Tensor
    geometry: torch.Tensor
    flips: torch.Tensor
    parameters: PhotometricTensors


class ResidentImages:
    """The images of a split on the device. All of them are decoded at the start, and those that cannot be go into the quarantine.

    Args:
        split: images and labels.
        size: side S of a view in pixels.
        affine: whether the views are affine maps; these start from each image's evaluation view.
        device: where the images are kept.
        quarantine: the bad images known so far; new ones are added to it.

    Raises:
        UsageError: more images are bad than the quarantine allows.
        TemporaryError: a file cannot be read, though it may be good.
    """

    def __init__(self, split: Split, size: int, affine: bool, device: torch.device, quarantine: Quarantine) -> None:
        images = split.images
        self.size, self.affine, self.device = size, affine, device
        if isinstance(images, ImageArray) and not affine:
            pixels, sizes = images.pixels, np.tile(images.pixels.shape[2:0:-1], (len(images), 1))
        else:
            pixels, sizes = self._decoded(images, quarantine)
        self.pixels = torch.from_numpy(pixels).to(device)
        # On a CPU the C++ kernels crop; matrix products in float64, as below, take 30 times as long for a batch.
        self.host = (
            np.ascontiguousarray(pixels) if device.type == "cpu" and not affine and cpu_extension is not None else None
        )
        self.by_kernel = device.type == "cuda" and not affine and why_no_triton(device) is None
        if self.by_kernel and (why := kernel_differs(self.pixels, size)) is not None:
            warnings.warn(f"resident images are cropped slowly, by matrix products: the kernel {why}", stacklevel=2)
            self.by_kernel = False
        self.sizes = sizes  # int64 (n, 2), width and height of each image
        self.labels = None if split.labels is None else torch.from_numpy(split.labels).to(device)

    def _decoded(self, images: Images, quarantine: Quarantine) -> tuple[np.ndarray, np.ndarray]:
        """Decode all images. Return them padded to one size, uint8 (n, H, W, 3), and their width and height, int64 (n, 2)."""

        def decode(index: int) -> np.ndarray | str:
            if index in quarantine.bad:
                return quarantine.bad[index]
            try:
                image = images.image(index)
                return np.asarray(evaluation_view(image, self.size) if self.affine else image)
            except BadImage as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(decode, range(len(images)), chunksize=64))
        for index, image in enumerate(decoded):
            if isinstance(image, str):
                quarantine.add(index, image)
        quarantine.changes.look()
        empty = np.zeros((1, 1, 3), np.uint8)
        good = [empty if isinstance(image, str) else image for image in decoded]
        sizes = np.array([image.shape[1::-1] for image in good])
        width, height = sizes.max(0)
        pixels = np.zeros((len(good), height, width, 3), np.uint8)
        for index, image in enumerate(good):
            pixels[index, : image.shape[0], : image.shape[1]] = image
        return pixels, sizes

    def views(self, indices: torch.Tensor, geometry: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """Return both views of n images: uint8 (2 n, 3, S, S), channels_last.

        On a GPU no value is read back to the host, so a CUDA graph can hold this.

        indices: int64 (n,).  geometry: crop boxes int64 (2, n, 4), or affine maps float32 (2, n, 2, 3).  flips: bool (2, n).
        """
        if self.host is not None:
            rows = [self.host[index] for index in indices.tolist()]
            return resize_crops(rows, geometry.numpy(), flips.numpy(), self.size).permute(0, 3, 1, 2)
        if self.by_kernel:
            from falcon_fast.kernels.gpu.views.crops import crop_views

            return crop_views(self.pixels, indices, geometry.flatten(0, 1), flips.flatten(), self.size).permute(
                0, 3, 1, 2
            )
        images = self.pixels[indices]
        if self.affine:
            return warp(images, geometry.flatten(0, 1), flips.flatten()).permute(0, 3, 1, 2)
        return crop(images.repeat(2, 1, 1, 1), geometry.flatten(0, 1), flips.flatten(), self.size)

    def batch(self, instructions: ViewInstructions) -> Batch:
        """Carry out the instructions: return the step's views and labels.

        No value is read back to the host, so a CUDA graph can hold this.
        """
        return Batch(
            step=instructions.step,
            views=self.views(instructions.indices, instructions.geometry, instructions.flips),
            parameters=instructions.parameters,
            labels=None if self.labels is None else self.labels[instructions.indices],
        )

    def epoch(self, plans: list[BatchPlan], clock: Clock, bad: dict[int, str]) -> _Epoch:
        """Return the numbers of these steps, all of one epoch, on the device. The copies are few and asynchronous."""
        augmentation = clock.augmentation
        indices = np.stack([plan.indices for plan in plans])
        if bad:
            for plan, row in zip(plans, indices, strict=True):
                for i, position in enumerate(plan.positions):
                    if int(row[i]) in bad:
                        row[i] = next(k for k in clock.candidates(plan.epoch, int(position)) if k not in bad)
        uniform = np.stack([plan.geometry for plan in plans])  # (T, 2, n, G)
        steps, _, n, columns = uniform.shape
        flat = uniform.reshape(-1, columns)
        if augmentation.crop is not None:
            width, height = np.repeat(self.sizes[indices][:, None], 2, 1).reshape(-1, 2).T
            geometry: np.ndarray = crop_boxes(flat, height, width, augmentation.crop)
        else:
            assert augmentation.affine is not None
            geometry = affine_matrices(flat, augmentation.affine)
        photometric = type(plans[0].photometric)(
            *(np.concatenate(column) for column in zip(*(plan.photometric for plan in plans), strict=True))
        )

        def up(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
            return tensor.to(self.device, non_blocking=True)

        return _Epoch(
            number=plans[0].epoch,
            first_step=plans[0].step,
            indices=up(indices),
            geometry=up(geometry.reshape(steps, 2, n, *geometry.shape[1:])),
            flips=up(np.stack([plan.flips for plan in plans])),
            parameters=to_tensors(photometric, self.device),
        )


def training_inputs(
    split: Split,
    clock: Clock,
    size: int,
    steps: range,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    quarantine: Quarantine | None = None,
) -> tuple[Generator[ViewInstructions], Callable[[ViewInstructions], Batch]]:
    """Return the `ViewInstructions` of `steps`, in order, and the function that turns each into a batch on `device`.

    The arguments are those of `workers.training_batches`.

    Raises:
        UsageError: more images are bad than the quarantine allows; the message names one.
    """
    quarantine = quarantine or Quarantine(split.images)
    resident = ResidentImages(split, size, clock.augmentation.affine is not None, device, quarantine)

    def instructions() -> Generator[ViewInstructions]:
        per_epoch, epoch = clock.steps_per_epoch, None
        for step in steps:
            if epoch is None or step // per_epoch != epoch.number:
                rest = range(step, min(steps.stop, (step // per_epoch + 1) * per_epoch))
                epoch = resident.epoch([clock.at(each, rank, world_size) for each in rest], clock, quarantine.bad)
            at = step - epoch.first_step
            indices = epoch.indices[at]
            rows = slice(at * 2 * len(indices), (at + 1) * 2 * len(indices))
            parameters = PhotometricTensors(*(column[rows] for column in epoch.parameters))
            yield ViewInstructions(step, indices, epoch.geometry[at], epoch.flips[at], parameters)

    return instructions(), resident.batch
