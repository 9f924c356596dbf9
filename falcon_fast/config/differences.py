"""The differences between two configurations, and which of them a resumed run may have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from falcon_fast.config.assignments import all_keys, nearest, override
from falcon_fast.config.settings import SECTIONS, Config, OnResume, on_resume
from falcon_fast.errors import UsageError


class Change(NamedTuple):
    """A setting with two values. Printed as `training.epochs: 10 -> 20`."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.after))
        return f"{self.name}: {before} -> {after}"

    @property
    def rule(self) -> OnResume:
        """Whether a resumed run may have this change."""
        if self.name == "optimizer.ema_decay" and not (self.before and self.after):
            return OnResume.FIXED  # an average of the weights cannot begin or end in the middle of a run
        return on_resume(self.name)


def as_tables(config: Config) -> dict[str, Any]:
    """Return a configuration as nested dictionaries of plain values, which JSON and TOML can hold."""
    return dataclasses.asdict(config)


def differences(before: Config, after: Config) -> list[Change]:
    """Return the settings whose values differ, in the order of config.toml; the recipe's name counts as a setting."""
    found = [Change("recipe", before.recipe, after.recipe)] if before.recipe != after.recipe else []
    for section in SECTIONS:
        old, new = (dataclasses.asdict(getattr(config, section)) for config in (before, after))
        found += [Change(f"{section}.{key}", old[key], new[key]) for key in old if old[key] != new[key]]
    return found


def merged(base: Config, edited: Config, asked: Config) -> Config:
    """Return `base` with the values that `edited` changes, and then those that `asked` changes.

    base: the settings that a checkpoint holds; edited: those of config.toml; asked: those of the command line. A size of 0, which
    stands for the size of the source, is no change.
    """
    result = base
    for other in (edited, asked):
        changes = {
            change.name: change.after
            for change in differences(base, other)
            if change.name != "recipe" and not (change.name == "data.size" and change.after == 0)
        }
        result = override(result, changes)
        if other.recipe != base.recipe:
            result = dataclasses.replace(result, recipe=other.recipe)
    return result


def check_allowed(names: Collection[str]) -> None:
    """Check the names that `--allow-change` was given.

    Raises:
        UsageError: a name is unknown, or the setting cannot change in any resumed run.
    """
    for name in names:
        if name not in all_keys():
            raise UsageError(f"--allow-change {name}: unknown setting: {nearest(name, all_keys())}")
        if on_resume(name) is OnResume.FIXED:
            raise UsageError(
                f"--allow-change {name}: this cannot change in a run that has begun; start a new run from its weights with "
                "--init-from RUN"
            )


def refusal(changes: Iterable[Change], allowed: Collection[str]) -> str | None:
    """Return a line that names every change that a resumed run may not have, with what to do; None if it may have all.

    allowed: the names that `--allow-change` was given.
    """
    refused = [change for change in changes if change.rule is not OnResume.FREE and change.name not in allowed]
    refused += [change for change in changes if change.rule is OnResume.FIXED and change.name in allowed]
    if not refused:
        return None
    askable = [f"--allow-change {change.name}" for change in refused if change.rule is OnResume.ASKED]
    fixed = [change.name for change in refused if change.rule is OnResume.FIXED]
    remedies = ["change them back" if len(refused) > 1 else "change it back"]
    if askable and not fixed:
        remedies.append(f"say that you want it with {' '.join(askable)}")
    remedies.append("start a new run from the weights with --init-from RUN")
    return f"{', '.join(map(str, refused))}: {', or '.join(remedies)}"


def history_of(changes: Iterable[Change], step: int) -> list[Mapping[str, Any]]:
    """Return the changes that a run's results depend on, as they are recorded: what changed after how many steps."""
    return [
        {"step": step, "setting": change.name, "before": change.before, "after": change.after}
        for change in changes
        if change.rule is OnResume.ASKED or change.name in ("training.epochs", "training.init_from")
    ]
