"""In which precision a run multiplies: autocast, scaled gradients, TF32; and what a device makes of what was asked for.

Parameters, moments, reductions, embeddings and the loss are float32 in every one of them; fp16 and bf16 are of autocast alone,
and end where the projector begins. Its output is float32 and never bfloat16, whose embeddings alone cost the loss's gradient
5e-3 to 2e-2 (`FalconProjector`).
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
    """What a run does, in the words of `training.precision`, but for `auto`.

    Attributes:
        name: float32, tf32, bf16 or fp16, as the device can.
        asked: False where nobody asked, and torch's switches for float32 products stay as they are.
    """

    name: str = "float32"
    asked: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast; None without."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """For float16, whose gradients would vanish below 6e-8 unscaled; None for the others. Its state lies on `device`."""
        if self.name != "fp16":
            return None
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(torch.zeros((), device=device))  # makes the state, which a checkpoint may be about to fill
        return scaler

    @contextmanager
    def switches(self) -> Iterator[None]:
        """Inside, cuDNN tries its algorithms, once a shape; and float32 products and convolutions on a GPU are TF32 or are not,
        where that was asked for.

        Left alone, torch 2.11 to 2.14 takes the algorithm that a heuristic names, multiplies matrices in float32 and convolves in
        TF32.
        """
        asked = self.asked and self.name in ("float32", "tf32")
        # Not the newer torch.backends.*.fp32_precision: after it, whoever reads one of these gets a RuntimeError ("mix of the
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
    """The precision of a run on a device, and lines for the user where that is not what was asked for.

    A CPU multiplies bfloat16 and float16 only where it does so natively: emulated, both were slower than float32 (float16
    6 times, a convolution on two cores).
    """
    asked = config.precision
    option = f"--precision {asked}"
    if asked == "auto":
        asked, option = ("bf16", "--amp") if config.amp else ("float32", "")
    lacking = _lacking(asked, device)
    if lacking is not None:
        return Precision(), (f"{option}: {lacking}, training in float32",)
    notes: tuple[str, ...] = ()
    if asked == "bf16" and device.type == "cuda" and not _native_on_gpu():
        notes = (f"{option}: this GPU emulates bfloat16 products, --precision fp16 is faster",)
    return Precision(asked, asked=config.precision != "auto"), notes


def _lacking(name: str, device: torch.device) -> str | None:
    """Why a device does not multiply in this precision; None where it does."""
    if device.type == "cpu":
        if name == "tf32":
            return "TF32 is of NVIDIA GPUs from Ampere on"
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
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return cpu_multiplies_bfloat16()


def native_float16() -> bool:
    """Whether this CPU multiplies float16 in hardware (AVX-512 FP16, AMX FP16, or Arm's), as oneDNN sees it."""
    return cpu_multiplies_float16()
