"""The memory that a run needs at the least, known before anything of it is built."""

from __future__ import annotations

from typing import NamedTuple

from falcon_fast.config import Config

FLOAT = 4  # bytes
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1}
NARROWEST = 64  # features of the narrowest network of timm that has a name of its own


class Footprint(NamedTuple):
    """Bytes that cannot be avoided. What a run really holds is more: activations, and the loss (training/memory.py)."""

    training: int  # weights, their gradients and moments
    dictionary: int  # the packed codes, and the random numbers that they are made of
    batch: int  # two views of a micro-batch, and their embeddings

    @property
    def total(self) -> int:
        return sum(self)


def least_footprint(config: Config, size: int, images: int, shards: int = 1) -> Footprint:
    """Return the memory that one process needs at the least.

    Args:
        size: side of a view in pixels.
        images: images of a micro-batch in this process.
        shards: processes among which weights, gradients and moments are divided (FSDP); else 1.
    """
    loss, width = config.loss, config.model.width
    # ResNet-8: the weights of its convolutions, 3x3 and 1x1 (models/network.py). Other backbones are built without much memory.
    resnet8 = config.model.name == "resnet8"
    features = 4 * width if resnet8 else NARROWEST
    backbone = 27 * width + (18 + 18 + 36 + 2 + 72 + 144 + 8) * width**2 if resnet8 else 0
    copies = 2 + MOMENTS[config.optimizer.name]
    rows = loss.num_codes if loss.codes == "rademacher" else loss.num_codes // loss.embedding_dim
    words = rows * -(-loss.embedding_dim // 32) * 4
    return Footprint(
        training=(backbone + features * loss.embedding_dim) * copies * FLOAT // shards,
        dictionary=3 * words,
        batch=2 * images * (3 * size**2 + loss.embedding_dim) * FLOAT,
    )
