"""When a run logs, tests and saves."""

from __future__ import annotations

import pytest

from falcon_fast.config import load_recipe, override
from falcon_fast.training.schedule import Schedule


def schedule(**settings) -> Schedule:
    changes = {"training.epochs": 3, "log.every_steps": 4, "log.evaluate_epochs": 2, "checkpoint.every_steps": 7}
    changes |= {key.replace("__", "."): value for key, value in settings.items()}
    return Schedule(override(load_recipe("digits"), changes), 10, 30)


def steps(holds) -> list[int]:
    return [step for step in range(1, 31) if holds(step)]


def test_what_happens_at_which_step():
    mine = schedule()
    assert steps(mine.tests) == [20, 30]
    assert steps(mine.logs) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert steps(mine.saves) == [7, 14, 21, 28, 30]
    assert steps(mine.is_last) == [30]


def test_zero_stands_for_the_end_alone_or_for_every_epoch():
    mine = schedule(log__evaluate_epochs=0, checkpoint__every_steps=0, log__every_steps=100)
    assert steps(mine.tests) == steps(mine.logs) == [30] and steps(mine.saves) == [10, 20, 30]


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    mine = schedule(optimizer__lr=0.1, optimizer__warmup_epochs=0.5, optimizer__warmup_lr=0.05)
    rates = [mine.rate(step).of(0.1) for step in range(1, 31)]
    assert rates[:6] == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.0005
    probe = [mine.rate(step).of(1.0) for step in range(1, 31)]  # from the same start to its own peak
    assert probe[:6] == pytest.approx([0.05, 0.24, 0.43, 0.62, 0.81, 1.0])
    assert probe[5:] == pytest.approx([10 * rate for rate in rates[5:]])
