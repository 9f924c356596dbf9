"""FALCON, failure-proof non-contrastive self-supervised learning (arXiv 2410.04959), made fast.

The objective is importable from here; `falcon-fast train --amp` is the whole trainer. Importing needs torch and numpy only.
"""

from importlib.metadata import version as _version

from falcon_fast.objective import (
    FalconLoss,
    FalconLossOutput,
    FalconProjector,
    HadamardCodes,
    RademacherCodes,
    falcon_loss,
    temperature,
)

__all__ = [
    "FalconLoss",
    "FalconLossOutput",
    "FalconProjector",
    "HadamardCodes",
    "RademacherCodes",
    "__version__",
    "falcon_loss",
    "temperature",
]

__version__ = _version("falcon_fast")
