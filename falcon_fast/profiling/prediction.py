"""The step of a configuration on a GPU that need not be there, with data that need not either: a model, not a measurement.

The network is its operators one after the other (`roofline`), the loss its planner's cost model
(`kernels/gpu/loss/cost.py`), whose devices' rates are used for both. What is added to a roofline are estimates, few and round:

- an operator's product reaches PRODUCT of the rate of a large square one, a convolution CONVOLUTION, traffic BANDWIDTH of a plain
  copy's. Set beside published training throughputs in 16 bits, one image where we have two views: ResNet-50 at 224 px on A100
  2,470 images/s (NVIDIA DeepLearningExamples), the model 2,410 without per-view BatchNorm; a ViT-S, compiled, batch 256, on H100
  7,716 (nvSubquadratic), the model 8,270 for ViT-S/16.
- TF32 multiplies at half the rate of 16 bits.
- the host issues an operator in CALL seconds, a kernel of a compiled graph in COMPILED_CALL; the network takes as long as the
  slower of host and device.
- the photometric stage reads and writes a view PASSES times in float32, and the optimiser each of its numbers once.
- DDP's all-reduce passes 2 (W - 1) / W of the gradients' bytes over links of LINK bytes/s, behind the backward pass but for its
  last bucket; an all-reduce of few bytes takes LATENCY.

No time is spent waiting for data: how fast files are decoded depends on the machine around the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from falcon_fast.config import Config, nearest
from falcon_fast.errors import UsageError
from falcon_fast.hardware.flops import step_flops
from falcon_fast.hardware.peaks import known_peak
from falcon_fast.kernels.torch_private import BatchNormBase as _BatchNorm
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_network
from falcon_fast.objective import planner
from falcon_fast.profiling.roofline import Rates, fused, trace

PRODUCT, CONVOLUTION, BANDWIDTH = 0.8, 0.5, 0.8
CALL, COMPILED_CALL = 8e-6, 2e-6
PASSES = 6
LINK = {"a100": 230e9, "h100": 370e9, "h200": 370e9}  # bus bandwidth of large all-reduces inside one machine, NVLink
LATENCY = 20e-6
BUCKET = 25 * 2**20  # bytes: DDP's own

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1}
VIEW_SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "svhn": 32}  # where data.size is 0; others 224


class Prediction(NamedTuple):
    """Seconds of a step by phase, as `training.phases` names them; `launch` is what the device waits for the host.

    images: of a step, over all processes.  memory: bytes on one GPU, of `capacity`.
    mfu: of the data sheet's rate.
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
        """For JSON: all of it, and what follows."""
        return self._asdict() | {"step_seconds": self.step, "images_per_second": self.images / self.step}


def predict(config: Config, gpu: str, gpus: int = 1) -> Prediction:
    """The step of `config` on `gpus` GPUs of a kind (a100, h100, h200) in one machine.

    Raises:
        UsageError: a kind without a model, or a batch that does not divide.
    """
    if gpu not in planner.DEVICES:
        raise UsageError(f"no model of a GPU {gpu!r}: {nearest(gpu, planner.DEVICES)}")
    training = config.training
    if training.batch_size % (gpus * training.accumulate):
        raise UsageError(
            f"batch size {training.batch_size} does not divide into {training.accumulate} micro-batches on each of {gpus} GPUs: "
            f"make it a multiple of {gpus * training.accumulate}"
        )
    if training.strategy == "fsdp":
        raise UsageError("there is no model of FSDP2's communication: leave out --strategy fsdp")
    device, peak = planner.DEVICES[gpu], known_peak(f"{gpu} 80gb")
    assert peak is not None
    half = _autocast(config)
    size = config.data.size or VIEW_SIZES.get(config.data.source, 224)
    images = training.batch_size // gpus // training.accumulate
    network = per_view_batchnorm(build_network(config, size))
    try:
        traced = trace(network, 2 * images, size, half)
        flop = step_flops(config, network, size).total
    except Exception as error:  # whatever an operator does that cannot work without numbers
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
    calls = len(operators) * COMPILED_CALL if training.compile else traced.calls * CALL
    phases = {name: training.accumulate * seconds for name, seconds in micro.items()}
    phases["communication"] = _communication(network, 4 * parameters, phases["backward"], gpu, gpus, config)
    numbers = 3 + 2 * MOMENTS[config.optimizer.name] + (3 if config.optimizer.ema_decay else 0)
    phases["optimizer"] = 4 * numbers * parameters / rates.bandwidth
    busy = phases["forward"] + phases["backward"]
    phases["launch"] = 0.0 if training.cuda_graph else max(0.0, training.accumulate * calls - busy)

    held = 4 * parameters * (2 + MOMENTS[config.optimizer.name] + bool(config.optimizer.ema_decay))
    rate = peak.half if half is not None else peak.float32 if training.precision == "float32" else peak.tf32
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
        capacity=peak.memory,
        limit=_limit(
            phases,
            training.accumulate * (forward.compute + backward.compute),
            training.accumulate * (forward.memory + backward.memory),
            [*(["--cuda-graph"] if gpus == 1 else []), *([] if training.compile else ["--compile"]), "a larger batch"],
        ),
    )


def _autocast(config: Config) -> torch.dtype | None:
    """What `choose_precision` takes on these GPUs, which have all of them."""
    name = config.training.precision
    name = ("bf16" if config.training.amp else "float32") if name == "auto" else name
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def _rates(config: Config, device: planner.Device) -> Rates:
    """Float32 convolutions are TF32 unless float32 is asked for, matrix products only where tf32 is (torch's switches)."""
    precision = config.training.precision
    tf32 = device.half_products / 2
    return Rates(
        half=PRODUCT * device.half_products,
        float32=PRODUCT * (tf32 if precision == "tf32" else device.float_products),
        half_convolution=CONVOLUTION * device.half_products,
        float32_convolution=CONVOLUTION * (device.float_products if precision == "float32" else tf32),
        bandwidth=BANDWIDTH * device.memory,
    )


def _loss(config: Config, images: int, device: planner.Device) -> planner.Candidate:
    """The plan that the run would take."""
    loss = config.loss
    shape, budget = (images, loss.embedding_dim, loss.num_codes, loss.codes, device), loss.memory_budget * 2**20 or None
    found = {candidate.name: candidate for candidate in planner.candidates(*shape, budget)}
    if loss.implementation == "reference":
        return found["reference"]
    return found[loss.plan] if loss.plan in found else planner.choose(*shape, budget)


def _communication(network: nn.Module, size: int, backward: float, gpu: str, gpus: int, config: Config) -> float:
    """Seconds that all-reduces add: gradients of `size` bytes, BatchNorm's statistics each way, the prior's."""
    if gpus == 1:
        return 0.0
    factor = 2 * (gpus - 1) / gpus / LINK[gpu]
    hidden = backward / config.training.accumulate  # the last micro-batch's
    gradients = max(factor * size - hidden, factor * min(size, BUCKET)) + LATENCY
    layers = sum(isinstance(layer, _BatchNorm) for layer in network.modules())
    small = 2 * layers * config.training.sync_batchnorm + 2 * (config.loss.prior_scope == "global")
    return gradients + small * config.training.accumulate * LATENCY


def _limit(phases: dict[str, float], compute: float, memory: float, ways: list[str]) -> str:
    """The largest of what the step's parts are bound by, in words. ways: out of being bound by launches."""
    how = " or ".join(ways)
    parts = {
        f"launches: the host issues operators more slowly than the GPU works: {how}": phases["launch"],
        "communication between the GPUs: a larger batch on each": phases["communication"],
        "the loss": phases["loss"],
        "compute: the network's matrix products and convolutions": compute,
        "memory bandwidth: the network's other operators": memory + phases["photometric"] + phases["optimizer"],
    }
    return max(parts, key=lambda name: parts[name])
