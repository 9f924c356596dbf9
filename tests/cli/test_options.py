"""The options: what their help says, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from falcon_fast.cli.main import cli
from falcon_fast.cli.options import OPTION_KEYS, configured, overrides_of
from falcon_fast.config import load_recipe
from falcon_fast.errors import UsageError


def commands(group: click.Group, name: str = "falcon-fast") -> Iterator[tuple[str, click.Command]]:
    """All commands of a group by their full names, the group itself included."""
    yield name, group
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


COMMANDS = dict(commands(cli))


def test_all_commands_are_found():
    names = {
        "train",
        "evaluate",
        "replay",
        "plan",
        "profile",
        "info",
        "data",
        "data verify",
        "data pack",
        "data preview",
    }
    assert set(COMMANDS) == {"falcon-fast", *(f"falcon-fast {name}" for name in names)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_states_its_meaning_and_its_default(name):
    command = COMMANDS[name]
    context = click.Context(command)
    for option in command.params:
        if not isinstance(option, click.Option) or option.is_eager:  # --version is click's own
            continue
        _, text = option.get_help_record(context)
        assert option.help and option.help[0].isalpha() and option.help.endswith("."), option.name
        assert len(option.help.split()) >= 3, option.name
        assert "[required]" in text or "[default: " in text, (option.name, text)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, click.Group)])
def test_summaries_are_not_cut_off(name):
    group = COMMANDS[name]
    text = group.get_help(click.Context(group, info_name=name, terminal_width=80))
    assert "..." not in text.partition("Commands:")[2]
    for part, command in group.commands.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {part} ")]
        assert line.endswith(command.get_short_help_str(1000)) and line.endswith("."), line


def test_the_stated_defaults_are_those_of_the_recipes():
    """What help calls a recipe's default is one: none of these options has a value of its own."""
    for option in COMMANDS["falcon-fast train"].params:
        if option.name in OPTION_KEYS or option.name == "amp":
            assert option.default is None or "Sentinel" in type(option.default).__name__, option.name


def test_help_names_every_option(falcon_fast):
    code, out, _ = falcon_fast("train", "--help")
    assert code == 0
    for option in ("--recipe", "--data", "--epochs", "--batch-size", "--amp / --no-amp", "--precision",
                   "--accumulate", "--optimizer", "--codes", "--num-codes", "--embedding-dim", "--temperature-batch",
                   "--run-dir", "--resume", "--continue", "--seed", "--device", "--set"):  # fmt: skip
        assert option in out


def test_options_and_assignments_become_settings():
    given = {"epochs": 3, "codes": "hadamard", "seed": None}
    assert overrides_of(given, ("loss.beta=2", "training.epochs=5")) == {
        "training.epochs": 5,
        "loss.codes": "hadamard",
        "loss.beta": 2.0,
    }


@pytest.mark.parametrize(
    ("amp", "precision", "meant"),
    [
        (None, None, "auto"),
        (None, "fp16", "fp16"),
        (True, None, "bf16"),
        (True, "bf16", "bf16"),
        (False, None, "auto"),
        (False, "auto", "auto"),
        (False, "float32", "float32"),
        (False, "tf32", "tf32"),
    ],
)
def test_amp_is_a_short_form_of_precision(amp, precision, meant):
    for options, settings in (
        ({"amp": amp, "precision": precision}, ()),
        ({"amp": amp}, () if precision is None else (f"training.precision={precision}",)),
    ):
        assert configured("digits", overrides_of(options, settings)).training.precision == meant


@pytest.mark.parametrize(
    ("amp", "precision"),
    [(True, "auto"), (True, "float32"), (True, "tf32"), (True, "fp16"), (False, "bf16"), (False, "fp16")],
)
def test_amp_and_another_precision_are_one_line(amp, precision):
    name = "--amp" if amp else "--no-amp"
    for options, settings in (
        ({"amp": amp, "precision": precision}, ()),
        ({"amp": amp}, (f"training.precision={precision}",)),
    ):
        with pytest.raises(UsageError, match=f"^{name} and --precision {precision} conflict: drop one$"):
            overrides_of(options, settings)


def test_the_recipe_is_digits_or_folder_for_ones_own_images():
    assert configured(None, {}) == load_recipe("digits")
    assert configured(None, {"data.path": "/images"}).recipe == "folder"
    assert configured("cifar10", {"data.path": "/images"}).recipe == "cifar10"


@pytest.mark.parametrize(("batch", "devices"), [(256, 1), (512, 8), (64, 1), (48, 1), (1000, 4)])
def test_rates_scale_with_the_batch_as_in_the_published_code(batch, devices):
    """There: 1e-3 and 0.1 times images in a device's batch x devices / 256."""
    config = configured("cifar10", {"training.batch_size": batch})
    factor = batch / devices * devices / 256
    assert config.optimizer.lr == pytest.approx(1e-3 * factor, rel=1e-12)
    assert config.probe.lr == pytest.approx(0.1 * factor, rel=1e-12)
    assert config.optimizer.warmup_lr == 3e-5


def test_scaled_rates_are_said_and_given_ones_are_absolute():
    said = []
    configured("cifar10", {"training.batch_size": 256}, said.append)
    assert said == [
        "batch size 256 instead of the recipe's 64: learning rate 0.001 instead of 0.00025, the probe's 0.1 instead of 0.025 "
        "(--lr sets another)"
    ]
    given = overrides_of({"batch_size": 256, "lr": 3e-4}, ())
    assert configured("cifar10", given, said.append).optimizer.lr == 3e-4
    assert "the probe's 0.1" in said[1] and "learning rate" not in said[1]
    config = configured("cifar10", overrides_of({"batch_size": 8}, ("optimizer.lr=1", "probe.lr=2")), said.append)
    assert (config.optimizer.lr, config.probe.lr) == (1.0, 2.0)
    assert configured("cifar10", {"training.batch_size": 64}, said.append) == load_recipe("cifar10")
    assert len(said) == 2


@pytest.mark.parametrize("batch", [0, -64])
def test_a_batch_that_is_none_is_called_so(batch):
    with pytest.raises(UsageError, match=r"training\.batch_size must be at least 1"):
        configured("cifar10", {"training.batch_size": batch})
