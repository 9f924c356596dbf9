"""How a run starts: in a new directory, from its newest checkpoint, or not at all, because it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from falcon_fast.config import Config, load_config, override, validate
from falcon_fast.data.sources.listing import NAME as LISTING
from falcon_fast.errors import UsageError
from falcon_fast.hardware.host_memory import keep_host_memory
from falcon_fast.runs.directory import CHANGEABLE, State, create_run_directory, remove_partials, state_of
from falcon_fast.runs.lock import RunLock
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.run import Run, prepare

# Seconds that --continue waits for the run that is still in the directory. NFS needs 90 s to notice that a machine is gone, and
# to release its locks.
PATIENCE = 100.0

How = Literal["new", "resume", "continue"]


def default_directory(config: Config) -> Path:
    """Return the directory of a new run for which the user names none: runs/<recipe>-<time>."""
    return Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def resumed_config(directory: Path, overrides: Mapping[str, Any], fixed: str | None = None) -> Config:
    """Return the configuration of the run in `directory`, with those settings changed that a resumed run may change.

    Args:
        overrides: `section.key` to value.
        fixed: another option that was given although a resumed run cannot change it, by name.

    Raises:
        UsageError: a setting outside CHANGEABLE would change, or the directory holds no run.
    """
    extra = sorted(set(overrides) - CHANGEABLE)
    if extra or fixed:
        raise UsageError(
            f"--resume continues a run with its own settings: {extra[0] if extra else fixed} cannot change "
            "(only --data, --device, --strategy, --loader, the other settings of loading and colours, and training.timeout can)"
        )
    if not directory.is_dir():
        raise UsageError(f"--resume {directory}: no such run directory")
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
    config: Config, directory: Path, how: How, processes: Processes, lock: RunLock, say: Callable[[str], None]
) -> Begun | None:
    """Take the run directory, build the run, and restore its newest checkpoint if it has begun. All processes call it together.

    Args:
        config: the configuration of the run.
        directory: its run directory.
        how: new: in an empty directory; resume: from the newest checkpoint; continue: whichever of the two fits.
        lock: the lock of the directory. Process 0 takes it before anything is written.
        say: takes a line for the user while this waits for another run.

    Returns:
        The run, or None if it is finished already.

    Raises:
        UsageError: the directory holds something else, another run trains there, or the run cannot be built or restored.
    """
    if how == "resume":
        with processes.together():
            if processes.main:
                lock.take()
    state = _state_found(config, directory, processes, lock, say) if how == "continue" else ""
    if state == "finished":
        return None
    begun = how == "resume" or state == "begun"
    run = prepare(config, processes, listing=directory / LISTING if begun else None)
    keep_host_memory(run.device)
    step, seconds = restore(run, directory) if begun else (0, 0.0)
    with processes.together():
        if processes.main and begun:
            remove_partials(directory)
        elif processes.main:
            create_run_directory(directory, run.config, again=lock.held, lock=lock)
    return Begun(run, directory, step, seconds)


def _state_found(
    config: Config, directory: Path, processes: Processes, lock: RunLock, say: Callable[[str], None]
) -> State:
    """Return the state of the run directory after any run that is still there has ended, the same in every process."""
    state: State = "new"
    with processes.together():
        if processes.main:
            state = state_of(directory, config)
            if state != "finished" and directory.is_dir():
                lock.take(PATIENCE, say)
                state = state_of(directory, config)  # as the run that held the lock left it
    return processes.from_main(state)


def how_to_continue(directory: Path) -> str:
    """Return the line that tells how a stopped run is continued."""
    if checkpoint.complete(directory / "checkpoints"):  # a second Ctrl-C does not wait for the first checkpoint
        return f"stopped; continue with: falcon-fast train --resume {directory}"
    return "stopped; no checkpoint had been written"
