"""The resident loader: the whole data set on the device as uint8, crops and affine maps made there.

For sets that fit (CIFAR, SVHN, digits, folders of small images) nothing is decoded twice and no process copies anything: a step
is a few batched tensor operations on the device. The clock's numbers of a whole epoch go up at once.

**The crop is Pillow's, to the bit.** Pillow resizes by fixed-point weights, integers of 22 bits, first along x and then
along y (`crops`), each time rounded to uint8. So do the C++ kernels on a CPU and the Triton kernel on a GPU, two launches a
batch. Elsewhere both passes are products with one matrix an image, of those same integers in float64: every sum stays below
2^53 and is exact in whatever order it is taken, so that neither the device, nor the size of the batch, nor the number of ranks
changes a pixel. (In float32 they would, now and then.) They take some sixty launches, and are what the kernel is compared with
before it is used.
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
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Images, Split, reason_of
from falcon_fast.data.views.affine import warp
from falcon_fast.data.views.crops_torch import crop
from falcon_fast.data.views.evaluation_view import evaluation_view
from falcon_fast.data.views.photometric import PhotometricTensors, to_tensors
from falcon_fast.data.views.sampling import BatchPlan, Clock, affine_matrices, crop_boxes
from falcon_fast.kernels import cpu_extension, why_no_triton
from falcon_fast.kernels.cpu.views import resize_crops


def kernel_differs(pixels: torch.Tensor, size: int) -> str | None:
    """In what the Triton kernel fails at some crops of these images (N, H, W, 3) that `crop` makes; None where it does not."""
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
    except Exception as error:  # whatever compilers do
        return f"fails ({reason_of(error)})"


def required_bytes(images: Images) -> int | None:
    """What the images take on the device: all padded to the largest height and width. None where no header was scanned."""
    if isinstance(images, ImageArray):
        return images.pixels.nbytes
    if isinstance(images, ImageFiles) and images.sizes is not None:
        width, height = np.array(images.sizes).max(0).tolist()
        return len(images) * width * height * 3
    return None


class _Epoch(NamedTuple):
    """The clock's numbers of one rank's share of an epoch, or what of it is still to come, on the device."""

    number: int
    first_step: int
    indices: torch.Tensor  # int64 (T, n)
    geometry: torch.Tensor  # boxes int64 (T, 2, n, 4), or affine maps float32 (T, 2, n, 2, 3)
    flips: torch.Tensor  # bool (T, 2, n)
    parameters: PhotometricTensors  # (T 2 n) rows


class ViewInstructions(NamedTuple):
    """What the clock says of a step, on the device: with the resident images it is a batch.

    Attributes:
        step: the optimisation step, counted over the whole run.
        indices: int64 (B,), which images.
        geometry: boxes int64 (2, B, 4), or affine maps float32 (2, B, 2, 3), of each view.
        flips: bool (2, B).
        parameters: of the photometric stage, 2 B rows.
    """

    step: int
    indices: torch.Tensor
    geometry: torch.Tensor
    flips: torch.Tensor
    parameters: PhotometricTensors


class ResidentImages:
    """A split's images on the device. Images that cannot be decoded go into the quarantine, all at the start.

    Args:
        size: side S of a view in pixels.
        affine: the views are affine maps, which take each image as evaluation sees it.

    Raises:
        UsageError: more images are bad than the quarantine allows.
    """

    def __init__(self, split: Split, size: int, affine: bool, device: torch.device, quarantine: Quarantine) -> None:
        images = split.images
        self.size, self.affine, self.device = size, affine, device
        if isinstance(images, ImageArray) and not affine:
            pixels, sizes = images.pixels, np.tile(images.pixels.shape[2:0:-1], (len(images), 1))
        else:
            pixels, sizes = self._decoded(images, quarantine)
        self.pixels = torch.from_numpy(pixels).to(device)
        # On a CPU the crops are C++'s; by matrices in float64, as below, a batch takes 30 times as long.
        self.host = (
            np.ascontiguousarray(pixels) if device.type == "cpu" and not affine and cpu_extension is not None else None
        )
        self.by_kernel = device.type == "cuda" and not affine and why_no_triton(device) is None
        if self.by_kernel and (why := kernel_differs(self.pixels, size)) is not None:
            warnings.warn(f"resident images are cropped slowly, by products: the kernel {why}", stacklevel=2)
            self.by_kernel = False
        self.sizes = sizes  # int64 (n, 2), width and height
        self.labels = None if split.labels is None else torch.from_numpy(split.labels).to(device)

    def _decoded(self, images: Images, quarantine: Quarantine) -> tuple[np.ndarray, np.ndarray]:
        def decode(index: int) -> np.ndarray | str:
            if index in quarantine.bad:
                return quarantine.bad[index]
            try:
                image = images.image(index)
                return np.asarray(evaluation_view(image, self.size) if self.affine else image)
            except Exception as error:  # Pillow raises whatever its decoders do
                return reason_of(error)

        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(decode, range(len(images)), chunksize=64))
        for index, image in enumerate(decoded):
            if isinstance(image, str):
                quarantine.add(index, image)
        empty = np.zeros((1, 1, 3), np.uint8)
        good = [empty if isinstance(image, str) else image for image in decoded]
        sizes = np.array([image.shape[1::-1] for image in good])
        width, height = sizes.max(0)
        pixels = np.zeros((len(good), height, width, 3), np.uint8)
        for index, image in enumerate(good):
            pixels[index, : image.shape[0], : image.shape[1]] = image
        return pixels, sizes

    def views(self, indices: torch.Tensor, geometry: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """Both views of n images: uint8 (2 n, 3, S, S), channels_last. On a GPU no host value is read: a CUDA graph can hold it.

        indices: int64 (n,).  geometry: boxes int64 (2, n, 4), or affine maps float32 (2, n, 2, 3).  flips: bool (2, n).
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

    def batch(self, planned: ViewInstructions) -> Batch:
        """The views and labels of a planned batch. No host value is read: a CUDA graph can hold it."""
        return Batch(
            step=planned.step,
            views=self.views(planned.indices, planned.geometry, planned.flips),
            parameters=planned.parameters,
            labels=None if self.labels is None else self.labels[planned.indices],
        )

    def epoch(self, plans: list[BatchPlan], clock: Clock, bad: dict[int, str]) -> _Epoch:
        """The numbers of these steps of one epoch, on the device, in a few copies that nobody waits for."""
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
    """The planned batches of `steps`, in order, and what makes batches of them, on `device`.

    Raises:
        UsageError: more images are bad than the quarantine allows; the message names one.
    """
    quarantine = quarantine or Quarantine(split.images)
    resident = ResidentImages(split, size, clock.augmentation.affine is not None, device, quarantine)

    def planned() -> Generator[ViewInstructions]:
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

    return planned(), resident.batch
