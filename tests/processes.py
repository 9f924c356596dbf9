"""Functions run in several gloo processes on this machine, for tests of what happens between processes."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _member(function: Callable[..., Any], rank: int, world: int, store: str, queue: Any, arguments: tuple) -> None:
    try:
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
    """What `function(rank, world, *arguments)` returns in each of `world` processes; their traceback where one fails.

    `function` is a module's, and what it takes and returns can be pickled (numpy rather than torch: tensors would share memory
    with processes that are gone).
    """
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    store = folder / f"store-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_member, args=(function, rank, world, str(store), queue, arguments))
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
