"""How a checkpoint is written: by all processes, in the background while training continues, and completely or not at all.

Every process writes its share into one directory with a temporary name, next to the final one: its own shards, and a part of the
tensors that all processes hold alike (replicated tensors are divided among the processes). Process 0 renames the directory when
all shares are written. So a directory with a final name is a complete checkpoint, whenever a process dies.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from falcon_fast.errors import TrainingError, UsageError, WriteError
from falcon_fast.files import synchronise, writing
from falcon_fast.training.checkpoints.checkpoint import ALONE, FORMAT, PREFIX, complete
from falcon_fast.training.checkpoints.integrity import sealed
from falcon_fast.training.checkpoints.storage import INDEX, Writer
from falcon_fast.training.distributed.processes import Processes

SHARED_WITHIN = 60.0  # seconds: NFS may show a new file of another machine that late (acdirmax)


def _stager() -> DefaultStager:
    cuda = torch.cuda.is_available()
    return DefaultStager(StagingOptions(cuda, False, False, cuda))  # pinned, shared, in a thread, non-blocking


class Saver:
    """A context that writes the checkpoints of a run. All processes enter it, and call its methods, together.

    If it is asynchronous, `save` returns as soon as the tensors are copied to the host's memory, and DCP writes them in a thread
    while training continues. That memory is kept for the next checkpoint (pinned where there is CUDA). At most one checkpoint is
    being written at a time: the next `save` waits for it. An error in the thread is raised by the next `save` or `wait` or at the
    end of the context, in all processes.

    The processes talk over a gloo group of their own. On the group that training uses, the messages of the thread and those of
    the steps would mix, and gloo would abort the process ("op.preamble.length <= op.nbytes").

    Args:
        directory: where the checkpoints are written; it is made if it does not exist.
        keep: how many of the newest checkpoints stay.
        asynchronous: write in the background.
        processes: the processes of the run; None for a run of one process.

    Raises:
        UsageError: a process cannot see the directory that process 0 made.
    """

    def __init__(
        self, directory: Path, keep: int, asynchronous: bool = False, processes: Processes | None = None
    ) -> None:
        self._directory, self._keep, self._asynchronous = directory, keep, asynchronous
        self._processes = processes = processes or Processes()
        self._token = processes.from_main(f"{socket.gethostname()}-{os.getpid()}")
        self._pending: tuple[Future[Any], Path] | None = None
        self._group: dist.ProcessGroup | None = None
        with processes.together():
            if processes.main:
                with writing(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                for left in directory.glob(f".{PREFIX}*.partial"):  # left by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
        if processes.group is None:
            warnings.filterwarnings("ignore", message=ALONE)
        else:
            self._check_shared()
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._stager = _stager()

    def _check_shared(self) -> None:
        marker, main = self._directory / f".{self._token}", self._processes.main
        with self._processes.together():
            if main:
                marker.touch()
        with self._processes.together():
            end = time.monotonic() + SHARED_WITHIN
            while not main and not marker.exists():
                if time.monotonic() > end:
                    raise UsageError(
                        f"cannot see {self._directory}, which process 0 made: put --run-dir on a file system that all machines "
                        "share"
                    )
                time.sleep(0.1)
        if main:
            marker.unlink()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Write checkpoint `step`, after the one before it is written. The tensors may change as soon as this returns.

        Raises:
            WriteError: this checkpoint, or the one before it, cannot be written. No half-written checkpoint stays.
            TrainingError: it cannot be written for another reason.
        """
        self.wait()
        final = self._directory / f"{PREFIX}{step:08d}"
        temporary = self._partial(final)
        whole = {"format": FORMAT, "step": step, **facts}
        options: dict[str, Any] = {
            "storage_writer": Writer(temporary, lambda: self._publish(temporary, final, whole)),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        if self._asynchronous:
            if not self._stager._state_dict_stager._deepcopy_dispatch:
                self._stager = _stager()  # torch 2.11 empties that table after each use (KeyError: type)
            self._pending = dcp.async_save(dict(tensors), async_stager=self._stager, **options), final  # type: ignore[assignment]
            return
        with self._failure(final):
            dcp.save(dict(tensors), **options)

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raises what `save` raises."""
        if self._pending is not None:
            (future, final), self._pending = self._pending, None
            with self._failure(final):
                future.result()

    def _partial(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.{self._token}.partial")

    def _publish(self, temporary: Path, final: Path, facts: Mapping[str, Any]) -> None:
        """Complete a checkpoint, in process 0 when all shares are written: write run.json, rename, and remove the oldest ones."""
        path = temporary / "run.json"
        with writing(path):
            path.write_text(sealed(facts, temporary / INDEX), encoding="utf-8")
            synchronise(path)
        with writing(final):
            if final.exists():
                self._remove(final)
            temporary.rename(final)
        for old in complete(self._directory)[: -self._keep]:
            with suppress(OSError):  # this one is complete; the next save tries again
                self._remove(old)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, under another name, so that a process killed meanwhile leaves nothing that looks like one."""
        doomed = path.with_name(f".{path.name}.old.{self._token}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def _failure(self, final: Path) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:  # a BaseException, raised alike in every process
            rank, (cause, _) = min(error.failures.items())
            who = f"process {rank}: " if self._group is not None else ""
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            line = f"checkpoint {final} was not written ({who}{reason})"
            kind = WriteError if isinstance(cause, OSError) else TrainingError
            raise kind(line, everywhere=self._group is not None) from None
        finally:  # after a success the directory has its final name
            if self._processes.main:
                shutil.rmtree(self._partial(final), ignore_errors=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the checkpoint that is being written. If an error ended the context, that error and no later one is raised."""
        with suppress(*(() if error is None else (Exception,))):
            self.wait()
        self._stager.close()
