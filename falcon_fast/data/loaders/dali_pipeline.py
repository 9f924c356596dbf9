"""The graph that DALI runs: encoded files in, images (on a CPU) or resized regions of them (on a GPU) out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from falcon_fast.data.sources.decoding import reason_of

PREFETCH = 2  # steps that DALI decodes ahead
# The share of a batch that nvJPEG's hardware decoder takes, where there is one; CUDA decodes the rest. This is DALI's default.
HW_DECODER_LOAD = 0.65


def build_pipeline(
    source: Any,
    batch_size: int,
    size: int,
    device: torch.device,
    threads: int,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Any:
    """Build the DALI pipeline.

    Args:
        source: called once per step; returns a list of B encoded files, uint8 (n,) each, and on a GPU also the four arrays of
            `regions`.
        batch_size: B, images per step.
        size: side S of a view in pixels; used on a GPU only.
        device: where DALI decodes. A "cuda" device without a number, with `threads` 0, is only good for `serialize()`, which
            checks the graph and needs no GPU.
        threads: CPU threads of DALI.
        hw_decoder_load: share of a batch that nvJPEG's hardware decoder takes.

    Returns:
        A pipeline. Its outputs on a GPU are the two views, uint8 (B, S, S, 3); on a CPU the images, uint8 (H, W, 3) each. The
        last output, on the CPU, are the images' shapes, int64 (B, 3).
    """
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def
    def graph() -> tuple[Any, ...]:
        files, *corners = fn.external_source(source=source, num_outputs=5 if gpu else 1, batch=True)
        decode = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if gpu else {"device": "cpu"}
        # Fancy upsampling of the chroma is what libjpeg-turbo does for Pillow.
        images = fn.decoders.image(files, output_type=types.DALIImageType.RGB, jpeg_fancy_upsampling=True, **decode)
        if not gpu:
            return images, images.shape()
        views = (
            fn.resize(
                images,
                size=[size, size],
                roi_start=start,
                roi_end=end,
                interp_type=types.DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
            for start, end in zip(corners[::2], corners[1::2], strict=True)
        )
        return (*views, images.shape())

    return graph(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index if gpu else None,  # None: torch's current device, if any operator needs a GPU
        prefetch_queue_depth=PREFETCH,
    )


def regions(boxes: np.ndarray, flips: np.ndarray) -> list[np.ndarray]:
    """Return where the regions begin and end, (y, x) in pixels: four float32 (B, 2), begin and end of view 1, then of view 2.

    boxes: int64 (2, B, 4), top, left, height, width.  flips: bool (2, B); a mirrored view has left and right exchanged.
    """
    top, left, height, width = np.moveaxis(boxes, 2, 0)
    right = left + width
    begin = np.stack([top, np.where(flips, right, left)], 2).astype(np.float32)
    end = np.stack([top + height, np.where(flips, left, right)], 2).astype(np.float32)
    return [begin[0], end[0], begin[1], end[1]]


def whole_image(device: torch.device) -> list[np.ndarray]:
    """Return the regions for a single image that is only to be decoded, not cropped."""
    return [] if device.type == "cpu" else regions(np.array([[[0, 0, 1, 1]]] * 2), np.zeros((2, 1), bool))


def why_not(device: torch.device) -> str | None:
    """Return in one line why DALI cannot work on this device, or None if it can. The check decodes one pixel and takes 0.1 s."""
    pixel = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)
    try:
        build_pipeline(lambda: ([pixel], *whole_image(device)), 1, 1, device, 1).run()
    except ModuleNotFoundError as error:
        package = "nvidia-dali-cuda120" if (torch.version.cuda or "").startswith("12.") else "nvidia-dali-cuda130"
        return f"{reason_of(error)}: pip install {package}"
    except Exception as error:  # a missing library or an old driver gives ImportError, OSError or RuntimeError
        return reason_of(error)
    return None
