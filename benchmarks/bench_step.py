"""A whole training step of the CPU recipes, with the reference loss and with the C++ loss, in one run; and with glibc's default
memory handling and with kept memory, in processes that take turns.

Run it with `pytest --benchmark benchmarks/bench_step.py`. The trainer's own step runs on views of noise with labels: forward,
backward and update, in bfloat16 if the processor supports it. Loading is not included: it runs in the background.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from falcon_fast import FalconLoss
from falcon_fast.config import Config, TrainingConfig, load_recipe, override, validate
from falcon_fast.hardware.host_memory import keep_host_memory
from falcon_fast.hardware.precision import choose_precision
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_codes, build_network
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, training_step

from .conftest import interleaved


def stepper(config: Config, size: int, implementation: str = "auto"):
    """Return a function that takes a step of a new network on views of noise."""
    precision, _ = choose_precision(TrainingConfig(precision="bf16"), torch.device("cpu"))
    torch.manual_seed(0)
    views = torch.randn(2 * config.training.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (config.training.batch_size,))

    network = build_network(config, size)
    per_view_batchnorm(network)
    network.to(memory_format=torch.channels_last)
    criterion = FalconLoss(build_codes(config), config.tau, implementation=implementation)
    probe = torch.nn.Linear(network.backbone.num_features, 10)
    optimizer = build_optimizer(config.optimizer, network, probe, config.probe.lr)
    learner = Learner(network, criterion, probe, optimizer, precision.autocast)
    return lambda: training_step(learner, views, labels, 1.0)


@pytest.mark.parametrize("codes", ["rademacher", "hadamard"])
@pytest.mark.parametrize(("recipe", "size"), [("digits", 16), ("cifar10-resnet8", 32)])
def test_step(table, recipe, size, codes) -> None:
    config = validate(override(load_recipe(recipe), {"loss.codes": codes}))
    seconds = interleaved({name: stepper(config, size, name) for name in ("reference", "cpu")}, 9)
    table.add(
        recipe=recipe,
        codes=codes,
        **{f"{name} ms": 1e3 * value for name, value in seconds.items()},
        **{"times faster": seconds["reference"] / seconds["cpu"]},
    )


def median_step(recipe: str, size: int, kept: bool) -> float:
    """Return the milliseconds of a step, in a process that has done nothing else. kept: keep freed memory."""
    if kept:
        assert keep_host_memory(torch.device("cpu"))
    step = stepper(validate(load_recipe(recipe)), size)
    milliseconds = []
    for _ in range(12):
        start = time.perf_counter()
        step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds[2:])


@pytest.mark.parametrize(("recipe", "size"), [("digits", 16), ("cifar10-resnet8", 32)])
def test_memory_kept(table, recipe, size) -> None:
    found: dict[bool, list[float]] = {False: [], True: []}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(4):
        for kept, values in found.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                values.append(process.submit(median_step, recipe, size, kept).result())
    usual, kept_ms = (statistics.median(values) for values in found.values())
    table.add(recipe=recipe, **{"glibc's ms": usual, "kept ms": kept_ms, "times faster": usual / kept_ms})
