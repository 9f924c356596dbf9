"""A run put back to where its newest usable checkpoint was written."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from falcon_fast.config import Change, Config, OnResume, config_from, differences, history_of, refusal, validate
from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.selection import Selected, select, set_aside
from falcon_fast.training.run import Run, seed_process
from falcon_fast.training.schedule import Schedule

# The facts that follow from settings: where one of these was changed on purpose, the fact may differ.
FOLLOWS = {
    "temperature": {"loss.temperature_batch", "loss.epsilon"},
    "augmentation": {"data.augmentation"},
    "precision": {"training.precision"},
}
# What a checkpoint holds in addition to facts that must be the same.
NOT_COMPARED = ("settings", "changes", "metrics")
# Facts that the first checkpoints do not hold.
LATER_FACTS = ("seed", "global batch", "augmentation", "view size", "model", "optimizer", "precision", "dictionary")


def restore(run: Run, directory: Path, allowed: Collection[str] = ()) -> tuple[int, float]:
    """Restore `run` in place from the newest checkpoint of its directory that is whole and belongs to it.

    All processes call it together. Checkpoints that cannot be used are renamed, not deleted. `run.notes` gets a line for each of
    them and for each setting that changed, and `run.changes` the changes that the results depend on.

    Args:
        allowed: the settings that may change what is learned from here on (`--allow-change`).

    Returns:
        The number of steps that are done, and the seconds that they took.

    Raises:
        UsageError: there is no such checkpoint, or the run has settings that it may not change.
    """
    processes = run.processes
    selected: Selected | None = None
    with processes.together():
        if processes.main:
            selected = select(directory, lambda facts: unfit(run, facts))
    selected = processes.from_main(selected)  # a shared file system may show the newest one to some processes only
    assert selected is not None
    path, facts = selected.path, selected.facts
    with processes.together():
        before = settings_in(facts, path)
        changes = [] if before is None else differences(before, run.config)
        if line := refusal(changes, allowed):
            raise UsageError(f"{directory} cannot go on from {path.name} with other settings: {line}")
        step = int(facts["step"])
        if step > run.total_steps:
            raise UsageError(
                f"{directory} has done {step} steps already, more than {run.config.training.epochs} epochs have "
                f"({run.total_steps}): ask for --epochs {-(-step // run.clock.steps_per_epoch)} or more"
            )
        seed_process(run, step)
        checkpoint.load(
            path, run.network, run.probe, run.learner.optimizer, run.learner.extra_state(), rank=processes.rank
        )
        if processes.main:
            set_aside(selected)
    run.recorded = facts.get("metrics")
    run.changes = [*facts.get("changes", ()), *history_of(changes, step)]
    run.notes = (*selected.notes(), *_lines(run, before, changes, step), *run.notes)
    return step, float(facts["seconds"])


def settings_in(facts: dict[str, Any], path: Path) -> Config | None:
    """Return the settings that a checkpoint holds; None for one that was written before checkpoints held them.

    Raises:
        UsageError: they are not settings of this version.
    """
    return validate(config_from(facts["settings"], where=f"checkpoint {path}")) if "settings" in facts else None


def unfit(run: Run, facts: dict[str, Any]) -> str | None:
    """Return why a checkpoint does not belong to the run: the first fact about model, data or dictionary that differs."""
    changed: set[str] = set()
    try:
        before = settings_in(facts, Path("run.json"))
    except UsageError as error:
        return str(error)
    if before is not None:
        changes = differences(before, run.config)
        if fixed := [str(change) for change in changes if change.rule is OnResume.FIXED]:
            return ", ".join(fixed)
        changed = {change.name for change in changes}
    for key, value in run.facts.items():
        if key in NOT_COMPARED or (key not in facts and key in LATER_FACTS):
            continue
        if facts.get(key) != value and not changed & FOLLOWS.get(key, set()):
            return f"its {key} was {facts.get(key)}, now it is {value}"
    return None


def _lines(run: Run, before: Config | None, changes: list[Change], step: int) -> Iterator[str]:
    """Yield a line for each change, with what it means for the learning rate."""
    if before is None:
        return
    for change in changes:
        yield str(change)
    if any(change.name == "training.epochs" for change in changes):
        per_epoch = run.clock.steps_per_epoch
        old_schedule = Schedule(before, per_epoch, before.training.epochs * per_epoch)
        new_schedule = Schedule(run.config, per_epoch, run.total_steps)
        old = old_schedule.rate(step).of(before.optimizer.lr) if step else 0.0
        new = new_schedule.rate(min(step + 1, run.total_steps)).of(run.config.optimizer.lr)
        yield (
            f"the learning rate now follows a cosine over {run.config.training.epochs} epochs: it goes from "
            f"{old:.3g} to {new:.3g} at step {step + 1}, so the result is not that of a run of "
            f"{run.config.training.epochs} epochs from the start"
        )
