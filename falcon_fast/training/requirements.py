"""What a run requires of its machine and of the number of its processes, checked before anything large is built."""

from __future__ import annotations

import os

import torch

from falcon_fast.config import Config, TrainingConfig
from falcon_fast.errors import UsageError
from falcon_fast.hardware.host_memory import available_memory
from falcon_fast.models.footprint import least_footprint
from falcon_fast.training.distributed.processes import Processes


def check_machine(config: Config, size: int, device: torch.device, processes: Processes) -> None:
    """Check that this machine can hold the run and has cores for its workers, before anything large is built.

    Raises:
        UsageError: it cannot.
    """
    cores = len(os.sched_getaffinity(0))
    if config.data.workers > (most := max(32, 4 * cores)):
        raise UsageError(
            f"data.workers={config.data.workers} is too many for {cores} cores: use {most} or fewer, or -1 for a number that fits"
        )
    images = config.training.batch_size // processes.world_size // config.training.accumulate
    sharded = processes.group is not None and processes.strategy == "fsdp"
    need = least_footprint(config, size, images, processes.world_size if sharded else 1)
    if need.total > (free := available_memory(device)):
        raise UsageError(
            f"this run needs more than {need.total / 2**30:,.1f} GiB of memory, and {device} has {free / 2**30:,.1f} GiB: "
            f"weights, gradients and moments {need.training / 2**30:,.1f}, dictionary {need.dictionary / 2**30:,.1f}, one batch "
            f"{need.batch / 2**30:,.1f}; use a smaller model, --embedding-dim, --num-codes or --batch-size"
        )


def check_accumulation(training: TrainingConfig, processes: Processes) -> tuple[str, ...]:
    """Return a note about what micro-batches change, if there are several.

    Raises:
        UsageError: the batch does not divide into them.
    """
    parts = training.accumulate * processes.world_size
    if training.batch_size % parts:
        raise UsageError(
            f"batch size {training.batch_size} does not divide into {training.accumulate} micro-batches in each of "
            f"{processes.world_size} processes: make it a multiple of {parts}"
        )
    if training.accumulate == 1:
        return ()
    micro = training.batch_size // training.accumulate
    return (
        f"--accumulate {training.accumulate}: the prior's mean assignment and BatchNorm's statistics are computed over each "
        f"micro-batch of {micro} images, not over all {training.batch_size}",
    )
