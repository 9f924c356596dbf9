"""Differences between configurations, and which of them a resumed run may have."""

from __future__ import annotations

import dataclasses

import pytest

from falcon_fast.config import (
    SECTIONS,
    Change,
    Config,
    OnResume,
    check_allowed,
    differences,
    history_of,
    merged,
    on_resume,
    override,
    refusal,
)
from falcon_fast.errors import UsageError


def test_every_setting_says_whether_it_may_change_when_a_run_is_resumed() -> None:
    """A new field of a section has to be declared with `free`, `asked` or `fixed` (falcon_fast/config/settings.py)."""
    unmarked = [
        f"{section}.{field.name}"
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
        if not isinstance(field.metadata.get("resume"), OnResume)
    ]
    assert not unmarked


def test_what_may_change_and_what_may_not() -> None:
    """A few of each kind, written out: what is learned is never free."""
    for name in (
        "training.epochs",
        "training.device",
        "training.strategy",
        "data.loader",
        "data.workers",
        "log.every_steps",
    ):
        assert on_resume(name) is OnResume.FREE
    for name in ("optimizer.lr", "loss.beta", "loss.prior", "loss.temperature_batch", "data.augmentation"):
        assert on_resume(name) is OnResume.ASKED
    for name in ("model.name", "loss.num_codes", "training.seed", "training.batch_size", "data.source", "recipe"):
        assert on_resume(name) is OnResume.FIXED
    sections = {
        name for name in SECTIONS if all(_rule(name, f) is OnResume.FREE for f in dataclasses.fields(SECTIONS[name]))
    }
    assert sections == {"log", "checkpoint"}


def _rule(section: str, field: dataclasses.Field) -> OnResume:
    return on_resume(f"{section}.{field.name}")


def test_differences_are_named_in_the_order_of_the_file() -> None:
    after = override(Config(recipe="other"), {"training.epochs": 20, "data.loader": "workers", "loss.beta": 2.0})
    found = [str(change) for change in differences(Config(), after)]
    assert found == [
        'recipe: "folder" -> "other"',
        'data.loader: "auto" -> "workers"',
        "loss.beta: 1.0 -> 2.0",
        "training.epochs: 100 -> 20",
    ]
    assert differences(after, after) == []


def test_the_command_comes_before_the_file_and_the_file_before_the_checkpoint() -> None:
    base = override(Config(), {"data.size": 16})
    edited = override(base, {"training.epochs": 20, "training.timeout": 7})
    asked = override(base, {"training.epochs": 30, "data.workers": 2, "data.size": 0})
    found = merged(base, edited, asked)
    assert found == override(base, {"training.epochs": 30, "training.timeout": 7, "data.workers": 2, "data.size": 16})


def test_a_refusal_names_every_change_and_what_to_do() -> None:
    changes = [Change("training.epochs", 1, 2), Change("optimizer.lr", 0.1, 0.2), Change("loss.beta", 1.0, 2.0)]
    line = refusal(changes, ())
    assert line is not None and "training.epochs" not in line and "\n" not in line
    assert "optimizer.lr: 0.1 -> 0.2, loss.beta: 1.0 -> 2.0: change them back" in line
    assert "--allow-change optimizer.lr --allow-change loss.beta" in line and "--init-from" in line
    assert refusal(changes, ("optimizer.lr", "loss.beta")) is None
    partly = refusal(changes, ("optimizer.lr",))
    assert partly is not None and "optimizer.lr" not in partly and "change it back" in partly
    seeded = refusal([*changes, Change("training.seed", 0, 1)], ("optimizer.lr", "loss.beta", "training.seed"))
    assert seeded is not None and seeded.startswith("training.seed: 0 -> 1") and "--allow-change" not in seeded


def test_an_average_cannot_begin_or_end_but_its_decay_may_change() -> None:
    assert Change("optimizer.ema_decay", 0.0, 0.9).rule is OnResume.FIXED
    assert Change("optimizer.ema_decay", 0.9, 0.0).rule is OnResume.FIXED
    assert Change("optimizer.ema_decay", 0.9, 0.99).rule is OnResume.ASKED


def test_names_that_cannot_be_allowed() -> None:
    check_allowed(("optimizer.lr", "training.epochs"))
    for name, words in (("optimizer.rl", "optimizer.lr"), ("lr", "unknown"), ("training.seed", "--init-from")):
        with pytest.raises(UsageError, match=words):
            check_allowed((name,))


def test_only_what_results_depend_on_is_recorded() -> None:
    changes = [Change("training.device", "cpu", "cuda"), Change("training.epochs", 1, 2), Change("loss.beta", 1.0, 2.0)]
    assert history_of(changes, 7) == [
        {"step": 7, "setting": "training.epochs", "before": 1, "after": 2},
        {"step": 7, "setting": "loss.beta", "before": 1.0, "after": 2.0},
    ]
