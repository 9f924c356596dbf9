"""Errors that end a command with one clear line and no traceback, and `RunStopped`, which ends it without an error."""

from __future__ import annotations


class FinalError(Exception):
    """Base class of the exceptions that end a command.

    Attributes:
        exit_code: the command line exits with it (docs/how-to/stopping.md has the table).
        everywhere: True where every process of the run raises this same exception. Then no process has to wait for another: each
            one may leave the process group, and process 0 alone prints the message. False where only this process knows of it:
            it prints the message itself, and the other processes may not answer any more.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UsageError(FinalError, ValueError):
    """A request cannot be fulfilled. The message is one line that says what is wrong and what to do.

    The command line prints it and exits with code 2; a user of the library catches it as a ValueError.
    """

    exit_code = 2


class TrainingError(FinalError, RuntimeError):
    """Training had to stop, for example because memory ran out. The message names the step and what is kept.

    The command line prints it and exits with code 1; a user of the library catches it as a RuntimeError.
    """


class DivergedError(TrainingError):
    """Training ended because too many steps in a row had a loss or a gradient that is not finite (`training.max_bad_steps`).

    The command line prints it and exits with code 4: the same command would fail again, so a scheduler should not repeat it.
    """

    exit_code = 4


class WriteError(TrainingError, OSError):
    """A file cannot be written: the disk is full or read-only, or the directory is gone. The message names the file.

    The command line prints it and exits with code 74 (EX_IOERR of sysexits.h). Trying again only helps after somebody made room.
    """

    exit_code = 74


class TemporaryError(FinalError):
    """Something failed that may work when it is tried again: the data disk is away, or the kernel ended a worker process.

    The command line prints it and exits with code 75 (EX_TEMPFAIL of sysexits.h), so that a scheduler can try again.
    """

    exit_code = 75


class SystemFault(FinalError, OSError):
    """An OSError (a full disk, a missing file) of one process, raised in all processes with that process's message.

    The command line prints it and exits with code 1; a user of the library catches it as an OSError.
    """


class RunStopped(FinalError):
    """A signal asked the run to stop, and it has stopped. The command line exits with code 130, as after Ctrl-C."""

    exit_code = 130
