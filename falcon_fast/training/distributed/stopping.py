"""How the processes of a run stop together: after a signal, after an error, and after the loss of a process.

Signals. torchrun starts its processes in sessions of their own, so that Ctrl-C reaches only torchrun. On SIGINT, SIGTERM, SIGHUP
or SIGQUIT, torchrun sends the same signal to the process group of every process, and SIGKILL to those that are still alive 30 s
later; it then exits with code 1. It ignores SIGUSR1 unless --signals-to-handle names it: then it passes SIGUSR1 on like the
others. Each process notes SIGINT, SIGTERM or SIGUSR1, and all processes agree on the step after which they save and stop
(`StopAgreement`). When a process dies, torchrun sends SIGTERM to the others. They cannot finish the step, because its collectives
fail or time out, and they end with the newest checkpoint.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from falcon_fast.errors import FinalError, RunStopped, TrainingError
from falcon_fast.training.distributed import signals
from falcon_fast.training.distributed.processes import Processes, first_line, launched


def everywhere(error: BaseException) -> bool:
    """Whether every process of the run raises this same error."""
    return isinstance(error, FinalError) and error.everywhere


def leave(error: BaseException) -> None:
    """Leave the process group before the process ends by an `error` that all processes raise.

    After an error of this process alone nothing is done, because the others may not answer any more.

    The frames of the error's traceback are cleared as well. If they kept the group until the interpreter ends, its gloo threads
    would be destroyed while they run ("terminate called without an active exception"): exit code 134, in 5 of 36 processes.
    """
    if not everywhere(error) or not (dist.is_available() and dist.is_initialized()):
        return
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__
    dist.destroy_process_group()
    gc.collect()


def speaks(error: BaseException) -> bool:
    """Whether this process prints `error`: process 0 prints the errors of all processes, and each process its own."""
    main = not launched() or os.environ["RANK"] == "0"
    return main or (dist.is_available() and dist.is_initialized() and not everywhere(error))


class StopAgreement:
    """Whether any process was asked to stop, with the same answer in all processes at the same step.

    The question is sent at the end of one step and answered at the end of the next, so that no process waits for it. The hosts
    talk over gloo, and the device's queue is left alone.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, requested: bool) -> bool:
        """Return whether all processes stop after this step. Every process calls it at the end of each step.

        requested: whether this process was asked to stop.
        """
        if self._processes.control is None:
            return requested
        answer = self.finish()
        flag = torch.tensor(int(requested), dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._processes.control, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        return answer

    def finish(self) -> bool:
        """Wait for the answer that is still on its way and return it; False if there is none."""
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait(timedelta(seconds=self._processes.timeout))
        return bool(flag)


@contextmanager
def lost_peers(processes: Processes, kept: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective, because another process died or hangs, into a TrainingError.

    kept: returns the end of the message, which says what is saved.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, FinalError):  # it has its line already
            raise
        if processes.group is None or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            raise
        if signals.stop_pending():  # before training, and the other process was stopped, too
            raise RunStopped from None
        raise TrainingError(
            f"process {processes.rank} lost another process ({first_line(error)[:200]}): training stopped; {kept()}"
        ) from None
