"""Choose the photometric stage of a run: C++ on a CPU, compiled on a GPU, Triton, or the eager reference.

For their times in microseconds per view on two threads, see benchmarks/results/bench_data.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from falcon_fast.data.sources.decoding import reason_of
from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.data.views.photometric import PhotometricTensors, augment
from falcon_fast.data.views.photometric_compiled import fused
from falcon_fast.errors import UsageError
from falcon_fast.kernels import why_no_extension, why_no_triton

CPU = torch.device("cpu")

# (images, parameters, mean, std) -> normalised views, as `photometric.augment` with the recipe bound.
Photometric = Callable[[Tensor, PhotometricTensors, Tensor, Tensor], Tensor]


def photometric_stage(
    augmentation: Augmentation,
    mode: str,
    say: Callable[[str], None] = lambda line: None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Photometric:
    """Return the photometric stage of a run on `device`.

    Args:
        augmentation: the recipe.
        mode: `eager`, `cpu` (C++), `compiled`, `triton`, or `auto`. On a CPU `auto` takes C++, or eager if the C++ kernels were
            not built; on another device it takes compiled, or eager if compiling fails. `say` receives a line if eager is the
            replacement.
        say: receives one line for the user.
        device: where the views are.
        dtype: the dtype that the network computes in. Triton makes views in it, C++ if it is float32 or bfloat16; the other
            stages always make float32.

    Raises:
        UsageError: mode is `triton` or `cpu` and does not run on the device. If mode is `compiled` or `triton`, also when the
            stage is first called, if there is no working compiler.
    """
    if mode == "triton" and (reason := why_no_triton(device)):
        raise UsageError(f"data.photometric=triton does not work here ({reason}): set data.photometric=auto")
    if mode == "cpu" and (reason := _why_no_cpp(device)):
        raise UsageError(f"data.photometric=cpu does not work here ({reason}): set data.photometric=auto")

    def eager(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        return augment(images, parameters, mean, std, augmentation)

    if mode == "eager":
        return eager
    if mode == "cpu" or (mode == "auto" and device.type == "cpu"):
        if reason := _why_no_cpp(device):
            say(f"the augmentations run in PyTorch, more slowly: {reason}")
            return eager
        return cpu_stage(augmentation, dtype)
    # `auto` does not choose the Triton stage until it has been timed on a GPU.
    stage = triton_stage(augmentation, dtype) if mode == "triton" else compiled_stage(augmentation)
    chosen: list[Photometric] = []

    def first(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        if chosen:
            return chosen[0](images, parameters, mean, std)
        try:
            views = stage(images, parameters, mean, std)
        except Exception as error:  # a compiler may raise anything, most often because there is no g++
            reason = reason_of(error)[:300]
            if mode in ("compiled", "triton"):
                raise UsageError(
                    f"the augmentations cannot be compiled ({reason}): set data.photometric=eager"
                ) from None
            say(f"the augmentations cannot be compiled ({reason}): they run uncompiled, more slowly")
            chosen.append(eager)
            return eager(images, parameters, mean, std)
        chosen.append(stage)
        return views

    return first


def _why_no_cpp(device: torch.device) -> str | None:
    """Return why the C++ stage does not run on this device; None if it does."""
    if device.type != "cpu":
        return "it needs the CPU"
    return why_no_extension()


def cpu_stage(augmentation: Augmentation, dtype: torch.dtype) -> Photometric:
    """Return the C++ stage: (N, 3, H, W), channels_last, in bfloat16 if that is `dtype`, else in float32."""
    from falcon_fast.kernels.cpu.views import augment_views_cpp

    a = augmentation
    max_sigma = a.blur_sigma[1] if max(a.blur_probability) > 0 else 0.0
    made = dtype if dtype == torch.bfloat16 else torch.float32

    def stage(images: Tensor, p: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        threshold = a.solarize_threshold / 255
        return augment_views_cpp(
            images, p.factors, p.order, p.gray, p.sigma, p.solarize, mean, std, max_sigma, threshold, made
        )

    return stage


def compiled_stage(augmentation: Augmentation) -> Photometric:
    """Return the stage made by torch's compiler: float32 (N, 3, H, W), channels_last."""
    compiled = torch.compile(fused, fullgraph=True, dynamic=False)

    def stage(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        return compiled(images, parameters, mean, std, augmentation).contiguous(memory_format=torch.channels_last)

    return stage


def triton_stage(augmentation: Augmentation, dtype: torch.dtype) -> Photometric:
    """Return the Triton stage: (N, 3, H, W) in `dtype`, channels_last, in one to three launches."""
    from falcon_fast.kernels.gpu.views.augmentation import Recipe, augment_views_triton

    a = augmentation
    jitter = a.jitter_probability > 0
    recipe = Recipe(
        operations=(
            jitter and a.brightness > 0,
            jitter and a.contrast > 0,
            jitter and a.saturation > 0,
            jitter and a.hue > 0,
        ),
        gray=a.gray_probability > 0,
        max_sigma=a.blur_sigma[1] if max(a.blur_probability) > 0 else 0.0,
        solarize=max(a.solarize_probability) > 0,
        threshold=a.solarize_threshold / 255,
    )

    def stage(images: Tensor, p: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        return augment_views_triton(images, p.factors, p.order, p.gray, p.sigma, p.solarize, mean, std, recipe, dtype)

    return stage
