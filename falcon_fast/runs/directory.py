"""A run directory: created empty, filled by training, and whose results are there whole or not at all.

config.toml            the resolved configuration
metrics.csv            one row for each logged step (columns: falcon_fast/training/records/metrics_file.py)
tensorboard/           the same rows as events, for `tensorboard --logdir RUN` (log.tensorboard)
images.jsonl.gz        the image files as they were when the run began
quarantine.csv         the training images that cannot be decoded, if there are any
checkpoints/           the newest complete checkpoints
result.json            the figures of the final evaluation
result-N-epochs.json   those of an earlier end, after N epochs, of a run that was extended
evaluation.json        the figures of the newest `falcon-fast evaluate`
curves.png             loss, codes in use, online probe and NMI against epochs
backbone.safetensors   the trained backbone alone, without the projector
.lock                  held while a run trains here
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from falcon_fast.config import Config, dump_config
from falcon_fast.errors import UsageError, WriteError
from falcon_fast.files import written_whole
from falcon_fast.runs.lock import NAME as LOCK
from falcon_fast.runs.lock import RunLock
from falcon_fast.training.checkpoints.selection import candidates

State = Literal["new", "begun", "finished"]


def create_run_directory(
    path: Path, config: Config, again: bool = False, lock: RunLock | None = None, fresh: bool = False
) -> Path:
    """Make an empty run directory, take its `lock`, and write config.toml there. Return the directory.

    Args:
        again: accept a directory in which a run died before its first checkpoint, and whose lock is held already.
        lock: the lock of the directory; None for no lock.
        fresh: if another run has the name already, make a directory with a number after the name instead.

    Raises:
        UsageError: the directory has other contents, cannot be written, or another run has just begun there.
    """
    try:
        if fresh:
            path = _make_fresh(path)
            if lock is not None:
                lock.aim(path)
        elif not again and _occupied(path):
            raise UsageError(f"run directory {path} is not empty: choose another, or continue it with --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take()
        remove_partials(path)
        write_config(path, config)
    except WriteError as error:
        raise UsageError(f"{error}; or choose another --run-dir") from None
    except OSError as error:
        raise UsageError(
            f"run directory {path} cannot be written: {error.strerror}; choose another --run-dir"
        ) from None
    return path


def check_is_directory(path: Path, what: str) -> None:
    """Raise UsageError, which begins with `what`, if `path` is no directory or cannot be looked at."""
    try:
        if path.is_dir():
            return
        reason = "is not a directory" if path.exists() else "no such run directory"
    except OSError as error:  # no permission, or a name that is too long
        reason = error.strerror or str(error)
    raise UsageError(f"{what}: {reason}")


def _make_fresh(path: Path) -> Path:
    """Make the directory `path`, or path-2, path-3, ..., the first that does not exist, and return it.

    mkdir fails if the directory exists, also between machines on a network file system. So no two runs get one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir()
            break
    return candidate


def write_config(path: Path, config: Config) -> None:
    """Write config.toml to a run directory, completely or not at all. Raises WriteError."""
    with written_whole(path / "config.toml") as partial:
        partial.write_text(dump_config(config), encoding="utf-8")


def keep_result(path: Path, epochs: int) -> str | None:
    """Rename the result.json of a run that trains on after its end, and return its new name; None if there is none.

    epochs: how many the result is of. From here on the run counts as begun, and no longer as finished.
    """
    name = f"result-{epochs}-epochs.json"
    try:
        (path / "result.json").replace(path / name)
    except FileNotFoundError:
        return None
    return name


def _occupied(path: Path) -> bool:
    """Whether the directory holds anything except what a killed process left."""
    if not path.is_dir():
        return path.exists()
    return any(entry.name != LOCK and not entry.name.endswith(".partial") for entry in path.iterdir())


def remove_partials(path: Path) -> None:
    """Remove the half-written files that a killed process left in a run directory."""
    for left in path.glob(".*.partial"):
        left.unlink()


def state_of(path: Path) -> State:
    """Return the state of the run in `path`: "new", "begun" (there is a checkpoint) or "finished" (there is a result).

    Raises:
        UsageError: the directory holds something else.
    """
    try:
        if not (path / "config.toml").exists():
            if _occupied(path):
                raise UsageError(f"{path} holds something other than a run: choose another --run-dir")
            return "new"
    except OSError as error:
        raise UsageError(f"run directory {path} cannot be read: {error.strerror}; choose another --run-dir") from None
    if (path / "result.json").exists():
        return "finished"
    return "begun" if candidates(path) else "new"


def json_text(value: Any) -> str:
    """Return JSON. Dataclasses and named tuples become objects; NaN and infinity become null, which every JSON reader accepts."""

    def plain(x: Any) -> Any:
        if dataclasses.is_dataclass(x):
            return {field.name: plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
        if isinstance(x, dict) or hasattr(x, "_asdict"):
            return {name: plain(each) for name, each in (x if isinstance(x, dict) else x._asdict()).items()}
        if isinstance(x, list | tuple):
            return [plain(each) for each in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), indent=1, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` completely or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    text = json_text(value) + "\n"
    with written_whole(path, len(text)) as partial:
        partial.write_text(text, encoding="utf-8")
