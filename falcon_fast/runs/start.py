"""How a run starts: in a new directory, from its newest checkpoint, or not at all, because it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from falcon_fast.config import Config, load_config, override, validate
from falcon_fast.data.sources.listing import NAME as LISTING
from falcon_fast.errors import UsageError
from falcon_fast.hardware.host_memory import keep_host_memory
from falcon_fast.runs.directory import (
    check_is_directory,
    create_run_directory,
    keep_result,
    remove_partials,
    write_config,
)
from falcon_fast.runs.lock import RunLock
from falcon_fast.runs.resuming import Resumption, resumption
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.initial import initialise
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.checkpoints.selection import select
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.memory import check_fits
from falcon_fast.training.run import Run, prepare

# Seconds that --continue waits for the run that is still in the directory. NFS needs 90 s to notice that a machine is gone, and
# to release its locks.
PATIENCE = 100.0

How = Literal["new", "resume", "continue"]


def default_directory(config: Config) -> Path:
    """Return the directory of a new run for which the user names none: runs/<recipe>-<time>. Several runs may get this name in
    one second; `create_run_directory(fresh=True)` tells them apart.
    """
    return Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def resumed_config(directory: Path, overrides: Mapping[str, Any], fixed: str | None = None) -> Config:
    """Return what `--resume directory` asks for: the settings of its config.toml with the options of the command.

    Args:
        overrides: `section.key` to value.
        fixed: another option that was given although a resumed run cannot change it, by name.

    Raises:
        UsageError: such an option was given, or the directory holds no run.
    """
    if fixed:
        raise UsageError(
            f"--resume continues a run with its own recipe and directory: {fixed} cannot change, leave it out"
        )
    check_is_directory(directory, f"--resume {directory}")
    return validate(override(load_config(directory / "config.toml"), overrides))


@dataclass(frozen=True)
class Begun:
    """A run that is ready to train.

    Attributes:
        directory: its run directory, whose lock process 0 holds.
        step: optimisation steps that are done already.
        seconds: seconds of training that they took.
    """

    run: Run
    directory: Path
    step: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield the run's notes, then two lines on what is about to run."""
        run, config, source = self.run, self.run.config, self.run.source
        training, loss = config.training, config.loss
        yield from run.notes
        yield (
            f"recipe {config.recipe}: {len(source.train.images)} images to train on, {len(source.test.images)} to test on, "
            f"{source.size} px; {config.model.name}, f = {loss.embedding_dim}, c = {loss.num_codes} {loss.codes} codes, "
            f"tau = {config.tau:.4g}"
        )
        how = str(run.precision)
        how += ", compiled" if training.compile else ""
        how += ", a CUDA graph" if training.cuda_graph else ""
        how += f", {training.accumulate} micro-batches a step" if training.accumulate > 1 else ""
        beginning = f"from step {self.step} of " if self.step else ""
        yield (
            f"{beginning}{run.total_steps} steps of {training.batch_size} images on {run.place}, {how}, loader {run.loader}; "
            f"run directory {self.directory}"
        )


def begin(
    config: Config,
    directory: Path,
    how: How,
    processes: Processes,
    lock: RunLock,
    say: Callable[[str], None],
    allowed: Collection[str] = (),
    fresh: bool = False,
) -> Begun | None:
    """Take the run directory, build the run, and restore its newest checkpoint if it has begun. All processes call it together.

    Args:
        config: the configuration that the command asks for.
        directory: its run directory.
        how: new: in an empty directory; resume: from the newest checkpoint; continue: whichever of the two fits.
        lock: the lock of the directory. Process 0 takes it before anything is written.
        say: takes a line for the user while this waits for another run.
        allowed: settings that a resumed run may change although they change what is learned (`--allow-change`).
        fresh: the directory of a new run gets a number after its name if another run has the name.

    Returns:
        The run, or None if it is finished already.

    Raises:
        UsageError: the directory holds something else, another run trains there, or the run cannot be built or restored.
    """
    found = Resumption("new", config)
    if how != "new":
        with processes.together():
            if processes.main:
                found = _found(config, directory, how, lock, allowed, say)
        found = processes.from_main(found)
    if found.state == "finished" and how == "continue":
        return None
    begun = found.state != "new"
    run = prepare(found.config, processes, listing=directory / LISTING if begun else None)
    with processes.together():
        check_fits(run)
    keep_host_memory(run.device)
    step, seconds = restore(run, directory, allowed) if begun else (0, 0.0)
    if not begun:
        initialise(run)
    with processes.together():
        if processes.main and begun:
            run.notes = (*_write_change(directory, run.config, found.extends), *run.notes)
        elif processes.main:
            directory = create_run_directory(directory, run.config, again=lock.held, lock=lock, fresh=fresh)
    return Begun(run, processes.from_main(directory), step, seconds)


def _found(
    config: Config, directory: Path, how: How, lock: RunLock, allowed: Collection[str], say: Callable[[str], None]
) -> Resumption:
    """Return how the run in the directory goes on, after any run that is still there has ended."""
    if how == "resume":
        lock.take()
        found = resumption(directory, config, allowed)
        if found.state == "new":
            select(directory)  # raises: there is nothing to resume
        return found
    found = resumption(directory, config, allowed)
    if found.state != "finished" and directory.is_dir():
        lock.take(PATIENCE, say)
        found = resumption(directory, config, allowed)  # as the run that held the lock left it
    return found


def _write_change(directory: Path, config: Config, extends: int | None) -> tuple[str, ...]:
    """Bring the directory of a resumed run up to date: config.toml, and the result of an earlier end. Return lines about it."""
    remove_partials(directory)
    if load_config(directory / "config.toml") != config:
        write_config(directory, config)
    if extends is None or (name := keep_result(directory, extends)) is None:
        return ()
    return (f"the run was finished after {extends} epochs and is extended; the figures of that end are kept in {name}",)


def how_to_continue(directory: Path) -> str:
    """Return the line that tells what a stopped run has kept, and how it is continued."""
    if (directory / "result.json").exists():
        return f"stopped; {directory} is finished: its figures are in {directory / 'result.json'}"
    if checkpoint.complete(directory / "checkpoints"):  # a second Ctrl-C does not wait for the first checkpoint
        return f"stopped; continue with: falcon-fast train --resume {directory}"
    return (
        f"stopped; no checkpoint had been written: begin again with the same options, --run-dir {directory} and --continue"
        if directory.exists()
        else "stopped before anything was written"
    )
