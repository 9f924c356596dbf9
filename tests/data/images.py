"""Helpers of the tests of the data: compare batches, write image files of every kind, damage them."""

from __future__ import annotations

import multiprocessing
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from falcon_fast.data.loaders.batch import Batch

CPU = torch.device("cpu")
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def same(a: Batch, b: Batch) -> bool:
    labels = (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)  # type: ignore[arg-type]
    return (
        a.step == b.step
        and torch.equal(a.views, b.views)
        and labels
        and all(torch.equal(x, y) for x, y in zip(a.parameters, b.parameters, strict=True))
    )


def joined(parts: list[Batch]) -> Batch:
    """The shares of the ranks as one batch: each rank's view 1 is followed by its view 2."""

    def both(values: list[torch.Tensor]) -> torch.Tensor:
        halves = [value.chunk(2) for value in values]
        return torch.cat([half[view] for view in range(2) for half in halves])

    parameters = type(parts[0].parameters)(*(both([p.parameters[k] for p in parts]) for k in range(5)))
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    return Batch(parts[0].step, both([part.views for part in parts]), parameters, labels)


def assert_no_workers_left() -> None:
    end = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    assert not multiprocessing.active_children()


def torchvisions(image: Image.Image, size: int, crop: int) -> np.ndarray:
    """The evaluation view by torchvision: short side `size`, then the centre `crop`."""
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(crop)])
    return np.asarray(transform(image))


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.RandomState(seed)
    small = Image.fromarray(random.randint(0, 256, (7, 9, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, which Pillow does not write. pixels: uint16 (H, W, 3)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_every_kind(root: Path, width: int = 61, height: int = 45) -> list[Path]:
    """Write 36 files, one image of each kind; all loaders must make the same pixels of them."""
    root.mkdir(parents=True, exist_ok=True)
    image = smooth(width, height)
    gray, pixels = image.convert("L"), np.asarray(image)
    alpha = np.arange(width * height).reshape(height, width).astype(np.uint8)
    clear, gray_clear = (Image.fromarray(np.dstack([np.asarray(x), alpha])) for x in (image, gray))
    palette = image.quantize(64)
    low = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint16)
    wide = np.asarray(gray).astype(np.uint16) * 256 + low[..., 0]
    for name, picture, options in [
        ("444.jpg", image, {"subsampling": 0}),
        ("422.jpg", image, {"subsampling": 1}),
        ("420.jpeg", image, {"subsampling": 2}),
        ("progressive.jpg", image, {"progressive": True}),
        ("gray.jpg", gray, {}),
        ("cmyk.jpg", image.convert("CMYK"), {}),
        ("xmp.jpg", image, {"xmp": XMP}),
        ("rgb.png", image, {}),
        ("gray.png", gray, {}),
        ("rgba.png", clear, {}),
        ("gray-alpha.png", gray_clear, {}),
        ("palette.png", palette, {}),
        ("transparent.png", palette, {"transparency": 3}),
        ("one-bit.png", image.convert("1", dither=Image.Dither.NONE), {}),
        ("dithered.png", image.convert("1"), {}),
        ("16-bit.png", Image.fromarray(wide), {}),
        ("16-bit.tif", Image.fromarray(wide), {}),
        ("lossy.webp", image, {}),
        ("lossless.webp", image, {"lossless": True}),
        ("rgba.webp", clear, {}),
        ("rgb.bmp", image, {}),
        ("rgb.ppm", image, {}),
        ("gray.pgm", gray, {}),
        ("rgb.tif", image, {}),
    ]:
        picture.save(root / name, **options)
    (root / "16-bit-rgb.png").write_bytes(sixteen_bit_png(pixels.astype(np.uint16) * 256 + low))
    image.save(root / "mpo.jpg", "MPO", save_all=True, append_images=[image])
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        image.save(root / f"exif-{orientation}.jpg", exif=exif)
    for suffix in ("png", "webp", "tif"):
        image.save(root / f"exif-8.{suffix}", exif=exif)
    return sorted(root.iterdir())


def damage(path: Path, kind: str) -> None:
    """Make a good image file bad, but for its header where possible."""
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {
            "truncated": data[:half],
            "zeroed": data[:half] + bytes(len(data) - half),
            "empty": b"",
            "html": b"<html>404</html>",
            "gif": b"GIF89a" + data[6:],
        }[kind]
    )
