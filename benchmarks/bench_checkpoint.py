"""The cost of saving a checkpoint: the time of steps while one is being written and otherwise, and how long the loop waits.

`pytest --benchmark benchmarks/bench_checkpoint.py` runs the trainer's own step and `Saver`, on noise, in float32. The cases are
ResNet-18 of the CIFAR-10 recipe at batch size 4 (its network and both moments of AdamW), and a step of milliseconds with 256 MB
of additional state, as a larger model has. Each round takes steps, starts a save, and takes steps until it is written.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from falcon_fast import FalconLoss
from falcon_fast.config import load_recipe, override, validate
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_codes, build_network
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.saver import Saver
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, training_step

ROUNDS = 2
CASES = {
    "ResNet-18, 32 px, batch 4": ("cifar10", 32, 4, 0),
    "digits, batch 32, 256 MB more": ("digits", 16, 32, 2**26),
}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("case", CASES)
def test_save(table, tmp_path, case, asynchronous) -> None:
    recipe, size, batch, more = CASES[case]
    config = validate(override(load_recipe(recipe), {"training.batch_size": batch, "loss.num_codes": 1024}))
    torch.manual_seed(0)
    network = per_view_batchnorm(build_network(config, size)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = torch.randn(2 * batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optimizer, network, None, 0.0)
    learner = Learner(network, FalconLoss(build_codes(config), config.tau), None, optimizer)
    extra = {f"more.{i}": torch.randn(more // 4) for i in range(4)} if more else {}

    def step() -> float:
        start = time.perf_counter()
        training_step(learner, views, None, 1.0)
        return time.perf_counter() - start

    without: list[float] = []
    during: list[float] = []
    waits: list[float] = []
    written: list[float] = []
    few = 10 if more == 0 else 40
    with Saver(tmp_path, 1, asynchronous) as saver:
        for number in range(ROUNDS + 1):
            steps = [step() for _ in range(few)]
            start = time.perf_counter()
            saver.save(number, checkpoint.collect(network, None, optimizer, extra), {})
            waited = time.perf_counter() - start
            meanwhile = []
            while asynchronous and saver._pending is not None and not saver._pending[0].done():
                meanwhile.append(step())
            saver.wait()
            if number:  # the first round fills the allocator, the staging memory and the disk's cache
                without += steps
                during += meanwhile
                waits.append(waited)
                written.append(time.perf_counter() - start)
    size_mb = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) / 1e6
    usual = statistics.median(without)
    row = {
        "case": case,
        "save": "asynchronous" if asynchronous else "synchronous",
        "MB": size_mb,
        "step ms": 1e3 * usual,
        "the loop waits ms": 1e3 * statistics.median(waits),
        "written after ms": 1e3 * statistics.median(written),
    }
    if during:
        row |= {
            "steps meanwhile": len(during) / ROUNDS,
            "step meanwhile ms": 1e3 * statistics.mean(during),
            "times slower": statistics.mean(during) / statistics.mean(without),
            "with the wait": (sum(during) + sum(waits)) / (len(during) * statistics.mean(without)),
        }
    table.add(**row)
