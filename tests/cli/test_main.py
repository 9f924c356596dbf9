"""The entry point: exit codes, and one line for each error."""

from __future__ import annotations

import sys

import pytest
import torch

from falcon_fast.cli import main as cli
from falcon_fast.errors import RunStopped, SystemFault, TemporaryError, TrainingError, UsageError, WriteError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("wrong"), 2, "error: wrong\n"),
        (TrainingError("diverged", everywhere=True), 1, "error: diverged\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (SystemFault("process 1: full", everywhere=True), 1, "error: process 1: full\n"),
        (WriteError("RUN/metrics.csv: full"), 74, "error: RUN/metrics.csv: full\n"),
        (TemporaryError("the disk is away"), 75, "error: the disk is away\n"),
        (RunStopped(everywhere=True), 130, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(sys, "argv", ["falcon-fast", "info"])
    monkeypatch.setattr(cli.info, "callback", failing)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert tuple(capsys.readouterr()) == ("", line)


def test_other_errors_keep_their_traceback(monkeypatch):
    def failing(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["falcon-fast", "info"])
    monkeypatch.setattr(cli.info, "callback", failing)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_version_is_the_packages(falcon_fast):
    from falcon_fast import __version__

    code, out, _ = falcon_fast("--version")
    assert code == 0 and out.rstrip().endswith(__version__)


def test_info_runs_here(falcon_fast):
    code, out, _ = falcon_fast("info")
    assert code == 0
    assert "free in /dev/shm" in out
    for piece in (torch.__version__.partition("+")[0], "reference", "C++ kernels", "cifar10-resnet8"):
        assert piece in out
