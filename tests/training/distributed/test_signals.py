"""Signals as requests to stop."""

from __future__ import annotations

import os
import signal
import sys
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


@pytest.fixture(autouse=True)
def _interruptible():
    """Python's own handler: a shell ignores SIGINT for its background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_a_command_is_ended_by_a_signal_and_training_by_a_second_ctrl_c(capfd):
    handlers = [signal.getsignal(number) for number in signals.REQUESTS]
    with signals.immediate_stops():
        signals.stop_line(lambda: "all is kept")
        with signals.immediate_stops(), pytest.raises(signals.Stop):  # the inner one changes nothing
            os.kill(os.getpid(), signal.SIGTERM)
        signals.say_stopped(), signals.say_stopped()
        assert capfd.readouterr().err == "all is kept\n"
    with signals.immediate_stops(), pytest.raises(signals.Stop), signals.stop_requests() as requested:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in signals.REQUESTS] == handlers
    assert not [t for t in threading.enumerate() if t.name == "falcon-fast-signals" and t.is_alive() and not t.daemon]


def test_a_request_that_training_did_not_act_upon_ends_the_command():
    """A signal in the last step, after which training does not ask any more: the evaluation must not begin."""
    reached = []
    with signals.immediate_stops(), pytest.raises(signals.Stop):
        with signals.stop_requests():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end of training")
        reached.append("the evaluation")
    assert reached == ["the end of training"]
    with signals.immediate_stops(), pytest.raises(ZeroDivisionError), signals.stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError


def test_with_other_processes_a_signal_waits_for_the_next_exchange():
    with signals.immediate_stops():
        signals.stop_together(True)
        assert not signals.stop_pending()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_pending()
        with signals.stop_requests() as requested:  # training begins before the next exchange
            assert requested() and not signals.stop_pending()
    with signals.immediate_stops():
        signals.stop_together(True)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stop):
            signals.stop_together(False)  # this process is alone now
    signals.stop_together(True)
    assert not signals.stop_pending()  # outside of a command nothing is asked
    with signals.stop_requests() as requested:  # and what came to a command is forgotten
        assert not requested()


def test_another_thread_handles_no_signals():
    found = []

    def inside():
        with signals.stop_requests("stopping") as requested:
            found.append(requested())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_stop_that_python_drops_in_a_destructor_is_no_traceback(capfd):
    class Closing:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    with signals.immediate_stops():
        Closing(signals.Stop())
        assert capfd.readouterr().err == ""
        before = sys.unraisablehook
    assert sys.unraisablehook is not before
