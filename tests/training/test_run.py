"""A run: what is refused before anything is built, and what the user is told."""

from __future__ import annotations

import pytest
import torch

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.sources.opening import open_source
from falcon_fast.errors import UsageError
from falcon_fast.training import run as run_module
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import _build, prepare, seed_process

from .tiny import TINY, prepared


def test_a_batch_of_one_needs_no_batchnorm():
    with pytest.raises(UsageError, match="BatchNorm"):
        prepared(training__batch_size=1)


def test_a_share_of_one_image_needs_synchronised_batchnorm():
    config = validate(
        override(load_recipe("digits"), TINY | {"training.batch_size": 2, "training.sync_batchnorm": False})
    )
    source = open_source(config.data)
    with pytest.raises(UsageError, match="--batch-size 4"):
        _build(config, source, Processes(0, 2, 0))


@pytest.mark.parametrize(("batch_size", "accumulate", "multiple"), [(16, 3, 3), (18, 4, 4)])
def test_a_batch_that_does_not_divide_is_one_line(batch_size, accumulate, multiple):
    with pytest.raises(UsageError, match=f"make it a multiple of {multiple}$"):
        prepared(training__batch_size=batch_size, training__accumulate=accumulate)


def test_accumulation_says_what_it_changes():
    (line,) = [n for n in prepared(training__batch_size=16, training__accumulate=4).notes if "micro-batch" in n]
    assert "micro-batch of 4 images, not over all 16" in line
    assert not any("micro-batch" in n for n in prepared().notes)
    with pytest.raises(UsageError, match="--batch-size 8"):  # one image a micro-batch
        prepared(training__batch_size=4, training__accumulate=4)


def test_the_seed_alone_decides_the_initial_weights_and_the_codes():
    torch.manual_seed(5)
    mine = prepared()
    torch.manual_seed(5)
    again, other = prepared(), prepared(training__seed=1)
    assert torch.equal(mine.codes.words, again.codes.words) and torch.equal(mine.probe.weight, again.probe.weight)
    assert not torch.equal(mine.codes.words, other.codes.words)
    assert not torch.equal(mine.probe.weight, other.probe.weight)
    assert mine.facts == again.facts and mine.facts != other.facts


SEEDS = (0, 20241128123456, 2**62, 2**63 - 1)


@pytest.mark.parametrize("rank", [1, 63])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_of_one_process_is_one_of_several(seed, rank):
    """Each process has a random state of its own, which depends on the seed, the process and the step."""
    run = prepared(training__seed=seed)
    draws = []
    for place, step in ((rank, 0), (rank, 10**9), (rank + 1, 0)):
        run.processes = Processes(place, 100, 0)
        seed_process(run, step)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
    run.processes = Processes(rank, 100, 0)
    seed_process(run, 0)
    assert torch.rand(1).item() == draws[0]
    if seed < 2**40:  # the states of seeds that worked before are the same
        assert torch.initial_seed() == (seed + rank) * 1_000_003


def test_a_gpu_that_cannot_be_used_is_not_passed_over_in_silence(monkeypatch):
    monkeypatch.setattr(run_module, "unused_gpu", lambda found: iter(["torch is built for CUDA 13.0, but ..."]))
    config = override(load_recipe("digits"), {"model.width": 4, "loss.num_codes": 64, "loss.embedding_dim": 16})
    line = "training on the CPU: torch is built for CUDA 13.0, but ..."
    if not torch.cuda.is_available():
        assert line in prepare(config).notes
    assert line not in prepare(override(config, {"training.device": "cpu"})).notes
