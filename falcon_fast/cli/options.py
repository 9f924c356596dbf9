"""The options that `falcon-fast train` and `falcon-fast profile` share, and the configuration that they make."""

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
    "lr": "optimizer.lr",
    "compile": "training.compile",
    "cuda_graph": "training.cuda_graph",
    "codes": "loss.codes",
    "num_codes": "loss.num_codes",
    "embedding_dim": "loss.embedding_dim",
    "temperature_batch": "loss.temperature_batch",
    "seed": "training.seed",
    "device": "training.device",
    "strategy": "training.strategy",
    "init_from": "training.init_from",
}
PATHS = ("data.path", "training.init_from")

FROM_RECIPE = "from the recipe"

_OPTIONS = (
    click.option(
        "--recipe",
        metavar="NAME",
        help="The settings to start from; `falcon-fast info` lists the recipes.",
        show_default="digits, or folder with --data",
    ),
    click.option(
        "--data",
        metavar="PATH",
        help="Your images: a folder, with or without class sub-folders, and with train/ and test/ or val/ if you like.",
        show_default="none; the digits recipe needs none",
    ),
    click.option("--epochs", type=int, help="Passes over the training images.", show_default=FROM_RECIPE),
    click.option(
        "--batch-size",
        type=int,
        help="Images in a step, over all processes; each image is seen in two views.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--loader",
        metavar="NAME",
        help="What reads the images: auto, dali, resident or workers; synthetic reads none and gives noise, to time the rest.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--accumulate",
        type=int,
        help="Micro-batches in a step, for less memory; the prior and BatchNorm see one micro-batch at a time.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--amp/--no-amp",
        default=None,
        help="Short for --precision bf16, and for --precision auto.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--precision",
        metavar="NAME",
        help="auto (float32, TF32 as PyTorch sets it), float32, tf32, bf16 (autocast) or fp16 (autocast, scaled gradients).",
        show_default=FROM_RECIPE,
    ),
    click.option("--optimizer", metavar="NAME", help="adam, adamw, sgd or lars.", show_default=FROM_RECIPE),
    click.option(
        "--lr",
        type=float,
        help="Peak learning rate, whatever the batch size; a recipe's own rates are multiplied by batch size / its batch size.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Compile network and loss with torch.compile; measure whether it helps before a long run.",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--cuda-graph/--no-cuda-graph",
        default=None,
        help="Launch the whole step as one CUDA graph; for one process on one GPU.",
        show_default=FROM_RECIPE,
    ),
    click.option("--codes", metavar="KIND", help="The dictionary: rademacher or hadamard.", show_default=FROM_RECIPE),
    click.option("--num-codes", type=int, help="Number of codes in the dictionary (c).", show_default=FROM_RECIPE),
    click.option("--embedding-dim", type=int, help="Width of an embedding (f).", show_default=FROM_RECIPE),
    click.option(
        "--temperature-batch",
        type=int,
        help="Batch size in the temperature formula; a smaller value gives a softer softmax.",
        show_default=FROM_RECIPE,
    ),
    click.option("--seed", type=int, help="Seed of every random choice in the run.", show_default=FROM_RECIPE),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.", show_default=FROM_RECIPE),
    click.option(
        "--strategy",
        metavar="NAME",
        help="How several processes share the work: ddp, fsdp, single, or auto (ddp under torchrun, else single).",
        show_default=FROM_RECIPE,
    ),
    click.option(
        "--init-from",
        metavar="RUN",
        help="Start from the weights of the newest checkpoint in this run directory, with any other settings.",
        show_default="random weights",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any other setting, by its name in config.toml (optimizer.ema_decay=0.999, optimizer.clip_norm=1); repeatable.",
        show_default=FROM_RECIPE,
    ),
)


def training_options(command: Command) -> Command:
    """Decorate a command with --recipe, --set, --amp, and an option for each key of OPTION_KEYS."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def overrides_of(options: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings that differ from the recipe, as `section.key` to value.

    Args:
        options: the values of the options in OPTION_KEYS and of --amp; None for an option that was not given.
        settings: the assignments given with --set, which take precedence.

    Raises:
        UsageError: an assignment is not valid, or --amp or --no-amp contradicts the precision.
    """
    found = {key: options[option] for option, key in OPTION_KEYS.items() if options.get(option) is not None}
    found |= dict(parse_assignment(text) for text in settings)
    for name in PATHS:
        if found.get(name):
            found[name] = os.path.abspath(os.path.expanduser(found[name]))
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


def default_recipe(recipe: str | None, overrides: Mapping[str, Any]) -> str:
    """Return the recipe that the command means: the one that it names, else folder if there is a data.path, else digits."""
    return recipe or ("folder" if "data.path" in overrides else "digits")


def configured(recipe: str | None, overrides: Mapping[str, Any], say: Callable[[str], None] | None = None) -> Config:
    """Return the configuration of a recipe (by default digits, or folder if there is a data.path) with some settings changed.

    The recipe's learning rates, of network and probe, are scaled with the batch size, except for those that are given.

    Args:
        overrides: `section.key` to value.
        say: takes a line for the user if the batch size changes a learning rate.

    Raises:
        UsageError: the recipe or a setting is unknown, or a value is out of range.
    """
    config = load_recipe(default_recipe(recipe, overrides))
    rates = scaled_rates(config, overrides)
    changed = validate(override(config, {**rates, **overrides}))
    if rates and say is not None:
        names = {"optimizer.lr": ("learning rate", config.optimizer.lr), "probe.lr": ("the probe's", config.probe.lr)}
        parts = (f"{name} {rates[key]:g} instead of {old:g}" for key, (name, old) in names.items() if key in rates)
        batch, usual = changed.training.batch_size, config.training.batch_size
        say(f"batch size {batch} instead of the recipe's {usual}: {', '.join(parts)} (--lr sets another)")
    return changed


def scaled_rates(recipe: Config, overrides: Mapping[str, Any]) -> dict[str, float]:
    """Return the learning rates that a recipe has at the batch size in `overrides`; nothing if it is the recipe's own.

    They are proportional to the batch size over all devices, as in the published code (1e-3 batch x devices / 256 for the
    network, 0.1 batch x devices / 256 for the probe). Rates that `overrides` sets are left out: those are absolute.
    """
    batch, usual = overrides.get("training.batch_size"), recipe.training.batch_size
    if type(batch) is not int or batch < 1 or batch == usual:
        return {}
    rates = {"optimizer.lr": recipe.optimizer.lr, "probe.lr": recipe.probe.lr}
    return {key: rate * batch / usual for key, rate in rates.items() if key not in overrides}
