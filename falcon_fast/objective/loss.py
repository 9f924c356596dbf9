"""The public entry to the loss, `falcon_loss` and `FalconLoss`. It checks the arguments and calls one of the implementations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from falcon_fast.kernels import IMPLEMENTATIONS, loss_implementations, why_no_triton
from falcon_fast.kernels.cpu.loss import cpu_loss
from falcon_fast.kernels.spec import LossSpec
from falcon_fast.kernels.torch_private import is_transformed
from falcon_fast.objective.codes import Codes, HadamardCodes, RademacherCodes
from falcon_fast.objective.reference import PEAK_COPIES, reference_loss, without_autocast

PRIORS = ("reverse", "forward")
PLANS = ("auto", "stored", "streaming")
LARGEST_BETA = 1e8  # times a logit of 1e28 it is finite in float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FalconLossOutput(NamedTuple):
    """The result of `falcon_loss`: 0-d tensors on the device of the embeddings.

    Attributes:
        loss: prior + beta * invariance; differentiable once. The other three are for reading and carry no gradient.
        prior: divergence of the mean assignment from uniform, averaged over the two views.
        invariance: cross-entropy between the views' assignments, averaged over both directions, not weighted by beta.
        codes_used: int64, the number of distinct codes that are the argmax of at least one row in either view.
    """

    loss: torch.Tensor
    prior: torch.Tensor
    invariance: torch.Tensor
    codes_used: torch.Tensor


def falcon_loss(
    h1: torch.Tensor,
    h2: torch.Tensor,
    codes: Codes,
    tau: float,
    *,
    beta: float = 1.0,
    prior: str = "reverse",
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    plan: str = "auto",
    memory_budget: int | None = None,
) -> FalconLossOutput:
    """Compute the FALCON objective of a batch seen in two views (equations: `falcon_fast/objective/reference.py`).

    Args:
        h1, h2: embeddings (N, f) of the two views, N >= 1, of one float dtype and on one device, with any strides. float16 and
            bfloat16 embeddings are computed in float32; float32 and float64 embeddings in their own dtype. Either may need a
            gradient, or both may be the same tensor. Embeddings that are not finite give a loss that is not finite; so do
            float32 embeddings whose logits h . w / tau may be beyond 1e28 (`cpu`) or what the kernels resolve (`triton`).
        codes: the dictionary, on the same device.
        tau: the temperature of the run, positive (see `temperature`).
        beta: weight of the invariance term, from 0 to 1e8. (In float32 the prior is lost beside it from 1e7 on.)
        prior: `reverse`, KL(pbar || uniform), as in the published code; `forward`, KL(uniform || pbar), as in the first paper.
        group: None for this process alone. With a process group, the mean assignment and the codes in use are those of the whole
            group, where every process holds N rows. The gradient is then correct after the usual mean over the processes.
        implementation: `auto` takes the fastest for the device. Otherwise a name from the list of `falcon-fast info`. `reference`
            is the eager mathematics, which can be differentiated any number of times; `auto` takes it for float64, for GPUs older
            than sm_80, under the transforms of `torch.func` and in forward-mode differentiation. `cpu`
            (`kernels/cpu/loss.py`) and `triton` (`kernels/gpu/loss/loss.py`) form the gradient in the forward pass and keep no
            N x c matrix for the backward pass, which works once: with `create_graph=True` it raises RuntimeError.
        plan: what `cpu` and `triton` do with the N x c logits of a dense dictionary. `stored` keeps them once, in 2 bytes each.
            `streaming` computes them again in each of three sweeps (twice the arithmetic, no N x c memory at all). `auto` stores
            them if the budget allows it. Logits of Hadamard codes are always streamed. The reference accepts `auto` only.
        memory_budget: number of bytes beyond the inputs and the dictionary that forward and backward may hold at their peak.
            None: no limit, and `auto` stores the logits if everything together takes at most 256 MiB (`cpu`) or 4 GiB (`triton`).

    Returns:
        FalconLossOutput(loss, prior, invariance, codes_used).

    Raises:
        ValueError: if shapes, dtypes, devices or settings do not fit together, or if the budget cannot be kept.
        TypeError: if an argument is not what it should be at all.
    """
    _check_embeddings(h1, h2, codes)
    tau, beta = _number("tau", tau), _number("beta", beta)
    if memory_budget is not None:
        memory_budget = int(_number("memory_budget", memory_budget))
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"the temperature must be positive and finite, not {tau}")
    if not 0 <= beta <= LARGEST_BETA:
        raise ValueError(f"beta must be between 0 and {LARGEST_BETA:g}, not {beta}")
    if prior not in PRIORS:
        raise ValueError(f"unknown prior {prior!r}: choose one of {', '.join(PRIORS)}")
    if plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}: choose one of {', '.join(PLANS)}")
    implementation = _resolve(implementation, h1, h2)
    spec = LossSpec(
        c=codes.c,
        is_hadamard=isinstance(codes, HadamardCodes),
        tau=tau,
        beta=beta,
        prior=prior,
        group_name="" if group is None else group.group_name,
        plan=plan,
        memory_budget=memory_budget,
        with_gradient=torch.is_grad_enabled() and (h1.requires_grad or h2.requires_grad),
    )
    if implementation == "cpu":
        return FalconLossOutput(*cpu_loss(h1, h2, codes.words, spec))
    if implementation == "triton":
        from falcon_fast.kernels.gpu.loss.operator import triton_loss

        return FalconLossOutput(*triton_loss(h1, h2, codes.words, spec))
    if plan != "auto":
        raise ValueError(f"the reference implementation has no plan {plan!r}: choose auto, or another implementation")
    return _reference(h1, h2, codes, spec, group)


def _number(name: str, value: object) -> float:
    """Return a real number, also if it is a NumPy scalar or a 0-d tensor. Raises TypeError, with the argument's name, if not."""
    if isinstance(value, float):
        return value
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number without gradient: the loss is not differentiable in it")
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None


def _transformed(h: torch.Tensor) -> bool:
    """Return whether a transform of torch.func, or forward-mode differentiation, is at work on the embeddings."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed(h) or torch.autograd.forward_ad.unpack_dual(h).tangent is not None


def _resolve(implementation: str, h1: torch.Tensor, h2: torch.Tensor) -> str:
    """Return the implementation that computes the loss of the embeddings.

    Raises ValueError if the implementation does not exist or does not run on their device, in their dtype, or under what
    differentiates them.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}: choose auto or one of {', '.join(IMPLEMENTATIONS)}"
        )
    available = loss_implementations(h1.device)
    transformed = _transformed(h1) or _transformed(h2)
    if implementation == "auto":
        return "reference" if h1.dtype == torch.float64 or transformed else available[0]
    if implementation not in available:
        reason = f" ({why_no_triton(h1.device)})" if implementation == "triton" else ""
        raise ValueError(
            f"implementation {implementation!r} does not run on {h1.device}{reason}: choose auto or one of "
            f"{', '.join(available)}"
        )
    if implementation != "reference" and transformed:
        raise ValueError(
            f"implementation {implementation!r} does not run under torch.func or forward-mode differentiation: choose auto or "
            "reference"
        )
    if implementation != "reference" and h1.dtype == torch.float64:
        raise ValueError(
            f"implementation {implementation!r} computes in float32: choose auto or reference for float64 embeddings"
        )
    return implementation


def _reference(
    h1: torch.Tensor, h2: torch.Tensor, codes: Codes, spec: LossSpec, group: dist.ProcessGroup | None
) -> FalconLossOutput:
    dtype = h1.dtype if h1.dtype in (torch.float32, torch.float64) else torch.float32
    peak = PEAK_COPIES * h1.shape[0] * codes.c * dtype.itemsize
    if spec.memory_budget is not None and peak > spec.memory_budget:
        raise ValueError(
            f"the reference implementation needs about {peak / 2**20:.0f} MiB for N = {h1.shape[0]} and c = {codes.c}, more "
            f"than the budget of {spec.memory_budget / 2**20:.0f} MiB: raise it, or lower the batch or the number of codes"
        )
    with without_autocast(h1.device):  # logits reach ln(1/epsilon) sqrt(n): no half-precision product
        w = codes.dense(dtype)
        loss, *readings = reference_loss(h1.to(dtype), h2.to(dtype), w, spec.tau, spec.beta, spec.prior, group)
    return FalconLossOutput(loss, *(reading.detach() for reading in readings))


def _check_embeddings(h1: torch.Tensor, h2: torch.Tensor, codes: Codes) -> None:
    for name, h in (("h1", h1), ("h2", h2)):
        if not isinstance(h, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of embeddings (N, f), not {type(h).__name__}")
    if not isinstance(codes, RademacherCodes | HadamardCodes):
        raise TypeError(f"codes must be RademacherCodes or HadamardCodes, not {type(codes).__name__}")
    if h1.dim() != 2 or h1.shape != h2.shape:
        raise ValueError(
            f"embeddings must be two (N, f) matrices of one shape, not {tuple(h1.shape)} and {tuple(h2.shape)}"
        )
    if h1.dtype not in DTYPES or h1.dtype != h2.dtype:
        raise ValueError(
            "embeddings must have one floating-point dtype (float16, bfloat16, float32 or float64), not "
            f"{h1.dtype} and {h2.dtype}"
        )
    if h1.layout != torch.strided or h2.layout != torch.strided:
        raise ValueError(f"embeddings must be dense tensors, not {h1.layout} and {h2.layout}")
    if h1.shape[0] == 0:
        raise ValueError("embeddings hold no rows: the loss is a mean over a batch of at least one image")
    if h1.shape[1] != codes.f:
        raise ValueError(f"embeddings of width {h1.shape[1]} do not fit codes of width {codes.f}")
    if not h1.device == h2.device == codes.words.device:
        raise ValueError(f"embeddings and codes must share a device: {h1.device}, {h2.device}, {codes.words.device}")


class FalconLoss(nn.Module):
    """`falcon_loss` as a module that holds the dictionary and the settings: `FalconLoss(codes, tau)(h1, h2)`.

    The arguments are those of `falcon_loss`, and `forward` returns the same `FalconLossOutput`. The dictionary is a submodule, so
    `.to(device)` moves it; nothing of it is written to a state dict.
    """

    def __init__(
        self,
        codes: Codes,
        tau: float,
        *,
        beta: float = 1.0,
        prior: str = "reverse",
        group: dist.ProcessGroup | None = None,
        implementation: str = "auto",
        plan: str = "auto",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.codes = codes
        self.tau = tau
        self.beta = beta
        self.prior = prior
        self.group = group
        self.implementation = implementation
        self.plan = plan
        self.memory_budget = memory_budget

    def forward(self, h1: torch.Tensor, h2: torch.Tensor) -> FalconLossOutput:
        return falcon_loss(
            h1,
            h2,
            self.codes,
            self.tau,
            beta=self.beta,
            prior=self.prior,
            group=self.group,
            implementation=self.implementation,
            plan=self.plan,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, beta={self.beta:g}, prior={self.prior}, implementation={self.implementation}"
