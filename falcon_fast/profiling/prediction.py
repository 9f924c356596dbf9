"""Predict the step of a configuration on a GPU, without the GPU and without data: a model, not a measurement.

The network is the sum of its operators (`roofline`), the loss is what its planner's cost model says
(`kernels/gpu/loss/cost.py`); both use the rates in `kernels/gpu/devices.py`. A few round estimates are added to the roofline:

- An operator's product reaches PRODUCT of the rate of a large square product, a convolution CONVOLUTION of it, and memory traffic
  BANDWIDTH of the rate of a plain copy. This was compared with published training throughputs in 16 bits, which use one view
  per image where FALCON uses two. ResNet-50 at 224 px on an A100: 2,470 images/s published (NVIDIA DeepLearningExamples), 2,410
  predicted without per-view BatchNorm. A compiled ViT-S, batch size 256, on an H100: 7,716 images/s published (nvSubquadratic),
  8,270 predicted for ViT-S/16.
- TF32 products run at half the rate of 16-bit products.
- The host issues an operator in CALL_SECONDS, and a kernel of a compiled graph in COMPILED_CALL_SECONDS. The network takes as
  long as the slower of host and device.
- The photometric stage reads and writes each view PASSES times in float32. The optimizer reads or writes each number once.
- DDP's all-reduce moves 2 (W - 1) / W times the gradients' bytes at the device's `all_reduce` rate. It overlaps with the backward
  pass, except for its last bucket. An all-reduce of a few bytes takes ALL_REDUCE_LATENCY.

Waiting for data is not predicted: how fast files are decoded depends on the machine around the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from falcon_fast.config import Config, nearest
from falcon_fast.errors import UsageError
from falcon_fast.hardware.flops import step_flops
from falcon_fast.kernels.gpu.devices import ALL_REDUCE_LATENCY, CALL_SECONDS, COMPILED_CALL_SECONDS, DEVICES, Device
from falcon_fast.kernels.torch_private import BatchNormBase as _BatchNorm
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_network
from falcon_fast.objective import planner
from falcon_fast.profiling.roofline import Rates, fused, trace

PRODUCT, CONVOLUTION, BANDWIDTH = 0.8, 0.5, 0.8
PASSES = 6
BUCKET = 25 * 2**20  # bytes, DDP's default

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1}
VIEW_SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "svhn": 32}  # pixels, if data.size is 0; other sources 224


class Prediction(NamedTuple):
    """A predicted step.

    Attributes:
        gpu, gpus: the GPU's name, and the number of GPUs.
        images: images per step, over all GPUs.
        size: side of a view, pixels.
        phases: seconds of a step by phase, as in `profiling.phases`; `launch` is the time in which the device waits for the host.
        plan: the loss's plan.
        flop: FLOP of a step, over all GPUs.
        mfu: model FLOP utilisation, a share of the data sheet's rate of all GPUs.
        memory, capacity: bytes needed on one GPU, and the bytes it has.
        limit: what limits the step, in words.
    """

    gpu: str
    gpus: int
    images: int
    size: int
    phases: dict[str, float]
    plan: str
    flop: float
    mfu: float
    memory: float
    capacity: float
    limit: str

    @property
    def step(self) -> float:
        return sum(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, the step's time and its throughput, for JSON."""
        return self._asdict() | {"step_seconds": self.step, "images_per_second": self.images / self.step}


def predict(config: Config, gpu: str, gpus: int = 1) -> Prediction:
    """Predict the step of `config` on `gpus` GPUs in one machine. gpu: a100, h100 or h200.

    Raises:
        UsageError: the GPU is not in the table, the batch size does not divide, the strategy is FSDP2, or an operator of the
            network cannot be counted.
    """
    if gpu not in DEVICES:
        raise UsageError(f"there is no model of the GPU {gpu!r}: {nearest(gpu, DEVICES)}")
    training = config.training
    if training.batch_size % (gpus * training.accumulate):
        raise UsageError(
            f"batch size {training.batch_size} does not divide into {training.accumulate} micro-batches on each of {gpus} GPUs: "
            f"make it a multiple of {gpus * training.accumulate}"
        )
    if training.strategy == "fsdp":
        raise UsageError("FSDP2's communication cannot be predicted: leave out --strategy fsdp")
    device, sheet = DEVICES[gpu], DEVICES[gpu].sheet
    half = _autocast(config)
    size = config.data.size or VIEW_SIZES.get(config.data.source, 224)
    images = training.batch_size // gpus // training.accumulate
    network = per_view_batchnorm(build_network(config, size))
    try:
        traced = trace(network, 2 * images, size, half)
        flop = step_flops(config, network, size).total
    except Exception as error:  # anything that an operator raises because its tensors hold no numbers
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UsageError(f"the operators of {config.model.name} cannot be counted ({reason}): no prediction") from None
    operators = fused(traced.operators) if training.compile else traced.operators
    rates = _rates(config, device)

    forward = rates.total([x for x in operators if not x.backward])
    backward = rates.total([x for x in operators if x.backward])
    loss = _loss(config, images, device)
    parameters = sum(p.numel() for p in network.parameters())
    pixels = 2 * images * 3 * size * size
    micro = {
        "photometric": pixels * (1 + 4 * 2 * PASSES) / rates.bandwidth,
        "forward": forward.seconds,
        "loss": loss.seconds,
        "backward": backward.seconds,
    }
    calls = len(operators) * COMPILED_CALL_SECONDS if training.compile else traced.calls * CALL_SECONDS
    phases = {name: training.accumulate * seconds for name, seconds in micro.items()}
    phases["communication"] = _communication(network, 4 * parameters, phases["backward"], device, gpus, config)
    numbers = 3 + 2 * MOMENTS[config.optimizer.name] + (3 if config.optimizer.ema_decay else 0)
    phases["optimizer"] = 4 * numbers * parameters / rates.bandwidth
    busy = phases["forward"] + phases["backward"]
    phases["launch"] = 0.0 if training.cuda_graph else max(0.0, training.accumulate * calls - busy)

    held = 4 * parameters * (2 + MOMENTS[config.optimizer.name] + bool(config.optimizer.ema_decay))
    rate = sheet.half if half is not None else sheet.float32 if training.precision == "float32" else sheet.tf32
    return Prediction(
        gpu=device.name,
        gpus=gpus,
        images=training.batch_size,
        size=size,
        phases=phases,
        plan=loss.name,
        flop=flop,
        mfu=flop / sum(phases.values()) / (rate * gpus),
        memory=held + traced.kept + loss.peak + pixels * 5,
        capacity=sheet.memory,
        limit=_limit(
            phases,
            training.accumulate * (forward.compute + backward.compute),
            training.accumulate * (forward.memory + backward.memory),
            [*(["--cuda-graph"] if gpus == 1 else []), *([] if training.compile else ["--compile"]), "a larger batch"],
        ),
    )


def _autocast(config: Config) -> torch.dtype | None:
    """Return the dtype of autocast that `choose_precision` chooses on these GPUs, which support all precisions."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.training.precision)


def _rates(config: Config, device: Device) -> Rates:
    """Return a device's rates. As torch's switches are set, float32 convolutions use TF32 unless float32 is asked for, and matrix
    products use TF32 only if tf32 is asked for."""
    precision, reached = config.training.precision, device.reached
    tf32 = reached.half_products / 2
    return Rates(
        half=PRODUCT * reached.half_products,
        float32=PRODUCT * (tf32 if precision == "tf32" else reached.float_products),
        half_convolution=CONVOLUTION * reached.half_products,
        float32_convolution=CONVOLUTION * (reached.float_products if precision == "float32" else tf32),
        bandwidth=BANDWIDTH * reached.bandwidth,
    )


def _loss(config: Config, images: int, device: Device) -> planner.Candidate:
    """Return the loss's plan that the run would use."""
    loss = config.loss
    shape, budget = (images, loss.embedding_dim, loss.num_codes, loss.codes, device), loss.memory_budget * 2**20 or None
    found = {candidate.name: candidate for candidate in planner.candidates(*shape, budget)}
    if loss.implementation == "reference":
        return found["reference"]
    return found[loss.plan] if loss.plan in found else planner.choose(*shape, budget)


def _communication(network: nn.Module, size: int, backward: float, device: Device, gpus: int, config: Config) -> float:
    """Return the seconds that all-reduces add: of gradients of `size` bytes, of BatchNorm's statistics (forward and backward) and
    of the prior. backward: seconds of the backward pass over all micro-batches."""
    if gpus == 1:
        return 0.0
    factor = 2 * (gpus - 1) / gpus / device.reached.all_reduce
    hidden = backward / config.training.accumulate  # the last micro-batch's backward pass
    gradients = max(factor * size - hidden, factor * min(size, BUCKET)) + ALL_REDUCE_LATENCY
    layers = sum(isinstance(layer, _BatchNorm) for layer in network.modules())
    small = 2 * layers * config.training.sync_batchnorm + 2 * (config.loss.prior_scope == "global")
    return gradients + small * config.training.accumulate * ALL_REDUCE_LATENCY


def _limit(phases: dict[str, float], compute: float, memory: float, ways: list[str]) -> str:
    """Return what limits the largest part of the step, in words. ways: what helps if this is launches."""
    how = " or ".join(ways)
    parts = {
        f"launches: the host issues operators more slowly than the GPU executes them: use {how}": phases["launch"],
        "communication between the GPUs: use a larger batch on each GPU": phases["communication"],
        "the loss": phases["loss"],
        "compute: the network's matrix products and convolutions": compute,
        "memory bandwidth: the network's other operators": memory + phases["photometric"] + phases["optimizer"],
    }
    return max(parts, key=lambda name: parts[name])
