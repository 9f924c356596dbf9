"""Predicted steps: properties that hold without a device, hand-computed phases, and the published throughputs."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_fast.config import Config, load_recipe, override, recipe_names, validate
from falcon_fast.errors import UsageError
from falcon_fast.hardware.flops import step_flops
from falcon_fast.kernels.gpu.devices import DEVICES
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_network
from falcon_fast.profiling import prediction
from falcon_fast.profiling.prediction import predict
from falcon_fast.profiling.roofline import fused, trace


@pytest.fixture(autouse=True)
def _built_once(monkeypatch):
    """Most of a prediction's time is the network's initial weights, which it does not look at."""
    monkeypatch.setattr(prediction, "build_network", lambda config, size: _network(config.model, config.loss, size))


@functools.cache
def _network(model, loss, size):
    return build_network(Config(model=model, loss=loss), size)


def configured(recipe: str, **changes):
    return validate(override(load_recipe(recipe), {k.replace("__", "."): v for k, v in changes.items()}))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_on_every_gpu_newer_is_not_slower(recipe):
    found = [predict(configured(recipe, training__precision="bf16"), gpu) for gpu in DEVICES]
    for one in found:
        assert all(math.isfinite(seconds) and seconds >= 0 for seconds in one.phases.values())
        assert 0 < one.mfu < 1 and 0 < one.memory < one.capacity
        assert json.loads(json.dumps(one.as_dict()))["images_per_second"] == one.images / one.step
    assert found[0].step > found[1].step >= found[2].step
    assert found[0].flop == found[1].flop


def test_more_work_takes_longer_and_more_gpus_less():
    base = predict(configured("digits", training__precision="bf16", training__batch_size=4096), "a100")
    for changes in ({"loss__num_codes": 262144}, {"training__batch_size": 8192}, {"training__accumulate": 4}):
        settings = {"training__precision": "bf16", "training__batch_size": 4096} | changes
        assert predict(configured("digits", **settings), "a100").step > base.step
    four = predict(configured("digits", training__precision="bf16", training__batch_size=4096), "a100", 4)
    assert base.step / 4 < four.step < base.step
    assert four.phases["communication"] > 0 == base.phases["communication"]
    smaller = predict(
        configured("digits", training__precision="bf16", training__batch_size=4096, training__accumulate=4), "a100"
    )
    assert smaller.memory < base.memory


def test_precision_and_compilation_are_the_runs():
    def step(**changes):
        return predict(configured("cifar10", training__batch_size=512, **changes), "a100")

    full, tf32, half = (
        step(training__precision="float32"),
        step(training__precision="tf32"),
        step(training__precision="bf16"),
    )
    assert full.step > step().step >= tf32.step > half.step  # if no precision is asked for, convolutions use TF32
    assert step(training__precision="bf16", training__compile=True).step < half.step
    assert half.memory < full.memory


def test_the_plan_is_the_one_that_the_run_would_take():
    assert predict(configured("digits", loss__plan="streaming"), "h100").plan == "streaming"
    assert predict(configured("digits", loss__implementation="reference"), "h100").plan == "reference"
    assert predict(configured("digits", loss__codes="hadamard"), "h100").plan == "hadamard"


def test_what_cannot_be_predicted_is_said(monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'h100'"):
        predict(configured("digits"), "h10")
    with pytest.raises(UsageError, match="multiple of 3"):
        predict(configured("digits"), "h100", 3)
    with pytest.raises(UsageError, match="FSDP2"):
        predict(configured("digits", training__strategy="fsdp"), "h100")

    def failing(*arguments):
        raise NotImplementedError("aten::strange\nhas no shape")

    monkeypatch.setattr(prediction, "trace", failing)
    with pytest.raises(UsageError, match=r"operators of resnet8 cannot be counted \(aten::strange\)"):
        predict(configured("digits"), "h100")


@pytest.mark.parametrize(
    ("model", "gpu", "compiled", "published"),
    [
        ("resnet50", "a100", False, 2470),  # NVIDIA DeepLearningExamples, resnet50v1.5, AMP
        ("vit_small_patch16_224", "h100", True, 7716),  # nvSubquadratic's benchmarks, a ViT-S, batch 256
    ],
)
def test_the_estimates_are_near_what_was_published(model, gpu, compiled, published):
    config = configured("imagenet100", model__name=model, training__precision="bf16")
    operators = trace(build_network(config, 224), 256, 224, torch.bfloat16).operators  # one view, plain BatchNorm
    rates = prediction._rates(config, DEVICES[gpu])
    assert 256 / rates.total(fused(operators) if compiled else operators).seconds == pytest.approx(published, rel=0.15)


# ---- hand-computed phases of the digits recipe on A100s: 64 images of 16 px, AdamW, float32 ---------------------------

PARAMETERS = 340_896  # ResNet-8 of width 32 and a projector 128 -> 256, in float32
LAYERS = 10  # with BatchNorm, the projector's included
COPY = 0.8 * 1.7e12  # bytes/s


def test_the_photometric_stage_passes_six_times_over_the_views():
    views = 2 * 64 * 3 * 16 * 16
    read = views  # uint8, once
    passes = 6 * (4 * views + 4 * views)  # read and written in float32
    found = predict(configured("digits"), "a100").phases["photometric"]
    assert found == pytest.approx((read + passes) / COPY, rel=1e-9)


def test_the_optimizer_moves_each_number_once():
    """AdamW reads weight, gradient and two moments, and writes weight and moments; an average is read twice and written."""
    found = predict(configured("digits"), "a100").phases["optimizer"]
    assert found == pytest.approx(7 * 4 * PARAMETERS / COPY, rel=1e-9)
    averaged = predict(configured("digits", optimizer__ema_decay=0.9), "a100").phases["optimizer"]
    assert averaged == pytest.approx(10 * 4 * PARAMETERS / COPY, rel=1e-9)


@pytest.mark.parametrize(("gpu", "bandwidth"), [("a100", 230e9), ("h100", 370e9), ("h200", 370e9)])
@pytest.mark.parametrize("gpus", [2, 4])
def test_an_all_reduce_passes_over_the_links(gpu, bandwidth, gpus):
    """The gradients are one bucket, which nothing hides; each BatchNorm layer and the prior take two small all-reduces."""
    gradients = 2 * (gpus - 1) / gpus * 4 * PARAMETERS / bandwidth
    latencies = 20e-6 * (1 + 2 * LAYERS + 2)
    found = predict(configured("digits"), gpu, gpus).phases["communication"]
    assert found == pytest.approx(gradients + latencies, rel=1e-9)
    alone = predict(configured("digits", training__sync_batchnorm=False, loss__prior_scope="local"), gpu, gpus)
    assert alone.phases["communication"] == pytest.approx(gradients + 20e-6, rel=1e-9)


class Calls(TorchDispatchMode):
    """Counts the operators that are called on real tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace != "prim"
        return func(*args, **(kwargs or {}))


def test_the_host_takes_eight_microseconds_a_call():
    config = configured("digits", training__batch_size=4)
    network = per_view_batchnorm(build_network(config, 16)).train()
    views = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    with Calls() as calls:
        _, embeddings = network(views)
        embeddings.backward(torch.ones_like(embeddings))
    calls.count -= 1  # ones_like
    found = predict(config, "a100")
    busy = found.phases["forward"] + found.phases["backward"]
    assert found.phases["launch"] > 0
    # The prediction's count is a fifth higher: it includes a detach for each tensor saved for the backward pass.
    assert 1 <= (found.phases["launch"] + busy) / (8e-6 * calls.count) < 1.25
    assert "launches" in found.limit
    assert predict(configured("digits", training__cuda_graph=True), "a100").phases["launch"] == 0


@pytest.mark.parametrize("gpus", [1, 4])
def test_utilisation_is_of_the_data_sheets_of_all_gpus(gpus):
    """Without a precision convolutions are in TF32: 156 TFLOP/s."""
    found = predict(configured("digits"), "a100", gpus)
    flop = step_flops(
        configured("digits"), _network(configured("digits").model, configured("digits").loss, 16), 16
    ).total
    assert found.mfu == pytest.approx(flop / sum(found.phases.values()) / (gpus * 156e12), rel=1e-9)
    assert found.capacity == 80e9
