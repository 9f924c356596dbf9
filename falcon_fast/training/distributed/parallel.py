"""The network over several processes: gradients averaged, parameters copied (DDP) or sharded (FSDP2), statistics alike.

With BatchNorm synchronised and the prior global, a step of W processes is the step of one process with the whole batch, by
either strategy. DDP is the default: it communicates less, and networks of this size fit any GPU together with their
moments. FSDP2 keeps 1 / W of the parameters, gradients and moments in each process between their uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from falcon_fast.config import FsdpConfig
from falcon_fast.kernels.torch_private import BatchNormBase as _BatchNorm
from falcon_fast.models.network import FalconNetwork, blocks_of
from falcon_fast.training.distributed.processes import Processes

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


def shard(network: FalconNetwork, probe: nn.Module | None, config: FsdpConfig, device: torch.device) -> None:
    """Shard the parameters over all processes by FSDP2, in place: each block by itself, then the projector, then the rest.

    Every process must hold the same parameters before: they are cut, not sent. With `param_dtype` bfloat16 the blocks compute in
    bfloat16 from copies of their float32 shards, and gradients are reduced in float32; BatchNorm and the projector keep
    float32 (BatchNorm mixes no other dtype with its float32 statistics). Its layers are gathered a block at a time, for an
    all-gather each would cost more than they hold.
    """
    # FSDP2 refuses parameters in channels_last. Convolutions of channels_last images then copy their weights, which are small.
    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    low = MixedPrecisionPolicy()
    if config.param_dtype == "bfloat16":
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def shard_unit(module: nn.Module, parts: list[nn.Module]) -> None:
        """`module` in `low` but for its BatchNorm layers outside `parts`, which are sharded already."""
        done = {id(layer) for part in parts for layer in part.modules()}
        norms: list[nn.Module] = [
            m for m in module.modules() if isinstance(m, _BatchNorm) and m.affine and id(m) not in done
        ]
        if low.param_dtype is not None and norms:
            fully_shard(norms, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        fully_shard(module, mp_policy=low, **options)

    blocks = blocks_of(network.backbone)
    for block in blocks:
        shard_unit(block, [])
    fully_shard(network.projector, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    shard_unit(network, [*blocks, network.projector])
    if probe is not None:
        fully_shard(probe, **options)


@contextmanager
def gradient_sync(modules: Iterable[nn.Module | None], enabled: bool) -> Iterator[None]:
    """Whether the backward pass inside averages gradients over the processes, or only adds them up in each.

    For all but the last of the micro-batches of a step: a sum of means costs a reduction each. Their forward passes must lie
    inside, too. FSDP2 then holds whole gradients until the last one, not shards, and whole parameters likewise, which do not
    change meanwhile. Modules of one process have nothing to send.
    """
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(enabled)
                module.set_is_last_backward(enabled)
                module.set_reshard_after_backward(enabled)
            elif isinstance(module, DistributedDataParallel) and not enabled:
                stack.enter_context(module.no_sync())
        yield


@torch.no_grad()
def gather(sharded: nn.Module, plain: nn.Module) -> None:
    """Copy all parameters and buffers of a sharded module into a plain one of the same names; every process takes part.

    One parameter at a time: beyond `plain` no more than the largest of them is held.
    """
    targets = plain.state_dict()
    for name, value in sharded.state_dict().items():
        targets[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


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
