"""Predicted steps: what must hold of any, for there is no device; and the throughputs that the estimates were set beside."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

from falcon_fast.config import Config, load_recipe, override, recipe_names, validate
from falcon_fast.errors import UsageError
from falcon_fast.models.network import build_network
from falcon_fast.objective.planner import DEVICES
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
    assert full.step > step().step >= tf32.step > half.step  # without any, convolutions are TF32
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
