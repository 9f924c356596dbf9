"""Signals as requests to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from falcon_fast.training.distributed import signals


def test_a_stop_is_asked_for_though_nobody_can_be_told(monkeypatch):
    def gone(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with signals.stop_requests("stopping") as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()


def test_the_first_signal_is_answered_with_a_line_and_the_second_ctrl_c_acts(capfd):
    handlers = [signal.getsignal(number) for number in signals.REQUESTS]
    with signals.stop_requests("stopping") as requested:
        assert not requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested() and capfd.readouterr().err == "\nstopping\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in signals.REQUESTS] == handlers


def test_another_thread_handles_no_signals():
    found = []

    def inside():
        with signals.stop_requests("stopping") as requested:
            found.append(requested())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]
