"""`falcon-fast`: each command a thin call into the package. What the user got wrong is one line and exit code 2."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

from falcon_fast.data_cli import data
from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.options import OPTION_KEYS, configured, overrides_of, training_options
from falcon_fast.profile_cli import profile


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="falcon_fast")
def cli() -> None:
    """Self-supervised learning that does not collapse: images without labels in, a backbone out, and the figures."""


cli.add_command(data)
cli.add_command(profile)


# Seconds that --continue waits for the run before it: NFS knows that a machine is gone, with its locks, after 90.
PATIENCE = 100.0


@cli.command()
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
    from falcon_fast.training.distributed.processes import join
    from falcon_fast.training.run import prepare, restore
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
    except KeyboardInterrupt:
        kept = checkpoint.complete(directory / "checkpoints")  # a second Ctrl-C does not wait for the first one
        how = f"continue with: falcon-fast train --resume {directory}" if kept else "no checkpoint had been written"
        console.print(f"stopped; {how}", soft_wrap=True)
        stop = SystemExit(130)  # of every process; torchrun makes 1 of it
        stop.agreed = True  # type: ignore[attr-defined]
        raise stop from None
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


@cli.command()
@click.option(
    "--recipe", metavar="NAME", default="cifar10", show_default=True, help="Whose f, c and batch are asked for."
)
@click.option("--batch-size", type=int, help="Images a step (N).")
@click.option("--cuda-graph/--no-cuda-graph", default=None, help="The whole step as one launch, on one GPU.")
@click.option("--codes", metavar="KIND", help="The dictionary: rademacher or hadamard.")
@click.option("--num-codes", type=int, help="Codes in the dictionary (c).")
@click.option("--embedding-dim", type=int, help="Width of an embedding (f).")
@click.option("--gpu", metavar="NAME", default="a100", show_default=True, help="a100, h100 or h200.")
@click.option(
    "--memory-budget", type=int, metavar="MIB", help="What the loss may hold beyond its inputs; default 4096."
)
def plan(recipe: str, gpu: str, memory_budget: int | None, **options: Any) -> None:
    """Explain how the loss would run on a GPU, which need not be there: the plans, their cost, and why one is chosen."""
    from falcon_fast import config as configuration
    from falcon_fast.objective import frozen_start as freezing
    from falcon_fast.objective import planner

    overrides = {OPTION_KEYS[option]: value for option, value in options.items() if value is not None}
    config = configuration.validate(configuration.override(configuration.load_recipe(recipe), overrides))
    if gpu not in planner.DEVICES:
        raise UsageError(f"no model of a GPU {gpu!r}: {configuration.nearest(gpu, planner.DEVICES)}")
    if memory_budget is not None and memory_budget < 1:
        raise UsageError(f"--memory-budget must be at least 1 MiB, not {memory_budget}")
    loss, n = config.loss, config.training.batch_size
    budget = None if memory_budget is None else memory_budget * 2**20
    for line in planner.explain(n, loss.embedding_dim, loss.num_codes, loss.codes, planner.DEVICES[gpu], budget):
        click.echo(line)
    settings = (loss.embedding_dim, loss.num_codes, config.tau, loss.activation, loss.temperature_batch)
    start = freezing.start(*settings)
    click.echo(
        f"at initialisation the logits spread by {start.spread:.1f}; a softmax over {loss.num_codes} codes freezes above "
        f"{start.freezing:.1f}"
    )
    if frozen := freezing.frozen_start(*settings):
        click.echo(frozen)


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


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", help="Judge the backbone on other images than it was trained on.")
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
def evaluate(run: Path, data: str | None, device: str) -> None:
    """Evaluate the newest checkpoint of a run directory, and write evaluation.json there."""
    from rich.console import Console

    from falcon_fast.evaluation.report import result_tables
    from falcon_fast.runs import results
    from falcon_fast.runs.directory import write_json

    console = Console(highlight=False, markup=False)
    result = results.evaluate(
        results.load_trained(run, device), data, say=lambda line: console.print(line, soft_wrap=True)
    )
    for table in result_tables(result):  # first: the run directory may be another one's, or the disk full
        console.print(table)
    write_json(run / "evaluation.json", result)


@cli.command()
def info() -> None:
    """Versions, devices, and which implementations work here."""
    from falcon_fast.info import report

    for line in report():
        click.echo(line)


def main() -> None:
    """The console script: UsageError is one line and exit code 2; what stops a run, one line and exit code 1."""
    # Pillow refuses an image from twice its limit on, which is enough; before, it warns of a bomb.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        cli()
    except SystemExit as stop:
        if getattr(stop, "agreed", False):
            from falcon_fast.training.distributed.processes import leave

            leave(stop)
        raise
    except (UsageError, TrainingError, OSError) as error:  # OSError: a full disk, a file system that went away
        from falcon_fast.training.distributed.processes import leave, speaks

        if speaks(error):
            click.echo(f"error: {error}", err=True)
        leave(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
