"""`falcon-fast plan`: how the loss would run on a GPU."""

from __future__ import annotations

from typing import Any

import click

from falcon_fast.cli.options import OPTION_KEYS
from falcon_fast.errors import UsageError


@click.command()
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
