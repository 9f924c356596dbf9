"""Where `falcon-fast` begins: signals end the command with a line from here on, before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from falcon_fast.training.distributed.signals import EXIT_CODE, Stop, ignore_signals, immediate_stops, say_stopped


def main() -> None:
    """Run the console script (`falcon_fast.cli.main`) and end the process with its exit code.

    After a signal, and after an error with other processes still connected, the interpreter is not taken down in order: it would
    wait for threads that still work, and gloo's threads would abort the process (exit code 134).
    """
    with immediate_stops():
        try:
            from falcon_fast.cli.main import main

            main()
        except Stop:
            say_stopped()
            _end(EXIT_CODE)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            distributed = sys.modules.get("torch.distributed")
            if code and distributed is not None and distributed.is_available() and distributed.is_initialized():
                _end(code)
            raise
        finally:
            ignore_signals()
            _flush()


def _end(code: int) -> NoReturn:
    _flush()
    os._exit(code)


def _flush() -> None:
    """Write what is still in the buffers, and drop what cannot be written: the interpreter would exit with 120 because of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the disk is full, nobody reads any more, or the stream is closed
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
