"""The projector: backbone features to embeddings that a code can be compared with."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from falcon_fast.kernels import why_no_triton
from falcon_fast.kernels.torch_private import process_group_named

ACTIVATIONS = ("tanh", "l2")
OUTPUT_DTYPES = (torch.float32, torch.float16)
IMPLEMENTATIONS = ("auto", "torch", "triton")


class FalconProjector(nn.Module):
    """Linear(in_features, f) -> BatchNorm1d(f) -> activation.

    Args:
        in_features: width of the backbone's features.
        f: width of an embedding, that of a code.
        activation: `tanh` (ICML version and published code), entries in (-1, 1); or `l2` (first version), rows of length
            sqrt(f / temperature_batch), so that a row on a code has the logit ln((1 - epsilon (c-1)) / epsilon).
        temperature_batch: the n of the temperature (see `temperature`). `l2` needs it; `tanh` does not depend on it.
        output_dtype: float32; or float16, half the bytes, which loses the loss nothing on a GPU (it rounds embeddings to float16
            there anyway). Their gradient is float16 too, and needs a GradScaler. Never bfloat16: its embeddings alone
            cost 5e-3 to 2e-2 of relative gradient error in the loss, more the sharper the softmax.
        implementation: `torch`, layer by layer; `triton`, all that follows the linear product in two or three kernels, and its
            gradient likewise, keeping only the product (`kernels/gpu/projector/`); `auto`, `triton` on GPUs from sm_80 on.

    `forward` takes features (N, in_features) of any float dtype and returns embeddings (N, f) in `output_dtype`, under autocast
    too. `torch` computes in float32 throughout. `triton` multiplies in float32 or, under autocast, in its dtype on the tensor
    cores, like the layers before it; the sums come out, and are normalised, in float32: a float16 x would round the deviations
    of a column with a large mean away, and overflow beyond 65504.

    Both keep what BatchNorm is: parameters and state dict of `linear` and `norm`, evaluation by running averages, statistics
    per view after `per_view_batchnorm`, and over a process group after `sync_batchnorm` (or torch's SyncBatchNorm). `triton`
    reads the two layers' settings without calling them, so their hooks do not run. In training the linear bias moves nothing
    but the running mean, and its gradient is exactly zero with `triton` (rounding errors with `torch`).

    Raises:
        ValueError: an argument out of range, an unknown activation, dtype or implementation, `l2` without `temperature_batch`;
            in `forward`, a batch that BatchNorm cannot train on, or `triton` where it does not run.
    """

    def __init__(
        self,
        in_features: int,
        f: int,
        activation: str = "tanh",
        temperature_batch: int | None = None,
        *,
        output_dtype: torch.dtype = torch.float32,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        if in_features < 1 or f < 1:
            raise ValueError(f"a projector needs positive widths, not {in_features} -> {f}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if activation == "l2" and (temperature_batch is None or temperature_batch < 1):
            raise ValueError(
                "the l2 projector scales its rows by sqrt(f / temperature_batch): give temperature_batch >= 1"
            )
        if output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"embeddings come in float32 or float16, not {output_dtype}")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
        self.linear = nn.Linear(in_features, f)
        self.norm = nn.BatchNorm1d(f)
        self.activation = activation
        self.row_norm = math.sqrt(f / temperature_batch) if activation == "l2" and temperature_batch else None
        self.output_dtype = output_dtype
        self.implementation = implementation

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self._runs_triton(features):
            return self._triton(features)
        with torch.autocast(features.device.type, enabled=False):
            x = self.norm(self.linear(features.float()))
            h = torch.tanh(x) if self.row_norm is None else F.normalize(x, dim=1) * self.row_norm
            return h.to(self.output_dtype)

    def _runs_triton(self, features: torch.Tensor) -> bool:
        """Whether the kernels compute for these features; ValueError where `triton` is asked for and cannot."""
        if self.implementation == "torch" or (self.implementation == "auto" and features.device.type != "cuda"):
            return False
        reason = why_no_triton(features.device) or self._why_not_fused()
        if reason is not None and self.implementation == "triton":
            raise ValueError(
                f"the projector's implementation 'triton' does not run on {features.device} ({reason}): choose auto or torch"
            )
        return reason is None and features.shape[0] > 0

    def _why_not_fused(self) -> str | None:
        """What is not as `__init__` made it and the kernels do not know; None where they do."""
        if not isinstance(self.norm, (nn.BatchNorm1d, nn.SyncBatchNorm)) or not self.norm.affine:
            return "norm is no BatchNorm with scale and shift"
        if self.linear.bias is None:
            return "linear has no bias"
        if not self.linear.weight.dtype == self.norm.weight.dtype == torch.float32:
            return "parameters are not float32"
        return None

    def _triton(self, features: torch.Tensor) -> torch.Tensor:
        from falcon_fast.kernels.gpu.projector.operator import Averages, triton_projector

        norm, device = self.norm, features.device.type
        averages = None
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            averages = Averages(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
        batch = norm.training or averages is None
        if batch and not (norm.training and norm.track_running_stats):
            averages = None
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return triton_projector(
            features,
            self.linear.weight,
            self.linear.bias,
            norm.weight,
            norm.bias,
            views=getattr(norm, "num_views", 1) if norm.training else 1,
            batch=batch,
            averages=averages,
            eps=norm.eps,
            row_norm=self.row_norm,
            dtype=self.output_dtype,
            product_dtype=product_dtype,
            group=self._group(),
        )

    def _group(self) -> dist.ProcessGroup | None:
        """The processes that share statistics in training: those of `sync_batchnorm`, or of torch's SyncBatchNorm."""
        if not (self.norm.training and dist.is_available() and dist.is_initialized()):
            return None
        name = getattr(self.norm, "group_name", None)
        if name is not None:
            group: dist.ProcessGroup | None = process_group_named(name)
        elif isinstance(self.norm, nn.SyncBatchNorm):
            group = self.norm.process_group or dist.group.WORLD
        else:
            group = None
        return group if group is not None and dist.get_world_size(group) > 1 else None

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
