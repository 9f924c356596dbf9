"""Crops that equal Pillow's bit for bit, computed as matrix products in torch; they run on any device."""

from __future__ import annotations

import torch

SUPPORT = 2.0  # half width of the bicubic filter, in pixels
PRECISION_BITS = 22  # of Pillow's fixed-point weights
CHUNK = 1 << 25  # input values resized at once; as float64 they take 256 MiB


def bicubic(x: torch.Tensor) -> torch.Tensor:
    """Return the cubic convolution kernel with a = -1/2 (Keys, 1981), which is Pillow's BICUBIC."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def weights(start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor | None, size: int, side: int) -> torch.Tensor:
    """Return the weights of the input pixels in each output pixel along one axis: float64 (n, size, side).

    They are integers; 2^22 stands for 1.

    start, length: int64 (n,), the region.  flip: bool (n,), whether the output is reversed, or None.  size: output pixels.
    side: input pixels.
    """
    out = torch.arange(size, device=start.device, dtype=torch.float64)
    scale = length.double() / size
    if flip is not None:
        out = torch.where(flip[:, None], size - 1 - out, out)
    reach = scale.clamp_min(1.0)[:, None]
    centre = (out + 0.5) * scale[:, None]  # relative to the start of the region: (n, size)
    # For Pillow a cropped image has nothing outside the region: the weights are cut off there and rescaled.
    first = (centre - SUPPORT * reach + 0.5).trunc().clamp_min(0)[..., None]
    last = torch.minimum((centre + SUPPORT * reach + 0.5).trunc(), length[:, None].double())[..., None]
    pixel = (torch.arange(side, device=start.device) - start[:, None]).double()[:, None]  # (n, 1, side)
    w = bicubic((pixel - centre[..., None] + 0.5) / reach[..., None])
    w = torch.where((pixel >= first) & (pixel < last), w, 0.0)
    w = w / w.sum(2, keepdim=True) * (1 << PRECISION_BITS)
    return (w.abs() + 0.5).floor() * w.sign()


def crop(images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int) -> torch.Tensor:
    """Resize regions of images by antialiased bicubic interpolation. Returns uint8 (n, 3, S, S), channels_last.

    images: uint8 (n, H, W, 3).  boxes: int64 (n, 4), top, left, height, width.  flips: bool (n,), mirror left to right.
    No step waits for the device or needs a value on the host, so a CUDA graph can hold this.
    """
    n, height, width, channels = images.shape
    if (rows_at_once := max(1, CHUNK // images[:1].numel())) < n:
        parts = zip(images.split(rows_at_once), boxes.split(rows_at_once), flips.split(rows_at_once), strict=True)
        return torch.cat([crop(*part, size=size) for part in parts])
    top, left, rows, columns = boxes.unbind(1)

    def rounded(sums: torch.Tensor) -> torch.Tensor:
        return ((sums + (1 << (PRECISION_BITS - 1))) / (1 << PRECISION_BITS)).floor().clamp(0, 255)

    across = weights(left, columns, flips, size, width)
    down = weights(top, rows, None, size, height)
    # (n, S, W) x (n, W, H 3), then (n, S, H) x (n, H, S 3): each pass is one product per image.
    x = rounded(across @ images.double().transpose(1, 2).reshape(n, width, height * channels))
    x = x.view(n, size, height, channels).transpose(1, 2).reshape(n, height, size * channels)
    return rounded(down @ x).view(n, size, size, channels).to(torch.uint8).permute(0, 3, 1, 2)
