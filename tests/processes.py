"""Functions run in several gloo processes on this machine, for tests of what happens between processes."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import Run, prepare

# Imported once, in the server that the processes are forked from: importing torch takes each process 5 s of a core otherwise.
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "falcon_fast.training.trainer",
    "tests.processes",
]


def _member(
    function: Callable[..., Any],
    rank: int,
    world: int,
    store: str,
    queue: Any,
    environment: dict[str, str],
    arguments: tuple,
) -> None:
    try:
        os.environ.clear()
        os.environ.update(
            environment
        )  # the test's own, which the server that was started by an earlier test does not have
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        queue.put((rank, function(rank, world, *arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def in_processes(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(rank, world, *arguments)` returns in each of `world` processes, or fail with a traceback of theirs.

    `function` is a module's, and what it takes and returns can be pickled (numpy rather than torch: tensors would share memory
    with processes that are gone).
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    queue = context.Queue()
    store = folder / f"store-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_member, args=(function, rank, world, str(store), queue, dict(os.environ), arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get(timeout=180)
            if error:
                raise AssertionError(f"process {rank}:\n{error}")
            found[rank] = result
    finally:
        for process in processes:
            process.join(10 if len(found) == world else 0)
            process.kill()
    return [found[rank] for rank in range(world)]


def exact_run(settings: dict[str, Any], processes: Processes, strategy: str) -> Run:
    """A run of the digits in float64, where nothing but a mistake can grow to 1e-9.

    In float32 rounding flips ReLUs, hundreds of alike background pixels at once: gradients differ by 1e-3 from the first step on.
    """
    run = prepare(validate(override(load_recipe("digits"), settings)), processes)
    run.network.double()
    run.probe.double()
    projector = run.network.projector  # whose own forward makes float32 of everything
    projector.forward = lambda features: torch.tanh(projector.norm(projector.linear(features)))
    run.processes = dataclasses.replace(processes, strategy=strategy)
    run.assemble()
    run.probe.forward = lambda features: F.linear(features.double(), run.probe.weight, run.probe.bias)
    return run
