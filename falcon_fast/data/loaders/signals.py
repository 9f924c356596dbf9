"""Signals in the worker processes of a DataLoader."""

from __future__ import annotations

import os
import signal


def leave_signals_to_the_trainer(worker: int) -> None:
    """Keep a worker process running when the user presses Ctrl-C; for DataLoader's `worker_init_fn`.

    Ctrl-C reaches every process of the terminal, and torchrun signals whole process groups. The trainer decides when to stop, and
    until then it needs batches to finish the current step and save. So each worker leaves the process group and ignores SIGINT.

    worker: the number of the worker, which DataLoader passes; not used.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker inherits the trainer's own handler
