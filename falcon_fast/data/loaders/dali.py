"""The DALI loader: it decodes each file once and resizes two regions of the image, as the clock says.

The host gives DALI's graph (`dali_pipeline`) the bytes of the files and, on a GPU, the two regions of each image, which it
computes from the clock's numbers and the sizes in the files' headers. The graph itself draws no random numbers. So there is no
state to save: the loader has no reader and no epochs, and can start at any step. For a mirrored view, left and right of the
region are exchanged.

On a GPU the graph also resizes. On a CPU it only decodes, because DALI's bicubic operator takes seventeen times as long as our
own crops (`crops_cpu`). Two 224 px views of a photograph from ImageNet take 1.1 ms on two cores, of which decoding takes 0.9 ms.

All stages overlap: threads read files READ_AHEAD steps ahead, DALI decodes PREFETCH steps ahead, and the views are handed over on
torch's own CUDA stream.

A file that DALI cannot decode ends its pipeline. The loader then examines the images of that step one by one. An image that
Pillow cannot decode either is bad; an image that only DALI cannot decode is fed as a bitmap from then on. Then a new pipeline
starts at the same step. A bad image goes into quarantine when the first step that it belongs to is handed over, whichever step
was read ahead when it was found, so that the list is that of the other loaders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from falcon_fast.data.loaders.batch import Batch, labels_of
from falcon_fast.data.loaders.dali_files import encoded
from falcon_fast.data.loaders.dali_pipeline import build_pipeline, regions, whole_image
from falcon_fast.data.loaders.quarantine import Quarantine, load_share
from falcon_fast.data.sources.changes import changes_of
from falcon_fast.data.sources.decoding import header_size
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import ImageFiles, Split
from falcon_fast.data.views.crops_cpu import resized_crops
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import BatchPlan, Clock, crop_boxes
from falcon_fast.errors import TemporaryError, TrainingError
from falcon_fast.hardware.processors import usable_threads

READ_AHEAD = 4  # steps, one thread each; reading several files at once helps on a slow or remote disk


class _EncodedBatch(NamedTuple):
    """One step's encoded files and crop boxes, before DALI decodes them."""

    plan: BatchPlan
    files: list[np.ndarray]
    indices: np.ndarray
    sizes: np.ndarray  # int64 (n, 2), width and height
    boxes: np.ndarray  # int64 (2, n, 4), of both views
    met: dict[int, str]  # bad images that others stand in for, number -> reason
    changed: dict[int, str]  # images whose files have changed since the run began


# What is prepared for a step: a batch; or the bad images, if they are too many; or why the files could not be read.
_Prepared = _EncodedBatch | dict[int, str] | TemporaryError


class _Feeder:
    """Reads the files of the coming steps in threads and hands them to DALI in order."""

    def __init__(self, loader: _Loader, steps: range) -> None:
        self.loader, self.ahead = loader, iter(steps)
        self.pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="falcon-fast-read")
        self.reading: deque[Future[_Prepared]] = deque()
        self.given: deque[_Prepared] = deque()  # given to DALI, not returned yet
        for _ in range(READ_AHEAD):
            self._read()

    def _read(self) -> None:
        step = next(self.ahead, None)
        if step is not None:
            self.reading.append(self.pool.submit(self.loader.prepare, step))

    def __call__(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        """Return the next step's files, and on a GPU their regions. DALI calls this in the thread that asks it for a batch."""
        if not self.reading:
            raise StopIteration
        prepared = self.reading.popleft().result()
        self._read()
        self.given.append(prepared)
        if not isinstance(prepared, _EncodedBatch):  # the loader stops when it comes to this step
            raise StopIteration
        if self.loader.device.type == "cpu":
            return (prepared.files,)
        return prepared.files, *regions(prepared.boxes, prepared.plan.flips)

    def close(self) -> None:
        """Stop reading, and wait for the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)


class _Loader:
    """The state that the reading threads and the consumer share."""

    def __init__(
        self, split: Split, clock: Clock, size: int, device: torch.device, rank: int, world: int, quarantine: Quarantine
    ) -> None:
        assert isinstance(split.images, ImageFiles) and clock.augmentation.crop is not None
        self.rule = clock.augmentation.crop
        self.images = split.images
        self.labels, self.clock, self.size, self.device = split.labels, clock, size, device
        self.rank, self.world, self.quarantine = rank, world, quarantine
        self.bad = dict(quarantine.bad)
        # Images that DALI cannot decode, or decodes to another size than the header says.
        self.by_pillow: set[int] = set()
        self.threads = min(16, usable_threads())
        self.croppers = ThreadPoolExecutor(self.threads, thread_name_prefix="falcon-fast-crop")

    def prepare(self, step: int) -> _Prepared:
        """Read the files of one step. Return only the bad images if too many images are bad, or why a file cannot be read."""
        plan = self.clock.at(step, self.rank, self.world)

        def load(index: int) -> tuple[np.ndarray, tuple[int, int]]:
            path, data = self.images.paths[index], self.images.data(index)
            size = self.images.sizes[index] if self.images.sizes is not None else header_size(path)
            return encoded(data, size, index in self.by_pillow, self.images.max_pixels, path)

        try:
            share = load_share(self.clock, plan, load, self.bad, self.quarantine.limit)
        except TemporaryError as error:
            return error
        if isinstance(share, dict):
            return share
        sizes = np.array([size for _, size in share.images], np.int64)
        files = [data for data, _ in share.images]
        boxes = np.stack([crop_boxes(plan.geometry[view], sizes[:, 1], sizes[:, 0], self.rule) for view in range(2)])
        changed = changes_of(self.images, share.indices)
        return _EncodedBatch(plan, files, share.indices, sizes, boxes, share.met, changed)

    def pipeline(self, source: Any) -> Any:
        """Build a pipeline that takes its files from `source`."""
        return build_pipeline(source, self.clock.batch_size // self.world, self.size, self.device, self.threads)

    def batches(self, steps: range) -> Iterator[Batch]:
        """Yield the batches of `steps` from one pipeline. Ends early if it meets an image that the pipeline cannot decode."""
        feeder = _Feeder(self, steps)
        try:
            pipeline = self.pipeline(feeder)
            for step in steps:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                try:
                    *decoded, shapes = pipeline.run(stream)
                except StopIteration:  # raised in `_Feeder.__call__`
                    decoded, shapes = [], None
                except RuntimeError as error:
                    self.examine([each for each in feeder.given if isinstance(each, _EncodedBatch)], error)
                    return
                prepared = feeder.given.popleft()
                if isinstance(prepared, TemporaryError):
                    raise prepared
                for index, reason in (prepared if isinstance(prepared, dict) else prepared.met).items():
                    self.quarantine.add(index, reason)
                assert isinstance(prepared, _EncodedBatch)  # otherwise the quarantine has raised
                self.quarantine.changes.add(prepared.changed)
                found = np.from_dlpack(shapes.as_tensor())[:, 1::-1]
                changed = (found != prepared.sizes).any(1)
                if changed.any():  # the file has changed since its header was read
                    self.by_pillow |= set(prepared.indices[changed].tolist())
                    return
                yield Batch(
                    step=step,
                    views=self.views(decoded, prepared).permute(0, 3, 1, 2),
                    parameters=to_tensors(prepared.plan.photometric, self.device),
                    labels=labels_of(self.labels, prepared.indices, self.device),
                )
        finally:
            feeder.close()

    def views(self, decoded: list[Any], prepared: _EncodedBatch) -> torch.Tensor:
        """Return both views, uint8 (2 B, S, S, 3), from the pipeline's outputs."""
        if self.device.type == "cuda":
            # The only copy: it joins both views into one batch and releases DALI's buffers.
            return torch.cat([torch.from_dlpack(view.as_tensor()) for view in decoded])
        images = [np.from_dlpack(decoded[0][i]) for i in range(len(prepared.files))]
        return resized_crops(images, prepared.boxes, prepared.plan.flips, self.size, self.croppers)

    def examine(self, suspects: list[_EncodedBatch], error: RuntimeError) -> None:
        """Find the images of these steps that DALI cannot decode. Raises TrainingError if there are none."""
        before = len(self.bad) + len(self.by_pillow)
        for prepared in suspects:
            for index, data in zip(prepared.indices.tolist(), prepared.files, strict=True):
                if index in self.bad or index in self.by_pillow or self._decodes(data):
                    continue
                try:
                    self.images.image(index)
                    self.by_pillow.add(index)
                except BadImage as damage:  # listed when its step comes again
                    self.bad[index] = str(damage)
            if len(self.bad) + len(self.by_pillow) > before:
                return
        reason = " ".join(str(error).split())
        raise TrainingError(f"DALI failed, on no particular image: {reason}")

    def _decodes(self, data: np.ndarray) -> bool:
        """Check whether DALI decodes this file."""
        try:
            build_pipeline(lambda: ([data], *whole_image(self.device)), 1, 1, self.device, 1).run()
        except RuntimeError:
            return False
        return True


def training_batches(
    split: Split,
    clock: Clock,
    size: int,
    steps: range,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    quarantine: Quarantine | None = None,
) -> Generator[Batch]:
    """Yield the batches of `steps`, in order, on `device`. Needs image files and an augmentation that crops.

    The arguments are those of `workers.training_batches`.

    Raises:
        UsageError: more images are bad than the quarantine allows; the message names one.
        TemporaryError: a file cannot be read, though it may be good.
        TrainingError: DALI failed, and not because of an image.
    """
    loader = _Loader(split, clock, size, device, rank, world_size, quarantine or Quarantine(split.images))
    with loader.croppers:
        while steps:
            for batch in loader.batches(steps):
                yield batch
                steps = steps[1:]
