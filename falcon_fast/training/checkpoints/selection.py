"""Which checkpoint of a run is used: the newest one that is whole and belongs to the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.storage import INDEX

ASIDE = "set-aside-"


class Selected(NamedTuple):
    """The checkpoint that was selected.

    Attributes:
        facts: the contents of its run.json.
        rejected: the newer checkpoints that were not taken, with the reason, newest first.
    """

    path: Path
    facts: dict[str, Any]
    rejected: tuple[tuple[Path, str], ...]

    def notes(self) -> list[str]:
        """Return a line for each checkpoint that was not taken."""
        return [f"{reason}: {self.path.name} is used in its place" for _, reason in self.rejected]


def select(run: Path, unfit: Callable[[dict[str, Any]], str | None] = lambda facts: None) -> Selected:
    """Return the newest checkpoint of a run directory that is whole and fits. Its files are read once, to verify them.

    Args:
        unfit: takes the contents of a run.json, and returns why that checkpoint does not belong to the run, or None.

    Raises:
        UsageError: there is none; the line says what is wrong with the newest one.
    """
    damaged: list[tuple[Path, str]] = []
    foreign: list[tuple[Path, str]] = []
    for path in reversed(candidates(run)):
        try:
            facts = checkpoint.verify(path)
        except UsageError as error:
            damaged.append((path, str(error)))
            continue
        if reason := unfit(facts):
            foreign.append((path, reason))
            continue
        others = [(other, f"checkpoint {other} belongs to another run ({reason})") for other, reason in foreign]
        return Selected(path, facts, tuple(sorted((*damaged, *others), reverse=True)))
    if foreign:
        path, reason = foreign[0]
        raise UsageError(
            f"cannot resume {path}: {reason}: resume with what it had, or start a new run from its weights with --init-from"
        )
    if damaged:
        older = f", and so are {len(damaged) - 1} older" if len(damaged) > 1 else ""
        raise UsageError(f"{damaged[0][1]}{older}, and {run} holds no other: restore a copy, or start a new run")
    checkpoint.complete(run / "checkpoints")  # raises if all have the old format
    raise UsageError(f"{run} holds no complete checkpoint (looked for {run / 'checkpoints' / checkpoint.PREFIX}*)")


def candidates(run: Path) -> list[Path]:
    """Return the directories of a run that hold any file of a checkpoint, whole or not, oldest first."""
    names = (INDEX, "run.json", "shard-*.safetensors")
    return [path for path in checkpoint.named(run / "checkpoints") if any(any(path.glob(name)) for name in names)]


def set_aside(selected: Selected) -> None:
    """Rename the checkpoints that were not taken, so that nothing takes them for the newest ones again. Nothing is deleted."""
    for path, _ in selected.rejected:
        target, number = path.with_name(f"{ASIDE}{path.name}"), 2
        while target.exists():
            target, number = path.with_name(f"{ASIDE}{path.name}-{number}"), number + 1
        path.rename(target)
