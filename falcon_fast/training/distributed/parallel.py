"""The network in several processes: averaged gradients, copied (DDP) or sharded (FSDP2) parameters, equal BatchNorm statistics.

With synchronised BatchNorm and the global prior, a step of W processes equals the step of one process on the whole batch, with
either strategy. DDP is the default, because it communicates less, and because networks of this size fit into any GPU together
with their moments. FSDP2 keeps 1 / W of the parameters, gradients and moments in each process between their uses.
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

# This option was renamed in torch, and the old name now gives a warning.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def data_parallel(module: nn.Module, processes: Processes) -> nn.Module:
    """Return `module` wrapped so that its gradients are averaged over the processes, with process 0's parameters and buffers.

    In a run of one process it is returned as it is. Buffers are not sent at every forward pass: synchronised BatchNorm has the
    same ones in every process, and otherwise `average_buffers` is called before they are used.
    """
    if processes.group is None or not any(p.requires_grad for p in module.parameters()):
        return module
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(module, process_group=processes.group, **options)


def shard(network: FalconNetwork, probe: nn.Module | None, config: FsdpConfig, device: torch.device) -> None:
    """Shard the parameters over all processes with FSDP2, in place: each block separately, then the projector, then the rest.

    Every process must hold the same parameters before, because they are cut and not sent. With `param_dtype` bfloat16 the blocks
    compute in bfloat16, from copies of their float32 shards, and gradients are reduced in float32. BatchNorm and the projector
    stay in float32 (BatchNorm does not mix other dtypes with its float32 statistics). The BatchNorm layers of a block are
    gathered together, because one all-gather for each layer would cost more than its parameters are worth.
    """
    # FSDP2 refuses parameters in channels_last. Convolutions on channels_last images then copy their weights, which are small.
    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    low = MixedPrecisionPolicy()
    if config.param_dtype == "bfloat16":
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def shard_unit(module: nn.Module, parts: list[nn.Module]) -> None:
        """Shard `module` with the policy `low`, but its BatchNorm layers in float32; `parts` of it are sharded already."""
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
    """Choose whether backward passes inside the context average gradients over the processes, or only add them up in each
    process.

    Only the last micro-batch of a step averages, so that a step needs one reduction and not one for each micro-batch. The forward
    pass must lie inside the context, too. Until the last micro-batch, FSDP2 then holds whole gradients instead of shards, and
    whole parameters, which do not change meanwhile. For modules of a run of one process nothing happens.

    Args:
        modules: the modules as the strategy wraps them; None is skipped.
        enabled: average.
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
    """Copy all parameters and buffers of a sharded module into a plain one with the same names. All processes call it together.

    Parameters are gathered one at a time, so that memory for only the largest is needed in addition to `plain`.
    """
    targets = plain.state_dict()
    for name, value in sharded.state_dict().items():
        targets[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def average_buffers(module: nn.Module, processes: Processes) -> None:
    """Give every process the mean of all processes' BatchNorm statistics, in place. Equal statistics stay equal, bit for bit.

    Means and variances are averaged separately. The variance over all images would also contain the spread of the means between
    the processes, which is small, because every process sees a share of the same data.
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
    # In float64 the sum of W equal float32 numbers, divided by W, is exactly that number.
    mean = processes.mean(torch.cat([buffer.double().flatten() for buffer in buffers]))
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
