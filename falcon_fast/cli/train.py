"""`falcon-fast train`: a run from its configuration to its result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from falcon_fast.cli.options import configured, overrides_of, training_options
from falcon_fast.errors import RunStopped, UsageError

# Seconds that --continue waits for the run before it: NFS knows that a machine is gone, with its locks, after 90.
PATIENCE = 100.0


@click.command()
@training_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run goes; default runs/<recipe>-<time>.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue an interrupted run.")
@click.option(
    "--continue",
    "continuing",
    is_flag=True,
    help="Continue the run in --run-dir if it has begun, else begin it: for jobs that are started again.",
)
def train(
    recipe: str | None,
    run_dir: Path | None,
    resume: Path | None,
    continuing: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train, then evaluate: linear probe, kNN, clustering, and the four collapse checks."""
    from rich.console import Console

    from falcon_fast import config as configuration
    from falcon_fast.evaluation.report import result_tables
    from falcon_fast.hardware.host_memory import keep_host_memory
    from falcon_fast.runs import directory as run_directory
    from falcon_fast.runs import results
    from falcon_fast.runs.lock import RunLock
    from falcon_fast.training.checkpoints import checkpoint
    from falcon_fast.training.checkpoints.restore import restore
    from falcon_fast.training.distributed.processes import join
    from falcon_fast.training.run import prepare
    from falcon_fast.training.trainer import train as train_run

    overrides = overrides_of(options, settings)
    if continuing and (resume is not None or run_dir is None):
        raise UsageError("--continue goes with --run-dir RUN, and without --resume")
    if resume is not None:
        extra = sorted(set(overrides) - CHANGEABLE)
        if extra or recipe or run_dir:
            what = extra[0] if extra else "--recipe" if recipe else "--run-dir"
            raise UsageError(
                f"--resume continues a run as it was: {what} cannot change "
                "(only --data, --device, --strategy, --loader and its settings can)"
            )
        if not resume.is_dir():
            raise UsageError(f"--resume {resume}: no such run directory")
        config = configuration.load_config(resume / "config.toml")
        config = configuration.validate(configuration.override(config, overrides))
        directory = resume
    else:
        config = configured(recipe, overrides)
        directory = run_dir or Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"

    training = config.training
    processes = join(training.strategy, training.device, training.batch_size, training.timeout)
    directory = processes.from_main(directory)  # its name may hold the time
    console = Console(highlight=False, markup=False, quiet=not processes.main)
    begun = resume is not None
    lock = click.get_current_context().with_resource(RunLock(directory))
    if begun:
        with processes.together():
            if processes.main:
                lock.take()
    if continuing:
        state = ""
        with processes.together():
            if processes.main:
                state = run_directory.state_of(directory, config, CHANGEABLE)
                if state != "finished" and directory.is_dir():
                    lock.take(PATIENCE, lambda line: console.print(line, soft_wrap=True))
                    state = run_directory.state_of(directory, config, CHANGEABLE)  # as the run that had it has left it
        state = processes.from_main(state)
        if state == "finished":
            console.print(f"{directory} is finished: its figures are in {directory / 'result.json'}", soft_wrap=True)
            processes.close()
            return
        begun = state == "begun"
    run = prepare(config, processes)
    keep_host_memory(run.device)
    step, seconds = restore(run, directory) if begun else (0, 0.0)
    with processes.together():
        if processes.main and begun:
            run_directory.remove_partials(directory)
        elif processes.main:
            run_directory.create_run_directory(directory, run.config, again=lock.held, lock=lock)
    for note in run.notes:
        console.print(note, soft_wrap=True)
    console.print(describe(run, directory, step), soft_wrap=True)
    try:
        seconds = train_run(run, directory, console, step, seconds)
    except (RunStopped, KeyboardInterrupt):
        kept = checkpoint.complete(directory / "checkpoints")  # a second Ctrl-C does not wait for the first one
        how = f"continue with: falcon-fast train --resume {directory}" if kept else "no checkpoint had been written"
        console.print(f"stopped; {how}", soft_wrap=True)
        raise RunStopped(everywhere=True) from None
    if run.learner.average is not None:  # training is over: the average is what is judged and kept
        run.learner.average.swap(run.network)
    network, _ = run.whole()
    processes.close()
    if not processes.main:
        return
    result = results.finish(run, network, directory, seconds, say=lambda line: console.print(line, soft_wrap=True))
    for table in result_tables(result):
        console.print(table)
    console.print(f"everything is in {directory}", soft_wrap=True)


# What a resumed run may do differently: where its images and its work are, not what it learns.
CHANGEABLE = {
    "data.path",
    "data.loader",
    "data.workers",
    "data.resident_mib",
    "data.photometric",
    "data.max_bad_fraction",
    "training.device",
    "training.strategy",
    "training.timeout",
}


def describe(run: Any, directory: Path, step: int) -> str:
    """Two lines on what is about to run."""
    config, source = run.config, run.source
    precision = str(run.precision)
    beginning = f"from step {step} of " if step else ""
    precision += ", compiled" if config.training.compile else ""
    precision += ", a CUDA graph" if config.training.cuda_graph else ""
    if config.training.accumulate > 1:
        precision += f", {config.training.accumulate} micro-batches a step"
    return (
        f"recipe {config.recipe}: {len(source.train.images)} images to train on, {len(source.test.images)} to test on, "
        f"{source.size} px; {config.model.name}, f = {config.loss.embedding_dim}, c = {config.loss.num_codes} "
        f"{config.loss.codes} codes, tau = {config.tau:.4g}\n"
        f"{beginning}{run.total_steps} steps of {config.training.batch_size} images on {run.place}, {precision}, "
        f"loader {run.loader}; "
        f"run directory {directory}"
    )
