"""The projector: maps the features of the backbone to embeddings that can be compared with codes."""

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
        f: width of the embeddings and of the codes.
        activation: `tanh` (ICML version and published code), entries in (-1, 1); or `l2` (first version), rows of length
            sqrt(f / temperature_batch), so that a row on a code has the logit ln((1 - epsilon (c-1)) / epsilon).
        temperature_batch: batch size in the temperature formula (see `temperature`). `l2` needs it; `tanh` does not depend on it.
        output_dtype: float32; or float16, which takes half the bytes and costs the loss no accuracy on a GPU (there it rounds
            embeddings to float16 anyway). The gradient of the embeddings is then float16 too, and needs a GradScaler. bfloat16 is
            not offered: it alone causes a relative gradient error of 5e-3 to 2e-2 in the loss, more for a sharper softmax.
        implementation: `torch` computes layer by layer. `triton` computes everything after the linear product in two or three
            kernels, and its gradient likewise, and keeps only the product (`kernels/gpu/projector/`). `auto` takes `triton` on
            GPUs from sm_80 on.

    `forward` takes features (N, in_features) of any float dtype and returns embeddings (N, f) in `output_dtype`, also under
    autocast. `torch` computes in float32 throughout, also if its parameters are float16 or bfloat16 (`.half()`), or in float64 if
    they are float64; then the embeddings are float64 too. `triton` multiplies in float32 or, under autocast, in the autocast
    dtype on the tensor cores, like the layers before it. Its sums are float32 and are normalised in float32: a float16 x would
    lose the deviations of a column with a large mean, and would overflow beyond 65504.

    Both behave as BatchNorm does: `linear` and `norm` have the usual parameters and state dict; evaluation uses the running
    averages; statistics are per view after `per_view_batchnorm`, and over a process group after `sync_batchnorm` (or with torch's
    SyncBatchNorm). `triton` reads the settings of the two layers without calling them, so their hooks do not run. In training the
    linear bias changes only the running mean; its gradient is exactly zero with `triton`, and rounding errors with `torch`.

    Raises:
        ValueError: if an argument is out of range, if the activation, dtype or implementation is unknown, or if `l2` has no
            `temperature_batch`; in `forward`, if the features do not fit, if BatchNorm cannot train on the batch, or if
            `triton` does not run there.
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
        self._check(features)
        if self._runs_triton(features):
            return self._triton(features)
        wide = torch.float64 if self.linear.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(features.device.type, enabled=False):
            x = _in_dtype(self.norm, _in_dtype(self.linear, features.to(wide)))
            h = torch.tanh(x) if self.row_norm is None else F.normalize(x, dim=1) * self.row_norm
            return h if wide == torch.float64 else h.to(self.output_dtype)

    def _check(self, features: torch.Tensor) -> None:
        """Raise ValueError if the features are not a matrix of floats of the right width on the projector's device."""
        weight = self.linear.weight
        if features.dim() != 2 or features.shape[1] != self.linear.in_features:
            raise ValueError(f"features must be a matrix (N, {self.linear.in_features}), not {tuple(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"features must have a floating-point dtype, not {features.dtype}")
        if features.device != weight.device:
            raise ValueError(
                f"features are on {features.device}, but the projector is on {weight.device}: move one of them"
            )

    def _runs_triton(self, features: torch.Tensor) -> bool:
        """Return whether the kernels are used for these features. Raises ValueError if `triton` was asked for and cannot run."""
        if self.implementation == "torch" or (self.implementation == "auto" and features.device.type != "cuda"):
            return False
        reason = why_no_triton(features.device) or self._why_not_fused()
        if reason is not None and self.implementation == "triton":
            raise ValueError(
                f"the projector's implementation 'triton' does not run on {features.device} ({reason}): choose auto or torch"
            )
        return reason is None and features.shape[0] > 0

    def _why_not_fused(self) -> str | None:
        """Return what was changed after `__init__` in a way that the kernels do not support, or None."""
        if not isinstance(self.norm, (nn.BatchNorm1d, nn.SyncBatchNorm)) or not self.norm.affine:
            return "norm is not a BatchNorm with scale and shift"
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
        """Return the processes that share statistics in training (by `sync_batchnorm` or torch's SyncBatchNorm), or None."""
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


def _in_dtype(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `layer(x)`, computed in the dtype of `x` with the layer's parameters and buffers cast to it.

    Buffers that the layer changes (running averages) are changed in their own dtype.
    """
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    cast = {name: t.to(x.dtype) for name, t in tensors.items() if t.is_floating_point() and t.dtype != x.dtype}
    if not cast:
        result: torch.Tensor = layer(x)
        return result
    result = torch.func.functional_call(layer, cast, (x,))
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            if name in cast:
                buffer.copy_(cast[name])
    return result
