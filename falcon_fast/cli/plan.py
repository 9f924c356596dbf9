"""`falcon-fast plan`: how the loss would run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from falcon_fast.cli.options import FROM_RECIPE, OPTION_KEYS
from falcon_fast.config import Config, load_recipe, nearest, override, validate
from falcon_fast.errors import UsageError


@click.command(short_help="Explain how the loss would run on a GPU.")
@click.option(
    "--recipe",
    metavar="NAME",
    default="cifar10",
    show_default=True,
    help="The recipe that supplies f, c and the batch size.",
)
@click.option("--batch-size", type=int, help="Images in a step (N).", show_default=FROM_RECIPE)
@click.option("--codes", metavar="KIND", help="The dictionary: rademacher or hadamard.", show_default=FROM_RECIPE)
@click.option("--num-codes", type=int, help="Number of codes in the dictionary (c).", show_default=FROM_RECIPE)
@click.option("--embedding-dim", type=int, help="Width of an embedding (f).", show_default=FROM_RECIPE)
@click.option("--gpu", metavar="NAME", default="a100", show_default=True, help="The GPU: a100, h100 or h200.")
@click.option(
    "--memory-budget",
    type=int,
    metavar="MIB",
    help="Memory that the loss may hold in addition to its inputs, in MiB.",
    show_default="4096",
)
def plan(recipe: str, gpu: str, memory_budget: int | None, **options: Any) -> None:
    """Explain how the loss would run on a GPU: the possible plans, their cost, and why one of them is chosen.

    The GPU does not have to be in this machine.
    """
    overrides = {OPTION_KEYS[option]: value for option, value in options.items() if value is not None}
    for line in explanation(validate(override(load_recipe(recipe), overrides)), gpu, memory_budget):
        click.echo(line)


def explanation(config: Config, gpu: str, memory_budget: int | None) -> Iterator[str]:
    """Yield the lines of `falcon-fast plan`.

    memory_budget: MiB; None for the default.

    Raises:
        UsageError: the GPU is unknown, or the budget is below 1 MiB.
    """
    from falcon_fast.objective import frozen_start as freezing
    from falcon_fast.objective import planner

    if gpu not in planner.DEVICES:
        raise UsageError(f"unknown --gpu {gpu!r}: {nearest(gpu, planner.DEVICES)}")
    if memory_budget is not None and memory_budget < 1:
        raise UsageError(f"--memory-budget must be at least 1 MiB, not {memory_budget}")
    loss, n = config.loss, config.training.batch_size
    budget = None if memory_budget is None else memory_budget * 2**20
    yield from planner.explain(n, loss.embedding_dim, loss.num_codes, loss.codes, planner.DEVICES[gpu], budget)
    settings = (loss.embedding_dim, loss.num_codes, config.tau, loss.activation, loss.temperature_batch)
    start = freezing.start(*settings)
    yield (
        f"at initialisation the logits have a spread of {start.spread:.1f}; a softmax over {loss.num_codes} codes is frozen "
        f"above {start.freezing:.1f}"
    )
    if frozen := freezing.frozen_start(*settings):
        yield frozen
