"""`falcon-fast evaluate`: the newest checkpoint of a run, evaluated again."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Evaluate the newest checkpoint of a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    metavar="PATH",
    help="Evaluate the backbone on these images instead of the run's own.",
    show_default="the images of the run",
)
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--protocol",
    metavar="NAME",
    default="standard",
    show_default=True,
    help="standard (evaluation mode), or published: also the NMI of the codes as the published code measures it.",
)
def evaluate(run: Path, data: str | None, device: str, protocol: str) -> None:
    """Evaluate the newest checkpoint in the run directory RUN, and write the figures to RUN/evaluation.json."""
    from rich.console import Console

    from falcon_fast.evaluation.report import result_tables
    from falcon_fast.hardware.threads import following_load
    from falcon_fast.runs import results
    from falcon_fast.runs.directory import write_json
    from falcon_fast.training.distributed import signals

    signals.stop_line(lambda: f"stopped; {run / 'evaluation.json'} was not written: give the same command again")
    console = Console(highlight=False, markup=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    trained = results.load_run(run, device)
    with following_load(trained.device, trained.config.training.threads, False, say):
        result = results.evaluate(trained, data, say=say, protocol=protocol)
    for table in result_tables(result):  # printed first: the disk may be full, or the directory belong to somebody else
        console.print(table)
    write_json(run / "evaluation.json", result)
