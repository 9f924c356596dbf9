"""`falcon-fast profile`: where the time of a training step goes, measured here or predicted for another GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from falcon_fast.cli.options import configured, overrides_of, training_options
from falcon_fast.config import Config
from falcon_fast.errors import UsageError
from falcon_fast.training.distributed.signals import stop_line


@click.command(short_help="Time the steps of a run, or predict their time.")
@training_options
@click.option("--steps", type=int, default=50, show_default=True, help="Number of steps to time.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print only JSON to stdout; everything else goes to stderr.",
    show_default="off",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write three steps to this file as a Chrome trace, for https://ui.perfetto.dev.",
    show_default="none",
)
@click.option(
    "--predict",
    metavar="GPU",
    help="Predict the time on a100, h100 or h200 instead of measuring; needs neither GPU nor data.",
    show_default="measure here",
)
@click.option("--gpus", type=int, help="With --predict: number of GPUs in one machine.", show_default="1")
def profile(
    recipe: str | None,
    settings: tuple[str, ...],
    steps: int,
    as_json: bool,
    trace: Path | None,
    predict: str | None,
    gpus: int | None,
    **options: Any,
) -> None:
    """Time the training steps that `train` would take with the same options: phases, memory, FLOP, and what limits the speed.

    Nothing is kept of them: no checkpoint and no run directory.
    """
    if predict is not None and trace is not None:
        raise UsageError("--trace needs steps that are measured: leave out --predict")
    if gpus is not None and predict is None:
        raise UsageError("--gpus needs --predict; to measure several GPUs, start falcon-fast profile with torchrun")
    for option, number in (("--steps", steps), ("--gpus", gpus)):
        if number is not None and number < 1:
            raise UsageError(f"{option} must be at least 1, not {number}")
    stop_line(lambda: "stopped; nothing is kept of a profile")
    config = configured(recipe, overrides_of(options, settings))
    if predict is None:
        _measure(config, steps, as_json, trace)
    else:
        _predict(config, predict, gpus or 1, as_json)


def _measure(config: Config, steps: int, as_json: bool, trace: Path | None) -> None:
    from rich.console import Console

    from falcon_fast.hardware.host_memory import keep_host_memory
    from falcon_fast.hardware.threads import decide_threads
    from falcon_fast.profiling.measure import lines, profile
    from falcon_fast.training.distributed.processes import join
    from falcon_fast.training.memory import check_fits
    from falcon_fast.training.run import prepare

    training = config.training
    processes = join(training.strategy, training.device, training.batch_size, training.timeout, "profile")
    console = Console(highlight=False, markup=False, quiet=not processes.main, stderr=as_json)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    run = prepare(config, processes)
    with processes.together():
        check_fits(run)
    keep_host_memory(run.device)
    decide_threads(training.threads)
    for note in run.notes:
        say(note)
    strategy = "single" if processes.group is None else processes.strategy
    head = facts(run.config, run.source.size)
    head |= {"strategy": strategy, "precision": run.precision.name, "loader": run.loader}
    say(f"{described(head)} on {run.place}, {run.precision}, loader {run.loader}")
    found = profile(run, steps, say, trace)
    processes.close()
    if not processes.main:
        return
    if as_json:
        click.echo(json.dumps(head | found.as_dict(), indent=1))
        return
    console.print(table(found.timings.phases))
    for line in lines(run, found):
        say(line)
    if trace is not None:
        say(f"three steps are in {trace}: open it at https://ui.perfetto.dev")


def _predict(config: Config, gpu: str, gpus: int, as_json: bool) -> None:
    from rich.console import Console

    from falcon_fast.profiling.prediction import predict

    found = predict(config, gpu, gpus)
    head = facts(config, found.size)
    if as_json:
        click.echo(json.dumps(head | found.as_dict(), indent=1))
        return
    console = Console(highlight=False, markup=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    place = found.gpu if gpus == 1 else f"{gpus} {found.gpu}"
    say(
        f"{described(head)} predicted for {place}, without the time for loading; see falcon_fast/profiling/prediction.py for the "
        "assumptions"
    )
    console.print(table(found.phases))
    say(
        f"{found.images / found.step:,.0f} images/s, {1e3 * found.step:.2f} ms a step, MFU {found.mfu:.1%}; about "
        f"{found.memory / 1e9:.1f} of {found.capacity / 1e9:.0f} GB; the loss takes its {found.plan} plan"
    )
    if found.memory > found.capacity:
        say("that does not fit into the memory: use a smaller --batch-size, or --accumulate")
    say(f"limited by {found.limit}")


def facts(config: Config, size: int) -> dict[str, Any]:
    """Return the settings that are measured, for the printed line and for JSON.

    size: side of a view in pixels.
    """
    training, loss = config.training, config.loss
    return {
        "recipe": config.recipe,
        "model": config.model.name,
        "view_size": size,
        "embedding_dim": loss.embedding_dim,
        "num_codes": loss.num_codes,
        "codes": loss.codes,
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "compile": training.compile,
    }


def described(head: Mapping[str, Any]) -> str:
    """Return the facts as one line."""
    compiled = ", compiled" if head["compile"] else ""
    parts = f" in {head['accumulate']} micro-batches" if head["accumulate"] > 1 else ""
    return (
        f"recipe {head['recipe']}: {head['model']}{compiled}, {head['view_size']} px, f = {head['embedding_dim']}, "
        f"c = {head['num_codes']} {head['codes']} codes; steps of {head['batch_size']} images{parts}"
    )


def table(found: Mapping[str, float]) -> Any:
    """Return a table of the phases: their milliseconds, and their shares of the step.

    found: seconds by phase.
    """
    from rich.table import Table

    step = sum(found.values())
    rows = Table("phase", "ms", "share", box=None, header_style="bold")
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, seconds in found.items():
        rows.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / step:.1%}")
    rows.add_row("step", f"{1e3 * step:.2f}", "")
    return rows
