"""`falcon-fast train`: a run from its configuration to its result."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

import click

from falcon_fast.cli.options import configured, default_recipe, overrides_of, training_options
from falcon_fast.config import check_allowed
from falcon_fast.errors import RunStopped, UsageError

if TYPE_CHECKING:
    from falcon_fast.config import Config
    from falcon_fast.runs import start


@click.command(short_help="Train a network, then evaluate it.")
@training_options
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The directory that the run is written to.",
    show_default="runs/<recipe>-<time>",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Continue the run in this directory from its newest checkpoint, for example with more --epochs. auto: the newest run of "
    "the recipe in runs/.",
    show_default="begin a new run",
)
@click.option(
    "--continue",
    "continuing",
    is_flag=True,
    help="Continue the run in --run-dir if it has begun, otherwise begin it there: for jobs that are started again.",
    show_default="off",
)
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="SECTION.KEY",
    help="With --resume or --continue: let this setting change although it changes what is learned (optimizer.lr); repeatable.",
    show_default="refuse",
)
def train(
    recipe: str | None,
    run_dir: Path | None,
    resume: Path | None,
    continuing: bool,
    allowed: tuple[str, ...],
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a network, then evaluate it: linear probe, kNN, clustering, and the four collapse checks."""
    from rich.console import Console

    from falcon_fast.data.loaders.signals import lost_workers
    from falcon_fast.evaluation.report import result_tables
    from falcon_fast.hardware.threads import following_load
    from falcon_fast.runs import results, resuming, start
    from falcon_fast.runs.lock import RunLock
    from falcon_fast.training import trainer
    from falcon_fast.training.checkpoints import checkpoint
    from falcon_fast.training.distributed import signals
    from falcon_fast.training.distributed.processes import join
    from falcon_fast.training.distributed.stopping import lost_peers
    from falcon_fast.training.records.console import SteadyOutput
    from falcon_fast.training.session import write_errors

    how, directory, asked, notes = _asked(recipe, run_dir, resume, continuing, allowed, overrides_of(options, settings))
    config = asked if how == "new" else resuming.expected(directory, asked)

    signals.stop_line(lambda: "stopped before anything was written")
    training = config.training
    processes = join(training.strategy, training.device, training.batch_size, training.timeout)
    directory = processes.from_main(directory)  # its name may contain the time
    console = Console(
        file=cast(TextIO, SteadyOutput(sys.stdout)), highlight=False, markup=False, quiet=not processes.main
    )

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    def kept() -> str:
        return start.how_to_continue(directory)

    if how != "new":
        signals.stop_line(kept)

    def saved() -> str:
        return checkpoint.kept(directory / "checkpoints")

    fresh = how == "new" and run_dir is None
    with (
        RunLock(directory) as lock,
        lost_peers(processes, saved),
        lost_workers(saved),
        ExitStack() as opened,
    ):
        try:
            begun = start.begin(asked, directory, how, processes, lock, say, allowed, fresh)
            if begun is None:
                say(f"{directory} is finished: its figures are in {directory / 'result.json'}")
                processes.close()
                return
            directory = begun.directory
            signals.stop_line(kept)
            for line in (*notes, *begun.lines()):
                say(line)
            training = begun.run.config.training  # of a resumed run as its checkpoint and config.toml have it
            opened.enter_context(following_load(begun.run.device, training.threads, training.compile, say))
            seconds = trainer.train(begun.run, directory, console, begun.step, begun.seconds)
            network = results.final_network(begun.run)
        except (RunStopped, KeyboardInterrupt):  # the second Ctrl-C may be a KeyboardInterrupt
            say(kept())
            raise RunStopped(everywhere=True) from None
        processes.close()
        if not processes.main:
            return
        with write_errors(lambda: f"training is done; then finish with: falcon-fast train --resume {directory}"):
            result = results.finish(begun.run, network, directory, seconds, say=say)
        for table in result_tables(result):
            console.print(table)
        say(f"everything is in {directory}")


class _Asked(NamedTuple):
    """What the command asks for.

    Attributes:
        how: begin a new run, resume one, or whichever of the two fits.
        directory: the run directory, which a new run without `--run-dir` may still change.
        config: the settings.
        notes: lines for the user.
    """

    how: start.How
    directory: Path
    config: Config
    notes: list[str]


def _asked(
    recipe: str | None,
    run_dir: Path | None,
    resume: Path | None,
    continuing: bool,
    allowed: tuple[str, ...],
    overrides: dict[str, Any],
) -> _Asked:
    """Return what the options ask for. Raises UsageError if they contradict each other."""
    from falcon_fast.runs import resuming, start

    if continuing and (resume is not None or run_dir is None):
        raise UsageError("--continue needs --run-dir RUN and conflicts with --resume: drop --resume and give --run-dir")
    if allowed and not (resume or continuing):
        raise UsageError("--allow-change is for a run that has begun: give --resume RUN, or --run-dir RUN --continue")
    check_allowed(allowed)
    notes: list[str] = []
    if resume is None:
        config = configured(recipe, overrides, notes.append)
        return _Asked("continue" if continuing else "new", run_dir or start.default_directory(config), config, notes)
    if resume == Path("auto"):
        resume = resuming.newest_run(Path("runs"), default_recipe(recipe, overrides), overrides.get("data.path"))
        notes.append(f"--resume auto: {resume} is the newest run of this recipe")
        recipe = None
    fixed = "--recipe" if recipe else "--run-dir" if run_dir else None
    return _Asked("resume", resume, start.resumed_config(resume, overrides, fixed), notes)
