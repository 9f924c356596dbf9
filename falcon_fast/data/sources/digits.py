"""The 8 x 8 handwritten digits of scikit-learn, enlarged, with a fixed split into training and test."""

from __future__ import annotations

import numpy as np

from falcon_fast.data.sources.images import ImageArray, Source, Split, fingerprint


def open_digits(size: int) -> Source:
    """Return the 1,797 digits as images of `size` x `size` pixels: 1,437 for training, 360 for testing, stratified by class.

    They are enlarged bilinearly, and normalised by the mean and standard deviation of the training split.
    """
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) * (255 / 16))[:, None]  # 8 x 8, 17 levels of ink
    large = torch.nn.functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    labels = digits.target.astype(np.int64)
    kept, out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    mean, std = float(pixels[kept].mean()) / 255, float(pixels[kept].std()) / 255
    return Source(
        train=Split(ImageArray(pixels[kept]), labels[kept]),
        test=Split(ImageArray(pixels[out]), labels[out]),
        classes=tuple("0123456789"),
        size=size,
        mean=(mean,) * 3,
        std=(std,) * 3,
        fingerprint=fingerprint([digits.images.astype(np.uint8).tobytes()]),
    )
