"""The optimisers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from falcon_fast.config import OptimizerConfig


class Rate(NamedTuple):
    """Where the schedule is: every parameter group's learning rate lies at `share` of the way from `floor` to its peak.

    Both are numbers, or 0-d tensors on the device where the step is captured as a CUDA graph.
    """

    share: float | torch.Tensor
    floor: float | torch.Tensor = 0.0

    def of(self, peak: float) -> Any:
        """Return the learning rate of a group with this peak, as a number or a 0-d tensor."""
        return self.floor + self.share * (peak - self.floor)


def rate_at(step: int, total_steps: int, warmup_steps: int, warmup_lr: float) -> Rate:
    """Return the rate of optimisation step `step` (from 0).

    Every group rises linearly from the same `warmup_lr` to its own peak in `warmup_steps` steps, as in the published code, then
    falls along a half cosine to 0 at the end.
    """
    if step < warmup_steps:
        return Rate(step / warmup_steps, warmup_lr)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return Rate(0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(
    config: OptimizerConfig, network: nn.Module, probe: nn.Module | None, probe_lr: float
) -> torch.optim.Optimizer:
    """Return Adam (L2 weight decay), AdamW (decoupled weight decay), SGD or LARS for the network and the online probe.

    The parameter groups have `peak_lr`, which the schedule turns into the rate of a step (`Rate.of`). The probe is in a group
    without weight decay. With `exclude_bias_and_norm`, biases, norms and the parameters that the backbone itself names (a ViT's
    position embedding) are in another group without weight decay.

    LARS (You, Gitman and Ginsburg 2017, https://arxiv.org/abs/1708.03888) is SGD with momentum in which the gradient of each
    layer, weight decay included, is scaled to 1e-3 of the norm of its weights. As in SimCLR and BYOL, biases and norms are
    neither scaled nor decayed, whatever `exclude_bias_and_norm` says, and neither is the probe.
    """
    groups = _groups(config, network)
    if probe is not None:
        groups.append({"params": list(probe.parameters()), "peak_lr": probe_lr, "weight_decay": 0.0})
    if config.name == "lars":
        return _with_momentum(_lars(config, groups))
    # fused: one pass over all parameters instead of a dozen (ResNet-8 on two cores: 1.0 ms for a step instead of 3.4 ms)
    if config.name == "sgd":
        # Sharded parameters need foreach: "aten._fused_sgd_ does not have a sharding strategy registered".
        sharded = any(isinstance(p, DTensor) for p in network.parameters())
        implementation = {"foreach": True} if sharded else {"fused": True}
        return _with_momentum(torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, **implementation))
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give each parameter a momentum of zero, from which the first step does the same as without one. Returns the optimiser.

    Without it the first step creates the momentum: also a step that is skipped because its gradient is not finite. The momentum
    is then NaN, or with torch's fused SGD memory that is not initialised.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def _groups(config: OptimizerConfig, network: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters of the network in one group, or in two: with and without weight decay."""
    if not (config.exclude_bias_and_norm or config.name == "lars"):
        return [{"params": list(network.parameters()), "peak_lr": config.lr, "weight_decay": config.weight_decay}]
    # The same parameters are excluded as by timm's param_groups_weight_decay. That function is not used, because it makes only
    # one group where the decay is 0, and because the order of its arguments differs between releases.
    named = {
        f"{prefix}.{name}"
        for prefix, module in network.named_children()
        for name in getattr(module, "no_weight_decay", set)()
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        plain = parameter.dim() > 1 and not name.endswith(".bias") and name not in named
        (decayed if plain else kept).append(parameter)
    return [
        {"params": decayed, "peak_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": kept, "peak_lr": config.lr, "weight_decay": 0.0},
    ]


def _lars(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return timm's LARS. It takes plain and sharded tensors (the norm of a DTensor is that of the whole tensor), and never waits
    for the device.
    """
    from timm.optim import Lars

    groups[0]["always_adapt"] = True  # also without weight decay
    # On a CPU timm chooses: with foreach, 22 million parameters took 435 ms instead of 39 ms (new memory for each gradient), but
    # 0.3 million took 0.9 ms instead of 1.9 ms. On a GPU foreach is always used, if this release of timm has it.
    on_gpu = all(p.is_cuda for group in groups for p in group["params"])
    options = {"foreach": True} if on_gpu and "foreach" in inspect.signature(Lars).parameters else {}
    return Lars(groups, lr=config.lr, momentum=config.momentum, **options)
