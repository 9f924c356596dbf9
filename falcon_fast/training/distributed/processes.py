"""One run in several processes: how they meet, what they tell each other, and how they stop together.

Started by torchrun, one process a device; nccl between GPUs, gloo between CPUs. The global batch (`training.batch_size`) is
split by position: process r of W takes the r-th part of it.

Signals. torchrun starts its processes in sessions of their own, so that Ctrl-C reaches torchrun alone; on SIGINT, SIGTERM,
SIGHUP or SIGQUIT it sends the same signal to the process group of every process, and SIGKILL to those that still live 30 s
later; its own exit code is then 1. It ignores SIGUSR1, unless --signals-to-handle names it: then it is passed on like the
others. Each process notes SIGINT, SIGTERM or SIGUSR1, and all agree on the step after which they stop (`StopAgreement`) and
save. When a process dies, torchrun sends SIGTERM to the others likewise; they cannot finish the step, whose collectives fail
or time out, and end with what was saved last.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from falcon_fast.errors import TrainingError, UsageError

T = TypeVar("T")

# Preparing may take one process long (the first look at a million files) while the others wait.
PREPARATION = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, from one of them. Alone, `group` and `control` are None and every agreement is immediate.

    Attributes:
        rank, world_size: over all machines.
        local_rank: on this machine; its number is the number of the GPU.
        group: for tensors on the devices.
        control: gloo, for what the hosts tell each other; nothing else may use it.
        timeout: seconds that a step waits for another process.
        strategy: ddp or fsdp; alone, nothing looks at it.
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
        """Whether this is the one process that prints, writes and evaluates."""
        return self.rank == 0

    def everyone(self, value: T) -> list[T]:
        """The value of each process, in order."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: T) -> T:
        """Process 0's value."""
        return self.everyone(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What cannot go on in one process stops all, with the first error; only process 0 says it (`speaks`)."""
        failure: Exception | None = None
        try:
            yield
        except (UsageError, TrainingError, OSError) as caught:
            failure = caught
        found = self.everyone(None if failure is None else (type(failure), _message(failure)))
        if self.control is None and failure is not None:
            raise failure
        for rank, each in enumerate(found):
            if each is not None:
                kind, text = each
                error = kind(text if rank == 0 else f"process {rank}: {text}")
                error.agreed = True  # type: ignore[attr-defined]
                raise error

    def main_first(self, make: Callable[[], T]) -> T:
        """`make()` in the first process of each machine, then in the others, which find its caches."""
        first = self.local_rank == 0
        result: list[T] = []
        for mine in (first, not first):
            with self.together():
                if mine:
                    result.append(make())
        return result[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a float tensor on the device."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / self.world_size

    def least(self, value: torch.Tensor) -> torch.Tensor:
        """The least over the processes of a tensor on the device."""
        if self.group is None:
            return value
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return value

    def close(self) -> None:
        """Leave the group: what follows is done by each process alone."""
        if self.group is not None:
            dist.destroy_process_group()


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def leave(error: BaseException) -> None:
    """Before the process ends by an `error` that all share: leave the group. For one of its own, others may not answer any more.

    And let go of it: what holds a group until the interpreter's end, as the frames of the error's traceback do, has gloo's
    threads destroyed as they run ("terminate called without an active exception"): exit code 134, in 5 of 36 processes.
    """
    if not getattr(error, "agreed", False) or not (dist.is_available() and dist.is_initialized()):
        return
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__
    dist.destroy_process_group()
    gc.collect()


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def speaks(error: BaseException) -> bool:
    """Whether this process prints an error: process 0 those that all share, and each its own."""
    alone = not launched() or os.environ["RANK"] == "0"
    return alone or (dist.is_available() and dist.is_initialized() and not getattr(error, "agreed", False))


def join(strategy: str, device: str, batch_size: int, timeout: int, command: str = "train") -> Processes:
    """Meet the other processes of the run. `strategy` auto is ddp where torchrun started several processes, else single.

    command: of falcon-fast, for what a message tells to type.

    Raises:
        UsageError: the strategy and the way of starting do not fit, or the batch or the devices do not divide.
    """
    world_size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if strategy == "auto":
        strategy = "ddp" if world_size > 1 else "single"
    if strategy == "single":
        if world_size > 1:
            raise UsageError(
                f"--strategy single is for one process, torchrun started {world_size}: use --strategy ddp, or no torchrun"
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
            f"--device {device} is one GPU for {world_size} processes: use --device cuda, which gives each its own"
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
        raise UsageError(f"process {rank} of {world_size} cannot meet the others: {_first_line(error)}") from None
    world = dist.group.WORLD
    assert world is not None and isinstance(control, dist.ProcessGroup)
    return Processes(rank, world_size, local_rank, world, control, timeout, strategy)


def _store() -> dist.Store:
    """Where the processes find each other.

    torchrun keeps one store for all of its restarts (seen in torch 2.14: DynamicRendezvousHandler caches it), and its clients no
    longer put the number of the restart before their names: the processes of the second attempt found addresses of the first
    and waited for them without end, in one of two trials. On one machine that number is the same for all processes. On
    several it is not: there torchrun must make a store each time (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, examples/torchrun.sh).
    """
    store, _, _ = next(rendezvous("env://"))
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class StopAgreement:
    """Whether any process was asked to stop, with the same answer in all of them at the same step.

    The question goes out at one step's end and is answered at the next one's, so that nobody waits for it: hosts
    tell each other over gloo, and the device's queue is left alone.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, requested: bool) -> bool:
        """At the end of a step, in every process: whether all stop here."""
        if self._processes.control is None:
            return requested
        answer = self.finish()
        flag = torch.tensor(int(requested), dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._processes.control, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        return answer

    def finish(self) -> bool:
        """The answer still under way, if any."""
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait(timedelta(seconds=self._processes.timeout))
        return bool(flag)


@contextmanager
def lost_peers(processes: Processes, kept: Callable[[], str]) -> Iterator[None]:
    """A collective that fails because another process died or hangs becomes a TrainingError that says what `kept()` says."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if processes.group is None or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            raise
        raise TrainingError(
            f"process {processes.rank} lost another process ({_first_line(error)[:200]}): training stopped; {kept()}"
        ) from None
