"""One run at a time in a run directory. The other one is a process: POSIX locks do not keep a process from itself."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from falcon_fast.errors import UsageError
from falcon_fast.runs.lock import RunLock

from ..fuzz import COUNTS, MIB, fuzz

HOLDER = """
import sys
from pathlib import Path
from falcon_fast.runs.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_run(directory):
    """A process that holds the lock until its input ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_who_has_it_is_named_and_killed_keeps_nothing(tmp_path):
    with another_run(tmp_path) as process, RunLock(tmp_path) as lock:
        with pytest.raises(UsageError, match=f"^process {process.pid} on .* trains in .*choose another --run-dir"):
            lock.take()
        assert not lock.held
        process.kill()
        process.wait()
        lock.take()
        assert lock.held
    assert not list(tmp_path.iterdir())


def test_it_waits_for_the_end_of_the_other_run(tmp_path):
    said: list[str] = []
    with another_run(tmp_path) as process, RunLock(tmp_path) as lock:
        threading.Timer(0.5, process.stdin.close).start()
        lock.take(patience=60, say=said.append)
        assert lock.held and len(said) == 1 and "waiting up to 60 s" in said[0]
    assert not list(tmp_path.iterdir())


def test_without_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    with RunLock(tmp_path) as lock:
        lock.take()
        assert lock.held


def test_what_cannot_be_written_is_said(tmp_path):
    with RunLock(tmp_path / "nowhere" / "run") as lock, pytest.raises(UsageError, match="cannot be written: No such"):
        lock.take()


@pytest.mark.parametrize("kind", ["a link", "a broken link", "a FIFO", "a directory"])
def test_a_lock_that_is_no_file_is_one_line_and_nothing_changes(tmp_path, kind):
    """The run directory of a stranger may hold a link to any file of the user, which taking the lock would have emptied."""
    directory, precious = tmp_path / "run", tmp_path / "precious"
    directory.mkdir()
    lock = directory / ".lock"
    if kind == "a link":
        precious.write_text("precious")
        lock.symlink_to(precious)
    elif kind == "a broken link":
        lock.symlink_to(precious)
    elif kind == "a FIFO":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with (
        pytest.raises(UsageError, match=r"cannot be written: .*choose another --run-dir") as caught,
        RunLock(directory) as held,
    ):
        held.take()
    assert "\n" not in str(caught.value)
    assert precious.exists() == (kind == "a link") and (kind != "a link" or precious.read_text() == "precious")


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_of_the_holders_name_are_a_name(tmp_path, count):
    (tmp_path / ".lock").write_text("process 12345 on machine.example.org")
    lock = RunLock(tmp_path)

    def read():
        assert (name := lock._holder()) and name.isprintable() and len(name) <= 1024

    outcome = fuzz(read, [tmp_path / ".lock"], count, name=".lock", memory=16 * MIB)
    assert outcome.accepted == count
