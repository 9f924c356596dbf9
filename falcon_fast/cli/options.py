"""What `falcon-fast train` and `falcon-fast profile` are both told: the options, and the configuration that they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from falcon_fast.config import Config, load_recipe, override, parse_assignment, validate
from falcon_fast.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

OPTION_KEYS = {
    "data": "data.path",
    "loader": "data.loader",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "accumulate": "training.accumulate",
    "precision": "training.precision",
    "optimizer": "optimizer.name",
    "compile": "training.compile",
    "cuda_graph": "training.cuda_graph",
    "codes": "loss.codes",
    "num_codes": "loss.num_codes",
    "embedding_dim": "loss.embedding_dim",
    "temperature_batch": "loss.temperature_batch",
    "seed": "training.seed",
    "device": "training.device",
    "strategy": "training.strategy",
}

_OPTIONS = (
    click.option(
        "--recipe",
        metavar="NAME",
        help="What to train; `falcon-fast info` lists them. Default: digits, or folder with --data.",
    ),
    click.option(
        "--data",
        metavar="PATH",
        help="Your images: a folder, with or without class sub-folders, train/ and test/ or val/ if you like.",
    ),
    click.option("--epochs", type=int),
    click.option("--batch-size", type=int, help="Images a step; each is seen in two views."),
    click.option(
        "--loader", metavar="NAME", help="auto (default), dali, resident, workers; synthetic to leave it out."
    ),
    click.option(
        "--accumulate", type=int, help="Micro-batches of a step, for less memory; the prior sees one at a time."
    ),
    click.option("--amp/--no-amp", default=None, help="bfloat16 autocast, as --precision bf16."),
    click.option("--precision", metavar="NAME", help="float32, tf32, bf16 or fp16 (with scaled gradients)."),
    click.option("--optimizer", metavar="NAME", help="adam, adamw, sgd or lars."),
    click.option("--compile/--no-compile", default=None, help="torch.compile of network and loss; measure before use."),
    click.option("--cuda-graph/--no-cuda-graph", default=None, help="The whole step as one launch, on one GPU."),
    click.option("--codes", metavar="KIND", help="The dictionary: rademacher or hadamard."),
    click.option("--num-codes", type=int, help="Codes in the dictionary (c)."),
    click.option("--embedding-dim", type=int, help="Width of an embedding (f)."),
    click.option("--temperature-batch", type=int, help="The n of the temperature: smaller is softer."),
    click.option("--seed", type=int),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N."),
    click.option(
        "--strategy", metavar="NAME", help="ddp or fsdp under torchrun; auto (default): ddp there, else single."
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any other setting, as in config.toml (optimizer.ema_decay=0.999, optimizer.clip_norm=1); repeatable.",
    ),
)


def training_options(command: Command) -> Command:
    """Decorator: --recipe, --set, and an option for each key of OPTION_KEYS."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def overrides_of(options: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """`section.key` to value, of the options that were given and of --set. Raises UsageError for what contradicts itself."""
    found = {key: options[option] for option, key in OPTION_KEYS.items() if options.get(option) is not None}
    found |= dict(parse_assignment(text) for text in settings)
    if "data.path" in found:
        found["data.path"] = os.path.abspath(os.path.expanduser(found["data.path"]))
    return found | _short_form(options.get("amp"), found.get("training.precision"))


def _short_form(amp: bool | None, precision: str | None) -> dict[str, Any]:
    """Return what --amp (True) or --no-amp (False) sets; `precision` is what was asked for otherwise, if anything."""
    if amp is None:
        return {}
    if precision is None:
        return {"training.precision": "bf16" if amp else "auto"}
    if (precision != "bf16") if amp else (precision in ("bf16", "fp16")):
        raise UsageError(f"--{'amp' if amp else 'no-amp'} and --precision {precision} conflict: drop one")
    return {}


def configured(recipe: str | None, overrides: Mapping[str, Any]) -> Config:
    """A recipe, by default digits or, with --data, folder, and what differs from it."""
    config = load_recipe(recipe or ("folder" if "data.path" in overrides else "digits"))
    return validate(override(config, overrides))
