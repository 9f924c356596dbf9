"""Start the worker processes of a DataLoader, which are forks of this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return the iterator of a loader, whose workers are forked without this process's garbage.

    A DALI pipeline that is not used any more is part of a reference cycle. If a worker's garbage collector finds it, its
    destructor waits for ever for threads that exist in this process only (seen with DALI 2.4). So a worker never collects what
    was there before it: `gc.freeze` hides it, as Python's documentation advises for forks.
    """
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()
