"""The exceptions that end a command: what they are to a user of the library, and whether every process raises them."""

from __future__ import annotations

import pickle

import pytest

from falcon_fast.errors import (
    FinalError,
    RunStopped,
    SystemFault,
    TemporaryError,
    TrainingError,
    UsageError,
    WriteError,
)

KINDS = {
    UsageError: ValueError,
    TrainingError: RuntimeError,
    SystemFault: OSError,
    WriteError: OSError,
    TemporaryError: Exception,
    RunStopped: Exception,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_of_this_process_alone_unless_it_says_otherwise(kind: type[FinalError]) -> None:
    assert not kind("one line").everywhere and kind("one line", everywhere=True).everywhere
    assert str(kind("one line")) == str(kind("one line", everywhere=True)) == "one line"
    assert isinstance(kind(), KINDS[kind]) and not isinstance(kind(), KeyboardInterrupt)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_reaches_another_process_whole(kind: type[FinalError]) -> None:
    again = pickle.loads(pickle.dumps(kind("one line", everywhere=True)))
    assert (type(again), str(again), again.everywhere) == (kind, "one line", True)
