"""What a run requires of its machine is checked before anything large is built."""

from __future__ import annotations

import os

import pytest
import torch

from falcon_fast.config import load_recipe, override
from falcon_fast.errors import UsageError
from falcon_fast.training import requirements
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.requirements import check_accumulation, check_machine

CPU = torch.device("cpu")


def test_memory_is_compared_with_what_is_free(monkeypatch):
    config = override(load_recipe("digits"), {"model.width": 32})
    monkeypatch.setattr(requirements, "available_memory", lambda device: 2**30)
    check_machine(config, 16, CPU, Processes())
    monkeypatch.setattr(requirements, "available_memory", lambda device: 2**20)
    with pytest.raises(UsageError, match=r"needs more than .* GiB of memory, and cpu has 0\.0 GiB"):
        check_machine(config, 16, CPU, Processes())


def test_workers_are_compared_with_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    for count, fits in ((-1, True), (0, True), (40, True), (41, False), (1000, False)):
        config = override(load_recipe("digits"), {"data.workers": count})
        if fits:
            check_machine(config, 16, CPU, Processes())
        else:
            with pytest.raises(UsageError, match="10 cores: use 40 or fewer"):
                check_machine(config, 16, CPU, Processes())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    check_machine(override(load_recipe("digits"), {"data.workers": 32}), 16, CPU, Processes())


def test_a_batch_divides_into_micro_batches_and_processes():
    training = override(load_recipe("digits"), {"training.batch_size": 12, "training.accumulate": 3}).training
    (note,) = check_accumulation(training, Processes())
    assert "micro-batch of 4 images" in note
    with pytest.raises(UsageError, match="make it a multiple of 15"):
        check_accumulation(training, Processes(world_size=5))
