"""A run directory: created empty, filled by training, and whose results are there whole or not at all.

config.toml            the resolved configuration
metrics.csv            one row for each logged step (columns: falcon_fast/training/records/metrics_file.py)
tensorboard/           the same rows as events, for `tensorboard --logdir RUN` (log.tensorboard)
images.jsonl.gz        the image files as they were when the run began
quarantine.csv         the training images that cannot be decoded, if there are any
checkpoints/           the newest complete checkpoints
result.json            the figures of the final evaluation
evaluation.json        the figures of the newest `falcon-fast evaluate`
curves.png             loss, codes in use, online probe and NMI against epochs
backbone.safetensors   the trained backbone alone, without the projector
.lock                  held while a run trains here
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from falcon_fast.config import Config, dump_config, load_config
from falcon_fast.errors import UsageError
from falcon_fast.runs.lock import NAME as LOCK
from falcon_fast.runs.lock import RunLock
from falcon_fast.training.checkpoints import checkpoint

# The settings that a resumed run may change: where its images are and where it works, not what it learns.
CHANGEABLE = frozenset(
    {
        "data.path",
        "data.loader",
        "data.workers",
        "data.resident_mib",
        "data.photometric",
        "data.max_bad_fraction",
        "data.max_pixels",
        "training.device",
        "training.strategy",
        "training.timeout",
    }
)

State = Literal["new", "begun", "finished"]


def create_run_directory(path: Path, config: Config, again: bool = False, lock: RunLock | None = None) -> None:
    """Make an empty run directory, take its `lock`, and write config.toml there.

    Args:
        again: accept a directory in which a run died before its first checkpoint, and whose lock is held already.
        lock: the lock of the directory; None for no lock.

    Raises:
        UsageError: the directory has other contents, cannot be written, or another run has just begun there.
    """
    partial = path / ".config.toml.partial"
    try:
        if not again and _occupied(path):
            raise UsageError(f"run directory {path} is not empty: choose another, or continue it with --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take()
        remove_partials(path)
        try:
            partial.write_text(dump_config(config), encoding="utf-8")
            partial.replace(path / "config.toml")
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"run directory {path} cannot be written: {error.strerror}; choose another --run-dir"
        ) from None


def _occupied(path: Path) -> bool:
    """Whether the directory holds anything except what a killed process left."""
    if not path.is_dir():
        return path.exists()
    return any(entry.name != LOCK and not entry.name.endswith(".partial") for entry in path.iterdir())


def remove_partials(path: Path) -> None:
    """Remove the half-written files that a killed process left in a run directory."""
    for left in path.glob(".*.partial"):
        left.unlink()


def state_of(path: Path, config: Config) -> State:
    """Return the state of a run of `config` in `path`: "new", "begun" (there is a checkpoint) or "finished".

    Raises:
        UsageError: the directory holds something else, or a run that differs in a setting outside CHANGEABLE.
    """
    if not (path / "config.toml").exists():
        if _occupied(path):
            raise UsageError(f"{path} holds something other than a run: choose another --run-dir")
        return "new"
    theirs = dataclasses.asdict(load_config(path / "config.toml"))
    mine = dataclasses.asdict(config)
    if not mine["data"]["size"]:  # theirs is resolved: the size of the source
        mine["data"]["size"] = theirs["data"]["size"]
    if mine.pop("recipe") != (recipe := theirs.pop("recipe")):
        raise UsageError(f"{path} holds a run of recipe {recipe}, not {config.recipe}: choose another --run-dir")
    for section, settings in theirs.items():
        for key, value in settings.items():
            if (name := f"{section}.{key}") not in CHANGEABLE and mine[section][key] != value:
                raise UsageError(
                    f"{path} holds a run whose {name} is {value!r}, not {mine[section][key]!r}: choose another --run-dir"
                )
    if (path / "result.json").exists():
        return "finished"
    return "begun" if checkpoint.complete(path / "checkpoints") else "new"


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all. NaN and infinity become null, which every JSON reader accepts."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
