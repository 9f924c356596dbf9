"""The loop over steps: data in, metrics and checkpoints out, until the run is finished or asked to stop."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from falcon_fast.training.run import Run
from falcon_fast.training.session import Session


def train(run: Run, directory: Path, console: Console, start_step: int = 0, seconds_before: float = 0.0) -> float:
    """Train `run` from step `start_step` to its end, with logs and checkpoints in `directory`.

    With several processes, process 0 alone logs and tests, while the others wait at the collectives of the next step; each
    process saves its share of a checkpoint.

    Args:
        console: where progress and notes are shown.
        start_step: optimisation steps that are done already.
        seconds_before: seconds of training that they took.

    Returns:
        The seconds of training, `seconds_before` included.

    Raises:
        DivergedError: as many steps in a row as `training.max_bad_steps` had a loss or a gradient that is not finite.
        TrainingError: weights or moments are not finite, a checkpoint cannot be written, memory runs out, or another process is
            gone. The last good checkpoint stays.
        RunStopped: any process received SIGINT, SIGTERM or SIGUSR1. The state was saved first.
    """
    with Session(run, directory, console, start_step, seconds_before) as session:
        schedule = session.schedule
        if schedule.total_steps == 0:
            session.save(0)
        for step, inputs in session.batches():
            metrics = session.take_step(step, inputs)
            stopping = session.stop_agreed(step)
            if schedule.logs(step):
                session.log(step, metrics)
            if schedule.saves(step) or stopping:
                session.save(step, stopping)
            if stopping:
                session.stop()
        session.finish()
    return session.seconds
