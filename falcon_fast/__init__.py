"""FALCON, failure-proof non-contrastive self-supervised learning (arXiv 2410.04959), made fast.

The objective is importable from here; `falcon-fast train --amp` is the whole trainer. Importing needs torch and numpy only, and
imports them when a name is first used: `falcon-fast` must be able to handle signals before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falcon_fast.objective import (
        FalconLoss,
        FalconLossOutput,
        FalconProjector,
        HadamardCodes,
        RademacherCodes,
        falcon_loss,
        temperature,
    )

    __version__: str

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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("falcon_fast")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from falcon_fast import objective

    return getattr(objective, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
