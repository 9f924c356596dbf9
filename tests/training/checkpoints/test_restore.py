"""What a resumed run must have in common with its checkpoint."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from falcon_fast.errors import UsageError
from falcon_fast.training import trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore

from ..tiny import QUIET, prepared, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has made one checkpoint."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("whole") / "run"
    run = start(directory, training__epochs=1)
    trainer.train(run, directory, QUIET)
    return run, directory


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"training__seed": 1}, "training.seed: 0 -> 1"),
        ({"loss__temperature_batch": 16}, "loss.temperature_batch: 8 -> 16"),
        ({"loss__num_codes": 128}, "loss.num_codes: 64 -> 128"),
        ({"optimizer__name": "adam"}, 'optimizer.name: "adamw" -> "adam"'),
        ({"training__precision": "bf16"}, 'training.precision: "auto" -> "bf16"'),
        ({"loss__activation": "l2"}, 'loss.activation: "tanh" -> "l2"'),
    ],
)
def test_resuming_with_something_else_is_refused(whole, changes, what):
    with pytest.raises(UsageError, match=re.escape(what)):
        restore(prepared(**changes), whole[1])


def test_codes_are_told_apart_that_are_called_alike(whole):
    """Codes of another generator, for example: the hash differs although every setting is the same."""
    run = prepared()
    run.codes.words.bitwise_not_()
    with pytest.raises(UsageError, match="its codes was"):
        restore(run, whole[1])


def test_resuming_with_other_data_is_refused(whole):
    run = prepared()
    other = dataclasses.replace(run, source=dataclasses.replace(run.source, fingerprint="other"))
    with pytest.raises(UsageError, match="its data was"):
        restore(other, whole[1])


def test_the_steps_and_the_seconds_come_back(whole):
    step, seconds = restore(prepared(training__epochs=1), whole[1])
    facts = checkpoint.read_facts(checkpoint.latest(whole[1]))
    assert (step, seconds) == (11, facts["seconds"]) and seconds > 0
