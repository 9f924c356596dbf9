"""Batches for evaluation: each image once, in order, resized and centre cropped, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from falcon_fast.data.loaders.forking import started
from falcon_fast.data.loaders.shared_memory import handed_over, received
from falcon_fast.data.loaders.signals import hold_signals, leave_signals_to_the_trainer
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import Images, Split
from falcon_fast.data.views.evaluation_view import evaluation_view
from falcon_fast.errors import TemporaryError, UsageError

# The number of an image, and its evaluation view, the reason why it is bad, or why its file cannot be read.
_Item = tuple[int, np.ndarray | str | TemporaryError]


class _Evaluated(Dataset[_Item]):
    """Item i is the evaluation view of image i, uint8 (S, S, 3), or why there is none: a worker would show a traceback."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Item:
        try:
            return index, np.asarray(evaluation_view(self.images.image(index), self.size))
        except BadImage as error:
            return index, str(error)
        except TemporaryError as error:
            return index, error


def _stack(items: list[_Item]) -> tuple[torch.Tensor | np.ndarray | None, dict[int, str | TemporaryError]]:
    good = [pixels for _, pixels in items if isinstance(pixels, np.ndarray)]
    bad = {index: reason for index, reason in items if not isinstance(reason, np.ndarray)}
    return handed_over(torch.from_numpy(np.stack(good))) if good else None, bad


def evaluation_batches(
    split: Split,
    size: int,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    bad: dict[int, str] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the evaluation views of a split's images, each once and in order: uint8 (<= batch_size, 3, S, S), channels_last.

    Args:
        split: the images; labels are ignored.
        size: side S of a view in pixels.
        device: where the batches are put.
        batch_size: images per batch; the last batch may be smaller.
        workers: worker processes that decode; 0 to decode in this process.
        bad: receives the images that cannot be decoded, number -> reason; they are left out of the batches.

    Raises:
        UsageError: an image cannot be decoded and `bad` is None (the message names the file), or no image can be decoded.
        TemporaryError: a file cannot be read, though it may be good.
    """
    loader = DataLoader(
        _Evaluated(split.images, size),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # without it each start draws from the random state that the run's dropout uses
    )
    some = not len(split.images)
    with hold_signals():
        batches = started(loader)
    try:
        for images, found in batches:
            for index, reason in found.items():
                if isinstance(reason, TemporaryError):
                    raise reason
                if bad is None:
                    raise UsageError(f"{split.images.name(index)} cannot be decoded ({reason}): repair or remove it")
                bad[index] = reason
            if images is not None:
                some = True
                yield received(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    finally:
        del batches  # a traceback would keep it, and with it the worker processes
    if not some:
        raise UsageError(
            f"none of {len(split.images)} images can be decoded: `falcon-fast data verify` names the reasons"
        )
