"""One run in several processes: how they meet, and what they tell each other.

torchrun starts the processes, one for each device; they talk over nccl between GPUs and over gloo between CPUs. The global batch
(`training.batch_size`) is split by position: process r of W takes the r-th part of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from falcon_fast.errors import FinalError, RunStopped, SystemFault, UsageError
from falcon_fast.training.distributed import signals

T = TypeVar("T")

# Preparing may take one process long (the first look at a million files) while the others wait.
PREPARATION = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. In a run of one process `group` and `control` are None, and every agreement
    is immediate.

    Attributes:
        rank, world_size: over all machines.
        local_rank: on this machine; it is also the number of this process's GPU.
        group: process group for tensors on the devices.
        control: gloo process group for messages between the hosts; nothing else may use it.
        timeout: seconds that a step waits for another process.
        strategy: ddp or fsdp; not used in a run of one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    timeout: int = 600
    strategy: str = "ddp"

    @property
    def main(self) -> bool:
        """Whether this is process 0, the one that prints, writes and evaluates."""
        return self.rank == 0

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks.

        Raises:
            RunStopped: in all processes, where a signal came to any of them before training.
        """
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, (value, signals.stop_pending()), group=self.control)
        if any(stop for _, stop in values):
            raise RunStopped(everywhere=True)
        return [each for each, _ in values]

    def from_main(self, value: T) -> T:
        """Return process 0's value."""
        return self.everyone(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process in all of them: every process raises the first one, and only process 0 prints it
        (`stopping.speaks`).

        Raises:
            FinalError: the first process that failed inside raised an error of this class (an OSError becomes a SystemFault).
                In a run of one process the error itself is raised.
        """
        failure: Exception | None = None
        try:
            yield
        except (FinalError, OSError) as caught:
            failure = caught
        if self.control is None and failure is not None:
            raise failure
        found = self.everyone(None if failure is None else (_kind(failure), _message(failure)))
        for rank, each in enumerate(found):
            if each is not None:
                kind, text = each
                raise kind(text if rank == 0 else f"process {rank}: {text}", everywhere=True)

    def main_first(self, make: Callable[[], T]) -> T:
        """Return `make()`, called in the first process of each machine before the others, which then find its caches."""
        first = self.local_rank == 0
        result: list[T] = []
        for mine in (first, not first):
            with self.together():
                if mine:
                    result.append(make())
        return result[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the processes of a floating-point tensor on the device."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / self.world_size

    def least(self, value: torch.Tensor) -> torch.Tensor:
        """Return the minimum over the processes of a tensor on the device."""
        if self.group is None:
            return value
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return value

    def close(self) -> None:
        """Leave the process group: from here on each process works alone, and a signal ends it at once."""
        if self.group is not None:
            dist.destroy_process_group()
        signals.stop_together(False)


def _kind(error: Exception) -> type[FinalError]:
    """Return the class of the error that all processes raise for `error`."""
    return type(error) if isinstance(error, FinalError) else SystemFault


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def join(strategy: str, device: str, batch_size: int, timeout: int, command: str = "train") -> Processes:
    """Meet the other processes of the run.

    Args:
        strategy: auto, single, ddp or fsdp; auto is ddp where torchrun started several processes, else single.
        device: auto, cpu, cuda or cuda:N.
        batch_size: images in a step, over all processes.
        timeout: seconds that a step waits for another process.
        command: the falcon-fast command that messages tell the user to type.

    Raises:
        UsageError: the strategy does not fit the way in which the processes were started, the batch does not divide into the
            processes, or a device is missing.
    """
    world_size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if strategy == "auto":
        strategy = "ddp" if world_size > 1 else "single"
    if strategy == "single":
        if world_size > 1:
            raise UsageError(
                f"--strategy single is for one process, but torchrun started {world_size}: use --strategy ddp, or start without "
                "torchrun"
            )
        return Processes()
    if not launched():
        raise UsageError(
            f"--strategy {strategy} needs torchrun: torchrun --nproc-per-node {max(2, torch.cuda.device_count())} --no-python "
            f"falcon-fast {command} ..."
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if batch_size % world_size:
        raise UsageError(
            f"batch size {batch_size} does not divide into {world_size} processes: make it a multiple of {world_size}"
        )
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} is one GPU for {world_size} processes: use --device cuda, which gives each process its own"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if cuda and local > torch.cuda.device_count():
        raise UsageError(
            f"{local} processes on a machine with {torch.cuda.device_count()} GPUs: use torchrun --nproc-per-node "
            f"{max(1, torch.cuda.device_count())}, or --device cpu"
        )
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=_store(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", local_rank) if cuda else None,
        )
        control = dist.new_group(backend="gloo", timeout=PREPARATION)
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        raise UsageError(
            f"process {rank} of {world_size} cannot reach the others: {first_line(error)}; check MASTER_ADDR, MASTER_PORT and "
            "the network between the machines"
        ) from None
    signals.stop_together(True)
    world = dist.group.WORLD
    assert world is not None and isinstance(control, dist.ProcessGroup)
    return Processes(rank, world_size, local_rank, world, control, timeout, strategy)


def _store() -> dist.Store:
    """Return the key-value store in which the processes find each other.

    torchrun keeps one store for all of its restarts (seen in torch 2.14: DynamicRendezvousHandler caches it), and its clients no
    longer put the number of the restart before their keys: in one of two trials the processes of the second attempt found
    addresses of the first attempt and waited for them forever. The prefix here restores that number. On one machine it is the
    same for all processes. On several machines it is not: there torchrun must make a new store for each attempt
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, examples/torchrun.sh).
    """
    store, _, _ = next(rendezvous("env://"))
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    return dist.PrefixStore(f"attempt-{attempt}", store)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
