"""Signals end every command with one line and exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from falcon_fast.cli import entry
from falcon_fast.cli import main as cli

# A command that says where it is and then waits, as one that works would.
WAITING = """
import sys, time, threading
from falcon_fast.cli import entry, main
from falcon_fast.training.distributed import signals

def command():
    signals.stop_line(lambda: "stopped; all is kept")
    print("here", flush=True)
    {body}

main.cli = command
entry.main()
"""
SLEEPING = "time.sleep(60)"
# The exception that a signal raises in a destructor is dropped by Python; the command goes on.
DROPPED = """
    class Slow:
        def __del__(self):
            print("inside", flush=True); time.sleep(1.0)
    Slow()
    time.sleep(60)
"""
STUCK = "signals.GRACE = 0.5; threading.Thread(target=lambda: time.sleep(60)).start(); time.sleep(60)"
HOLDING = """
    signals.GRACE = 0.5
    try:
        time.sleep(60)
    finally:
        time.sleep(60)
"""


def stopped(body: str, number: signal.Signals, again: bool = False, word: str = "here") -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != word:
        assert process.poll() is None
    process.send_signal(number)
    if again:
        time.sleep(0.2)
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_one_line_and_exit_code_130(number):
    assert stopped(SLEEPING, number) == (130, "stopped; all is kept\n")


@pytest.mark.parametrize(
    ("body", "again", "word"),
    [(DROPPED, False, "inside"), (STUCK, False, "here"), (HOLDING, False, "here"), (HOLDING, True, "here")],
    ids=["dropped in a destructor", "a thread that does not end", "closing takes long", "a second Ctrl-C"],
)
def test_whatever_hinders_it_the_command_ends(body, again, word):
    code, err = stopped(body, signal.SIGINT, again, word)
    assert code == 130 and err.count("stopped; all is kept\n") == 1


def test_a_signal_while_torch_is_imported_is_one_line():
    process = subprocess.Popen([sys.executable, "-m", "falcon_fast", "info"], stderr=subprocess.PIPE, text=True)
    while "torch" not in open(f"/proc/{process.pid}/maps").read():  # noqa: PTH123, SIM115
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped; nothing was written\n")


def test_output_that_nobody_reads_does_not_change_the_exit_code(tmp_path):
    code = "from falcon_fast.cli import entry, main; main.cli = lambda: print('x' * 10); entry.main()"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert subprocess.run([sys.executable, "-c", code], stdout=full, timeout=60).returncode == 0


def test_the_exit_code_of_an_error_is_the_commands(monkeypatch):
    ended = []
    monkeypatch.setattr(entry, "ignore_signals", lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(cli, "main", lambda: sys.exit(74))
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 74 and ended == []
    assert not any(thread.name == "falcon-fast-signals" and not thread.daemon for thread in threading.enumerate())
