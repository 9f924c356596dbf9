"""Ranges, choices, and values that do not go together."""

from __future__ import annotations

import math
from typing import Any

import pytest

from falcon_fast.config import (
    Config,
    override,
    validate,
)

from .lines import one_line

LEAST = {
    "data.size": 0,
    "data.workers": -1,
    "model.width": 1,
    "loss.temperature_batch": 1,
    "loss.beta": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_epochs": 0.0,
    "optimizer.warmup_lr": 0.0,
    "optimizer.momentum": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 0.0,
    "training.accumulate": 1,
    "probe.lr": 0.0,
    "training.epochs": 0,
    "training.batch_size": 1,
    "training.seed": 0,
    "log.every_steps": 1,
    "log.evaluate_epochs": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 1,
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least_value_is_valid_and_what_is_below_is_not(name: str) -> None:
    least = LEAST[name]
    validate(override(Config(), {name: least}))
    below = [least - 1] if type(least) is int else [-1e-9, math.nan, math.inf, -math.inf]
    for value in below:
        assert name in one_line(validate, override(Config(), {name: value}))


CHOICES = {
    "data.source": ("digits", "cifar10", "folder"),
    "model.stem": ("auto", "cifar", "cifar-padded", "imagenet"),
    "model.initialisation": ("timm", "torchvision"),
    "loss.codes": ("rademacher", "hadamard"),
    "loss.activation": ("tanh", "l2"),
    "loss.prior": ("reverse", "forward"),
    "loss.implementation": ("auto", "reference"),
    "optimizer.name": ("adam", "adamw", "sgd", "lars"),
    "training.precision": ("auto", "float32", "tf32", "bf16", "fp16"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_its_names_and_no_other(name: str) -> None:
    for value in CHOICES[name]:
        validate(override(Config(), {name: value}))
    for wrong in (CHOICES[name][-1] + "x", CHOICES[name][0].upper(), ""):
        message = one_line(validate, override(Config(), {name: wrong}))
        assert name in message and repr(wrong) in message
    assert repr(CHOICES[name][-1]) in one_line(validate, override(Config(), {name: CHOICES[name][-1] + "x"}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss.num_codes": 1}, ["at least 2 codes", "1"]),
        ({"loss.num_codes": -5}, ["at least 2 codes"]),
        ({"loss.embedding_dim": 0}, ["at least 1", "0"]),
        ({"loss.epsilon": 0.0}, ["epsilon must be positive"]),
        ({"loss.epsilon": math.nan}, ["epsilon"]),
        ({"loss.epsilon": math.inf}, ["epsilon"]),
        ({"loss.epsilon": 1 / 16383}, ["epsilon (c - 1)", "below 1"]),
        ({"loss.epsilon": 1 / 16384}, ["epsilon"]),  # the logit of an optimal row would be 0
        ({"loss.codes": "hadamard", "loss.embedding_dim": 100, "loss.num_codes": 1000}, ["power of two", "100"]),
        ({"loss.codes": "hadamard", "loss.embedding_dim": 128, "loss.num_codes": 1000}, ["divides", "1000"]),
        ({"loss.codes": "hadamard", "loss.embedding_dim": 0}, ["power of two"]),
        ({"optimizer.lr": 0.0}, ["optimizer.lr"]),
        ({"optimizer.lr": -1e-3}, ["optimizer.lr"]),
        ({"optimizer.lr": math.nan}, ["optimizer.lr"]),
        ({"optimizer.lr": math.inf}, ["optimizer.lr"]),
        ({"optimizer.momentum": 1.0}, ["optimizer.momentum"]),
        ({"optimizer.ema_decay": 1.0}, ["optimizer.ema_decay", "[0, 1)"]),
        (
            {"training.precision": "fp16", "training.strategy": "fsdp", "fsdp.param_dtype": "bfloat16"},
            ["fsdp.param_dtype", "float32"],
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], words: list[str]) -> None:
    message = one_line(validate, override(Config(), values))
    assert all(word in message for word in words), message


def test_values_at_the_edge_are_valid() -> None:
    validate(override(Config(), {"loss.num_codes": 2, "loss.embedding_dim": 1}))
    validate(override(Config(), {"loss.codes": "hadamard", "loss.embedding_dim": 1, "loss.num_codes": 2}))
    validate(override(Config(), {"loss.epsilon": 1 / 16385, "optimizer.lr": 1e-12, "optimizer.momentum": 0.999}))
    validate(override(Config(), {"training.precision": "bf16", "optimizer.ema_decay": 0.9999}))


def test_hadamard_codes_have_no_stored_plan() -> None:
    config = override(Config(), {"loss.codes": "hadamard", "loss.plan": "stored"})
    assert "logits of Hadamard codes are not stored: use loss.plan=auto" in one_line(validate, config)
