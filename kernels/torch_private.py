"""The private names of PyTorch that the package uses, each with its purpose and the torch versions in which it was seen.

PyTorch promises nothing about these names: a new version may move or drop one, and then only this file has to change. Importing
this module imports nothing that `import torch` has not imported; names from other modules are functions, which import them when
called.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# A mode in which tensors have shapes, dtypes and devices but no memory: FLOP are counted without computing. 2.11, 2.14.1.
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

# The base class of every BatchNorm, SyncBatchNorm included, for isinstance checks. 2.11, 2.14.1.
from torch.nn.modules.batchnorm import _BatchNorm

# A mode that sees every operator as it is called: the roofline model records their FLOP and bytes. 2.11, 2.14.1.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# The leaves of nested tuples, lists and dicts, and a function of each: the inputs of a step in a CUDA graph. 2.11, 2.14.1.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

BatchNormBase = _BatchNorm


def process_group_named(name: str) -> dist.ProcessGroup:
    """Return the process group called `name` (its `group_name`).

    An operator of `torch.library` takes strings, but no process groups, so a group passes through it by name. 2.11, 2.14.1.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str
    return group


def functional_collectives() -> ModuleType:
    """Return the module of the collectives that torch.compile takes into its graph (0.03 to 0.2 s to import). 2.11, 2.14.1."""
    import torch.distributed._functional_collectives as module

    return module


def foreach_approach_(averages: list[torch.Tensor], values: list[torch.Tensor], weight: torch.Tensor) -> None:
    """Add to each average `weight` times its distance to its value, in place and in few launches. 2.11, 2.14.1.

    weight: 0-d, on the device and in the dtype of the averages. (`torch._foreach_lerp_` takes the same weight as a Python number
    only, for which the host would have to wait.)
    """
    change = torch._foreach_sub(values, averages)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(averages, change)


def foreach_copy_(targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy each value into its target, of the same shape and dtype, in few launches. 2.11, 2.14.1."""
    torch._foreach_copy_(targets, values)


def check_finite(tensors: list[torch.Tensor], found: torch.Tensor) -> None:
    """Set `found` (float32, 0-d) to 1.0 if an entry of the tensors, of one dtype, is NaN or infinite. 2.11, 2.14.1.

    This is what GradScaler does to gradients, with a scale of 1, which changes no bit of them. The gradients of a ResNet-8 of
    width 32 (31 tensors, 0.37 million numbers) take 42 us on one core of a Xeon; their norm takes 119 us.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))


def grad_scaler_state(scaler: torch.amp.GradScaler) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the tensors that hold a GradScaler's scale and growth count, None before its first use. 2.11, 2.14.1.

    Its public `state_dict()` turns them into numbers, for which the host has to wait for the device.
    """
    return scaler._scale, scaler._growth_tracker


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX). 2.11, 2.14.1.

    The public `torch.cpu.get_capabilities` is newer than 2.11.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_multiplies_float16() -> bool:
    """Return whether this CPU multiplies float16 in hardware, as oneDNN sees it. 2.11, 2.14.1."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def packet_of(operator: Any) -> Any:
    """Return the packet of an operator's overloads, the key of `torch.utils.flop_counter.flop_registry`. 2.11, 2.14.1."""
    return operator._overloadpacket


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator, which tells whether it returns a view of an argument. 2.11, 2.14.1."""
    return operator._schema


def storage_id(x: torch.Tensor) -> int:
    """Return a number that tensors share if they share their storage, with or without memory behind it. 2.11, 2.14.1."""
    return int(x.untyped_storage()._cdata)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return scaled dot-product attention by the fused operator, which the roofline model counts as one. 2.11, 2.14.1."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out
