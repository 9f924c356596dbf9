"""Errors that are the user's to mend: one clear line, no traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something asked for cannot be done as asked. The message is one line that says what to do.

    The command line prints it and exits with code 2; a library user catches it as a ValueError.
    """


class TrainingError(RuntimeError):
    """Training had to stop (a non-finite loss, say). The message names the step and what is kept."""
