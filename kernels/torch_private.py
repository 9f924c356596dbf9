"""Every private name of PyTorch that the package uses, each with its purpose.

PyTorch promises nothing about these names, so a new version may move or drop one: then only this file changes. All of them were
seen in torch 2.11 and 2.14.1. Importing this module imports nothing beyond torch itself; names whose modules take long to
import are functions that import them when they are called.
"""

from __future__ import annotations

import torch.distributed as dist


def process_group_named(name: str) -> dist.ProcessGroup:
    """Return the process group called `name` (its `group_name`).

    An operator of `torch.library` takes strings, not process groups, so groups pass through the operators by name.
    Seen in torch 2.11 and 2.14.1.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str
    return group
