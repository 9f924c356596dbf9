"""`falcon-fast profile`: where the time of a run's steps goes; or, with --predict, would go on a GPU that is not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from falcon_fast.cli.options import configured, overrides_of, training_options
from falcon_fast.config import Config
from falcon_fast.errors import UsageError


@click.command()
@training_options
@click.option("--steps", type=int, default=50, show_default=True, help="Steps to time.")
@click.option("--json", "as_json", is_flag=True, help="JSON alone on stdout; everything else goes to stderr.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also leave three steps as a Chrome trace, for https://ui.perfetto.dev.",
)
@click.option("--predict", metavar="GPU", help="Predict for a100, h100 or h200 instead; needs neither GPU nor data.")
@click.option("--gpus", type=int, help="With --predict: so many, in one machine.")
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
    """Time the steps of `train` with the same options, nothing kept: phases, memory, FLOP, and what limits them."""
    if predict is not None and trace is not None:
        raise UsageError("--trace is of steps that are taken: leave out --predict")
    if gpus is not None and predict is None:
        raise UsageError("--gpus goes with --predict; several processes are started by torchrun")
    for option, number in (("--steps", steps), ("--gpus", gpus)):
        if number is not None and number < 1:
            raise UsageError(f"{option} must be at least 1, not {number}")
    config = configured(recipe, overrides_of(options, settings))
    if predict is None:
        _measure(config, steps, as_json, trace)
    else:
        _predict(config, predict, gpus or 1, as_json)


def _measure(config: Config, steps: int, as_json: bool, trace: Path | None) -> None:
    from rich.console import Console

    from falcon_fast.hardware.host_memory import keep_host_memory
    from falcon_fast.profiling.measure import lines, profile
    from falcon_fast.training.distributed.processes import join
    from falcon_fast.training.run import prepare

    training = config.training
    processes = join(training.strategy, training.device, training.batch_size, training.timeout, "profile")
    console = Console(highlight=False, markup=False, quiet=not processes.main, stderr=as_json)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    run = prepare(config, processes)
    keep_host_memory(run.device)
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
        f"{described(head)} predicted on {place}, with no time for loading; estimates: falcon_fast/profiling/prediction.py"
    )
    console.print(table(found.phases))
    say(
        f"{found.images / found.step:,.0f} images/s, {1e3 * found.step:.2f} ms a step, MFU {found.mfu:.1%}; about "
        f"{found.memory / 1e9:.1f} of {found.capacity / 1e9:.0f} GB; the loss by its {found.plan} plan"
    )
    if found.memory > found.capacity:
        say("that does not fit: a smaller --batch-size, or --accumulate")
    say(f"limited by {found.limit}")


def facts(config: Config, size: int) -> dict[str, Any]:
    """What was asked for, for people and JSON alike."""
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
    """One line of `facts`."""
    compiled = ", compiled" if head["compile"] else ""
    parts = f" in {head['accumulate']} micro-batches" if head["accumulate"] > 1 else ""
    return (
        f"recipe {head['recipe']}: {head['model']}{compiled}, {head['view_size']} px, f = {head['embedding_dim']}, "
        f"c = {head['num_codes']} {head['codes']} codes; steps of {head['batch_size']} images{parts}"
    )


def table(found: Mapping[str, float]) -> Any:
    """Phases, milliseconds, shares of the step."""
    from rich.table import Table

    step = sum(found.values())
    rows = Table("phase", "ms", "share", box=None, header_style="bold")
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, seconds in found.items():
        rows.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / step:.1%}")
    rows.add_row("step", f"{1e3 * step:.2f}", "")
    return rows
