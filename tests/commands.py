"""Fixtures for tests of the command line: commands run in this process, and a whole tiny run."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from falcon_fast.cli import main as cli

TINY = ["--set", "model.width=4", "--embedding-dim", "32", "--num-codes", "64", "--epochs", "2", "--no-amp"]


@pytest.fixture
def falcon_fast(monkeypatch, capsys):
    """A function that runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["falcon-fast", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return int(code), out.out, out.err  # type: ignore[call-overload]

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole tiny run on the digits: its directory, which no test may change, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, "-m", "falcon_fast", "train", *TINY, "--run-dir", str(directory)]
    # Outside the repository, where the installed package and not the clone is imported.
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the directory of the whole tiny run."""
    return shutil.copytree(finished[0], tmp_path / "copy")
