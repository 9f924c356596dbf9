"""The precision of a run's products: autocast, scaled gradients, TF32; and what a device supports of what was asked for.

Parameters, moments, reductions, embeddings and the loss are float32 in all of them. fp16 and bf16 apply to autocast only, which
ends where the projector begins. The projector's output is float32 and never bfloat16: bfloat16 embeddings alone give the loss's
gradient an error of 5e-3 to 2e-2 (`FalconProjector`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from falcon_fast.config import TrainingConfig
from falcon_fast.kernels.torch_private import cpu_multiplies_bfloat16, cpu_multiplies_float16


@dataclass(frozen=True)
class Precision:
    """The precision that a run uses: one of the values of `training.precision` except `auto`.

    Attributes:
        name: float32, tf32, bf16 or fp16, as the device supports it.
        asked: False if no precision was asked for; torch's switches for float32 products then stay as they are.
    """

    name: str = "float32"
    asked: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast; None without autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """Return the gradient scaler for float16, whose unscaled gradients below 6e-8 would vanish; None for other precisions.

        Its state is on `device`.
        """
        if self.name != "fp16":
            return None
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(torch.zeros((), device=device))  # creates the state, which a checkpoint may restore
        return scaler

    @contextmanager
    def switches(self) -> Iterator[None]:
        """Set torch's switches for the time of the context, and restore them afterwards.

        cuDNN tries its algorithms once for each shape. If float32 or tf32 was asked for, products and convolutions on a GPU use
        exactly that. Without these switches torch 2.11 to 2.14 lets a heuristic choose the algorithm, multiplies matrices in
        float32 and computes convolutions in TF32.
        """
        asked = self.asked and self.name in ("float32", "tf32")
        # Not the newer torch.backends.*.fp32_precision: after it is set, reading one of these raises a RuntimeError ("mix of the
        # legacy and new APIs").
        cudnn = torch.backends.cudnn
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
        cudnn.benchmark = True
        if asked:
            torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
            cudnn.allow_tf32 = self.name == "tf32"
        try:
            yield
        finally:
            cudnn.benchmark = before[2]
            if asked:
                torch.set_float32_matmul_precision(before[0])
                cudnn.allow_tf32 = before[1]

    def __str__(self) -> str:
        autocast = {"bf16": "bfloat16 autocast", "fp16": "float16 autocast with scaled gradients"}
        return autocast.get(self.name, self.name)


def choose_precision(config: TrainingConfig, device: torch.device) -> tuple[Precision, tuple[str, ...]]:
    """Return the precision of a run on a device, and a line for the user if this is not what was asked for.

    On a CPU bfloat16 and float16 are used only if the CPU supports them natively: emulated, both were slower than float32
    (float16 by a factor of 6, for a convolution on two cores).
    """
    asked = "float32" if config.precision == "auto" else config.precision
    option = "--amp (--precision bf16)" if asked == "bf16" else f"--precision {asked}"
    lacking = _lacking(asked, device)
    if lacking is not None:
        return Precision(), (f"{option}: {lacking}, training in float32",)
    notes: tuple[str, ...] = ()
    if asked == "bf16" and device.type == "cuda" and not _native_on_gpu():
        notes = (f"{option}: this GPU emulates bfloat16 products, --precision fp16 is faster",)
    return Precision(asked, asked=config.precision != "auto"), notes


def _lacking(name: str, device: torch.device) -> str | None:
    """Return the reason why a device does not support a precision; None if it does."""
    if device.type == "cpu":
        if name == "tf32":
            return "TF32 needs an NVIDIA GPU, Ampere or newer"
        if name == "bf16" and not native_bfloat16():
            return "this CPU has no native bfloat16 products"
        if name == "fp16" and not native_float16():
            return "this CPU has no native float16 products"
    elif name == "tf32" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than Ampere and has no TF32"
    return None


def _native_on_gpu() -> bool:
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def native_bfloat16() -> bool:
    """Check whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return cpu_multiplies_bfloat16()


def native_float16() -> bool:
    """Check whether this CPU multiplies float16 in hardware (AVX-512 FP16, AMX FP16 or Arm's), according to oneDNN."""
    return cpu_multiplies_float16()
