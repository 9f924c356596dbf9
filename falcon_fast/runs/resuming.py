"""What a run goes on with: its checkpoint's settings, the edits of its config.toml, and the options of the command.

The checkpoint holds the settings that the run had. Whatever config.toml or the command say differently is a change, and each
setting declares whether a resumed run may have it (`falcon_fast/config/settings.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from falcon_fast.config import (
    Config,
    OnResume,
    differences,
    load_config,
    merged,
    override,
    refusal,
    validate,
)
from falcon_fast.errors import UsageError
from falcon_fast.runs.directory import State, state_of
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import settings_in
from falcon_fast.training.checkpoints.selection import Selected, candidates, select


class Resumption(NamedTuple):
    """How a run goes on.

    Attributes:
        state: new if it has to begin again, because it died before its first checkpoint.
        config: the settings that it goes on with.
        extends: epochs that the run had when it finished, if it now trains for more; else None.
    """

    state: State
    config: Config
    extends: int | None = None


def resumption(directory: Path, asked: Config, allowed: Collection[str]) -> Resumption:
    """Return how the run in `directory` goes on if `asked` is what the command asks for. Nothing is written.

    allowed: the settings that `--allow-change` named.

    Raises:
        UsageError: settings differ that may not, or no checkpoint can be used; one line names them all.
    """
    state = state_of(directory)
    if not (directory / "config.toml").exists():
        return Resumption(state, asked)
    edited = load_config(directory / "config.toml")
    if edited.recipe != asked.recipe:
        raise UsageError(
            f"{directory} holds a run of recipe {edited.recipe}, not {asked.recipe}: choose another --run-dir"
        )
    base = edited
    if candidates(directory):
        try:
            base = _settings_before(directory, edited) or edited
        except UsageError:
            if state != "finished" or asked.training.epochs > edited.training.epochs:
                raise
    config = validate(merged(base, edited, asked))
    if line := refusal(differences(base, config), allowed):
        raise UsageError(f"{directory} holds a run with other settings: {line}")
    extends = None
    if state == "finished" and config.training.epochs > base.training.epochs:
        state, extends = "begun", base.training.epochs
    return Resumption(state, config, extends)


def fitting(directory: Path, edited: Config) -> Selected:
    """Return the newest checkpoint that is whole and belongs to the run.

    A checkpoint of another network or other data is passed over if an older one fits config.toml. If none fits, config.toml was
    edited, and the newest one counts.

    edited: the settings of config.toml.

    Raises:
        UsageError: there is no whole checkpoint.
    """

    def unfit(facts: dict[str, Any]) -> str | None:
        before = settings_in(facts, Path("run.json"))
        changes = [] if before is None else differences(before, edited)
        return next((str(change) for change in changes if change.rule is OnResume.FIXED), None)

    try:
        return select(directory, unfit)
    except UsageError:
        return select(directory)


def _settings_before(directory: Path, edited: Config) -> Config | None:
    """Return the settings in the run's checkpoint; None if it was written before checkpoints held settings."""
    selected = fitting(directory, edited)
    return settings_in(selected.facts, selected.path)


def trained_settings(selected: Selected, edited: Config) -> tuple[Config, tuple[str, ...]]:
    """Return the settings by which a checkpoint is evaluated, and a line if config.toml has edits that cannot apply to it.

    They are those of the checkpoint, with what config.toml changes of where and how it is computed.
    """
    before = settings_in(selected.facts, selected.path)
    if before is None:
        return edited, ()
    changes = differences(before, edited)
    free = {change.name: change.after for change in changes if change.rule is OnResume.FREE}
    other = ", ".join(str(change) for change in changes if change.rule is not OnResume.FREE)
    note = f"config.toml was edited after {selected.path.name} was written, which is evaluated without these edits: {other}"
    return override(before, free), (note,) if other else ()


def expected(directory: Path, asked: Config) -> Config:
    """Return the settings that the run in `directory` will probably go on with, before its lock is held; `asked` if it is new.

    Processes meet by these settings (device, strategy, timeout), and refuse others later (`resumption`).
    """
    try:
        edited = load_config(directory / "config.toml")
        path = checkpoint.latest(directory)
        base = settings_in(checkpoint.read_facts(path), path) or edited
        return validate(merged(base, edited, asked))
    except UsageError:
        return asked


def newest_run(root: Path, recipe: str, data: str | None) -> Path:
    """Return the run below `root` for `--resume auto`: of all runs of the recipe with a complete checkpoint, the one whose newest
    checkpoint was written last.

    data: absolute path that the run's images must have; None for any.

    Raises:
        UsageError: there is no such run.
    """
    found: list[tuple[int, str, Path]] = []
    for path in root.glob("*/config.toml"):
        run = path.parent
        try:
            config, newest = load_config(path), checkpoint.latest(run) / "run.json"
            written = newest.stat().st_mtime_ns
        except (UsageError, OSError):
            continue
        if config.recipe == recipe and (data is None or config.data.path == data):
            found.append((written, run.name, run))
    if not found:
        of_data = "" if data is None else f" on {data}"
        raise UsageError(
            f"--resume auto: {root} holds no run of recipe {recipe}{of_data} with a complete checkpoint: start one without "
            "--resume, or name its directory"
        )
    return max(found)[2]
