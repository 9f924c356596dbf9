"""`falcon-fast evaluate`: a run's newest checkpoint judged again."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
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
