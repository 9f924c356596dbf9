"""The network over several processes: gradients averaged, statistics of BatchNorm alike.

With BatchNorm synchronised and the prior global, a step of W processes is the step of one process with the whole batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from falcon_fast.training.processes import Processes

# The option's name changed, and the old one now warns.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def data_parallel(module: nn.Module, processes: Processes) -> nn.Module:
    """`module` with its gradients averaged over the processes, parameters and buffers as in process 0; alone, itself.

    Buffers are not sent at every forward pass: synchronised BatchNorm has the same ones everywhere, and otherwise
    `average_buffers` is called before they are used.
    """
    if processes.group is None or not any(p.requires_grad for p in module.parameters()):
        return module
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(module, process_group=processes.group, **options)


def average_buffers(module: nn.Module, processes: Processes) -> None:
    """Give every process the mean of the processes' BatchNorm statistics, in place; the same for the same ones, to the bit.

    Mean and variance are each averaged: the spread of the means between processes, which the variance over all would hold,
    is small where every process sees its share of the same data.
    """
    if processes.group is None:
        return
    buffers = [
        buffer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    # In float64, where W equal float32 numbers sum and divide back to themselves.
    mean = processes.mean(torch.cat([buffer.double().flatten() for buffer in buffers]))
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
