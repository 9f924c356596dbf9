"""Configuration: recipes, overrides, ranges, and a config.toml that loads back whatever it holds."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_fast.config import (
    SECTIONS,
    Config,
    DataConfig,
    dump_config,
    load_config,
    load_recipe,
    nearest,
    override,
    parse_assignment,
    recipe_description,
    recipe_names,
    validate,
)
from falcon_fast.errors import UsageError

from .fuzz import COUNTS, MIB, fuzz


def one_line(call: Any, *arguments: Any) -> str:
    """The message of the UsageError that the call must raise: a single line that does not trail off."""
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message and not message.rstrip().endswith(":")
    return message


def load_text(tmp_path: Path, text: str) -> Config:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "config.toml")


# ---- recipes ----


def test_the_recipes_that_ship() -> None:
    assert recipe_names() == ["cifar10", "cifar10-resnet8", "cifar100", "digits", "folder", "imagenet100", "svhn"]
    assert all("\n" not in recipe_description(name) and len(recipe_description(name)) > 20 for name in recipe_names())


@pytest.mark.parametrize("name", ["cifar10", "cifar10-resnet8", "cifar100", "digits", "folder", "imagenet100", "svhn"])
def test_a_recipe_is_valid_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    assert validate(config) is config
    assert load_text(tmp_path, dump_config(config)) == config
    assert set(tomllib.loads(dump_config(config))) == {"recipe", *SECTIONS}


def test_the_published_recipe() -> None:
    config = load_recipe("cifar10")
    assert (config.model.name, config.model.stem) == ("resnet18", "cifar-padded")
    assert (config.loss.embedding_dim, config.loss.num_codes, config.loss.activation) == (2048, 16384, "tanh")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup_epochs) == ("adam", 2.5e-4, 10)
    assert config.optimizer.warmup_lr == 3e-5 and config.optimizer.weight_decay == 1e-4 and config.probe.lr == 0.025
    assert (config.training.batch_size, config.training.epochs) == (64, 1000)
    assert config.tau == pytest.approx(13.898, abs=5e-4)  # the value of the published setting


def test_tau_is_the_published_rule() -> None:
    config = override(Config(), {"loss.num_codes": 1000, "loss.embedding_dim": 300, "loss.temperature_batch": 25})
    config = override(config, {"loss.epsilon": 1e-5, "training.batch_size": 7})  # the runtime batch plays no part
    assert config.tau == pytest.approx(300 / (5 * math.log((1 - 1e-5 * 999) / 1e-5)), rel=1e-12)


def test_every_default_has_the_type_it_is_annotated_with() -> None:
    # `dump_config` writes an int default of a float field as an integer, and equality would hide it.
    for section, cls in SECTIONS.items():
        for f in dataclasses.fields(cls):
            assert type(f.default).__name__ == f.type, f"{section}.{f.name}"


# ---- config.toml ----


@pytest.mark.parametrize(
    "path",
    [
        'a "quoted" path',
        "it's",
        "C:\\new\\table",
        "line\nbreak\r\n\ttab",
        "Übung/画像/\U0001f426",
        "\x00\x1f\x7f\x80\u2028",
        '"""',
        "\\\x7f",
        "",
    ],
)
def test_a_strange_path_survives_config_toml(path: str, tmp_path: Path) -> None:
    config = Config(data=DataConfig(path=path))
    assert load_text(tmp_path, dump_config(config)) == config


@given(st.text(), st.floats(min_value=0, allow_infinity=False), st.integers(0, 2**63 - 1), st.booleans())
def test_any_value_survives_toml(path: str, beta: float, seed: int, compiled: bool) -> None:
    values = {"data.path": path, "loss.beta": beta, "training.seed": seed, "training.compile": compiled}
    tables = tomllib.loads(dump_config(override(Config(), values)))
    for name, value in values.items():
        section, key = name.split(".")
        assert tables[section][key] == value and type(tables[section][key]) is type(value)


def test_a_path_that_is_no_utf8_is_refused_where_it_is_given() -> None:
    assert "data.path" in one_line(
        override, Config(), {"data.path": b"/data/caf\xe9".decode("utf-8", "surrogateescape")}
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nwdith = 3", ["model.wdith", "'width'"]),
        ("[modle]\nwidth = 3", ["modle", "'model'"]),
        ("wibble = 3", ["wibble", "training"]),
        ("model = 3", ["model", "table"]),
        ("recipe = 3", ["recipe", "a string", "3"]),
        ("[recipe]\nname = 'x'", ["recipe", "a string"]),
        ("[[model]]\nwidth = 3", ["model", "table"]),
        ("[model]\nwidth = '3'", ["model.width", "an integer", "'3'"]),
        ("[model]\nwidth = 3.0", ["model.width", "an integer", "3.0"]),
        ("[model]\nwidth = true", ["model.width", "an integer", "True"]),
        ("[model]\nname = 3", ["model.name", "a string", "3"]),
        ("[loss]\nbeta = '1'", ["loss.beta", "a number", "'1'"]),
        ("[loss]\nbeta = true", ["loss.beta", "a number", "True"]),
        ("[loss]\nbeta = [1.0]", ["loss.beta", "a number"]),
        ("[training]\namp = 1", ["training.amp", "true or false", "1"]),
        ("[training]\ncompile = 1", ["training.compile", "true or false", "1"]),
        ("[training]\nseed = 2026-01-01", ["training.seed", "an integer"]),
        ("[training]\nepochs = -1", ["training.epochs", "at least 0", "-1"]),
        ("[loss]\nbeta = nan", ["loss.beta", "nan"]),
        ("[loss]\ncodes = 'hadamart'", ["loss.codes", "'hadamard'"]),
        (f"[optimizer]\nlr = 1{'0' * 400}", ["optimizer.lr", "64 bits"]),
        (f"[training]\nseed = {2**63}", ["training.seed", "64 bits"]),
        ("[model\nwidth = 3", ["config.toml", "not valid TOML"]),
        ("[model]\nwidth = 3\nwidth = 4", ["config.toml", "not valid TOML"]),
    ],
)
def test_what_is_wrong_in_a_config_toml_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    message = one_line(load_text, tmp_path, text)
    assert all(word in message for word in words), message


def test_a_config_toml_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in one_line(load_config, tmp_path / "none.toml")
    assert "directory" in one_line(load_config, tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'recipe = "caf\xe9"')
    assert "latin.toml is not UTF-8 text: byte 13 is 0xe9" in one_line(load_config, tmp_path / "latin.toml")


def test_an_integer_passes_for_a_number_and_stays_one(tmp_path: Path) -> None:
    config = load_text(tmp_path, "[loss]\nbeta = 2\n")
    assert config.loss.beta == 2.0 and type(config.loss.beta) is float
    assert type(override(config, {"loss.beta": 3}).loss.beta) is float


# ---- overrides ----


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        (" training.epochs = -3 ", "training.epochs", -3),
        ("loss.epsilon=1e-6", "loss.epsilon", 1e-6),
        ("loss.beta=2", "loss.beta", 2.0),
        ("training.compile=true", "training.compile", True),
        ("training.compile=False", "training.compile", False),
        ("training.compile=0", "training.compile", False),
        ("training.compile=1", "training.compile", True),
        ("model.name=resnet50", "model.name", "resnet50"),
        ("model.name=3", "model.name", "3"),
        ("data.path=/a=b.c/d e", "data.path", "/a=b.c/d e"),
        ("data.path=", "data.path", ""),
    ],
)
def test_an_assignment_is_read_as_the_type_of_its_field(text: str, name: str, value: Any) -> None:
    read_name, read = parse_assignment(text)
    assert (read_name, read, type(read)) == (name, value, type(value))
    section, key = name.split(".")
    assert getattr(getattr(override(Config(), {read_name: read}), section), key) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.epochs", ["section.key=value", "'training.epochs'"]),
        ("training.epochs=3.5", ["training.epochs", "an integer", "'3.5'"]),
        ("training.epochs=", ["training.epochs", "an integer", "''"]),
        ("loss.beta=big", ["loss.beta", "a number", "'big'"]),
        ("training.compile=maybe", ["training.compile", "true or false", "'maybe'"]),
        ("training.epoch=3", ["'training.epoch'", "'training.epochs'"]),
        ("trainig.epochs=3", ["'trainig.epochs'", "'training.epochs'"]),
        ("epochs=3", ["'epochs'", "'training.epochs'"]),
        ("recipe=digits", ["'recipe'", "did you mean"]),
        ("=3", ["did you mean"]),
        ("wibble=3", ["'wibble'", "did you mean"]),
        ("training=3", ["'training'", "did you mean"]),
        ("training.epochs.x=3", ["'training.epochs'"]),
        (f"training.seed={'9' * 5000}", ["training.seed", "an integer"]),
    ],
)
def test_an_assignment_that_cannot_be_read(text: str, words: list[str]) -> None:
    message = one_line(parse_assignment, text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loss.betta", 1.0, ["'loss.betta'", "'loss.beta'"]),
        ("los.beta", 1.0, ["'los.beta'", "'loss.beta'"]),
        ("loss", 1.0, ["'loss'", "did you mean"]),
        ("loss.beta", "1", ["loss.beta", "a number", "'1'"]),
        ("loss.beta", True, ["loss.beta", "a number"]),
        ("training.epochs", 1.0, ["training.epochs", "an integer"]),
        ("training.compile", 1, ["training.compile", "true or false"]),
        ("data.path", Path("/x"), ["data.path", "a string"]),
        ("training.seed", None, ["training.seed", "an integer"]),
    ],
)
def test_an_override_that_does_not_fit(name: str, value: Any, words: list[str]) -> None:
    message = one_line(override, Config(), {name: value})
    assert all(word in message for word in words), message


def test_an_override_changes_that_value_alone() -> None:
    before = load_recipe("digits")
    after = override(before, {"loss.beta": 0.5, "data.size": 8})
    assert dataclasses.asdict(before) | {
        "loss": dataclasses.asdict(before.loss) | {"beta": 0.5},
        "data": dataclasses.asdict(before.data) | {"size": 8},
    } == dataclasses.asdict(after)
    assert before == load_recipe("digits")


def test_an_unknown_recipe_gives_the_nearest() -> None:
    assert "'digits'" in one_line(load_recipe, "digit")
    assert "'cifar10-resnet8'" in one_line(load_recipe, "cifar10-resnet-8")
    assert "cifar10, cifar10-resnet8, cifar100, digits, folder, imagenet100, svhn" in one_line(load_recipe, "zzz")
    one_line(load_recipe, "../recipes/digits")
    one_line(load_recipe, "")


def test_nearest_always_names_something_valid() -> None:
    many = [f"name{i}" for i in range(50)]
    assert nearest("nam7", many) == "did you mean 'name7'?"
    assert nearest("zzz", many).split("'")[1] in many
    assert nearest("zzz", ["b", "a"]) == "choose one of a, b"


# ---- ranges ----

LEAST = {
    "data.size": 0,
    "data.workers": -1,
    "model.width": 1,
    "loss.temperature_batch": 1,
    "loss.beta": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_epochs": 0.0,
    "optimizer.warmup_lr": 0.0,
    "optimizer.momentum": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 0.0,
    "training.accumulate": 1,
    "probe.lr": 0.0,
    "training.epochs": 0,
    "training.batch_size": 1,
    "training.seed": 0,
    "log.every_steps": 1,
    "log.evaluate_epochs": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 1,
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least_value_is_valid_and_what_is_below_is_not(name: str) -> None:
    least = LEAST[name]
    validate(override(Config(), {name: least}))
    below = [least - 1] if type(least) is int else [-1e-9, math.nan, math.inf, -math.inf]
    for value in below:
        assert name in one_line(validate, override(Config(), {name: value}))


CHOICES = {
    "data.source": ("digits", "cifar10", "folder"),
    "model.stem": ("auto", "cifar", "cifar-padded", "imagenet"),
    "loss.codes": ("rademacher", "hadamard"),
    "loss.activation": ("tanh", "l2"),
    "loss.prior": ("reverse", "forward"),
    "loss.implementation": ("auto", "reference"),
    "optimizer.name": ("adam", "adamw", "sgd", "lars"),
    "training.precision": ("auto", "float32", "tf32", "bf16", "fp16"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_its_names_and_no_other(name: str) -> None:
    for value in CHOICES[name]:
        validate(override(Config(), {name: value}))
    for wrong in (CHOICES[name][-1] + "x", CHOICES[name][0].upper(), ""):
        message = one_line(validate, override(Config(), {name: wrong}))
        assert name in message and repr(wrong) in message
    assert repr(CHOICES[name][-1]) in one_line(validate, override(Config(), {name: CHOICES[name][-1] + "x"}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss.num_codes": 1}, ["at least 2 codes", "1"]),
        ({"loss.num_codes": -5}, ["at least 2 codes"]),
        ({"loss.embedding_dim": 0}, ["at least 1", "0"]),
        ({"loss.epsilon": 0.0}, ["epsilon must be positive"]),
        ({"loss.epsilon": math.nan}, ["epsilon"]),
        ({"loss.epsilon": math.inf}, ["epsilon"]),
        ({"loss.epsilon": 1 / 16383}, ["epsilon (c - 1)", "below 1"]),
        ({"loss.epsilon": 1 / 16384}, ["epsilon"]),  # the logit of an optimal row would be 0
        ({"loss.codes": "hadamard", "loss.embedding_dim": 100, "loss.num_codes": 1000}, ["power of two", "100"]),
        ({"loss.codes": "hadamard", "loss.embedding_dim": 128, "loss.num_codes": 1000}, ["divides", "1000"]),
        ({"loss.codes": "hadamard", "loss.embedding_dim": 0}, ["power of two"]),
        ({"optimizer.lr": 0.0}, ["optimizer.lr"]),
        ({"optimizer.lr": -1e-3}, ["optimizer.lr"]),
        ({"optimizer.lr": math.nan}, ["optimizer.lr"]),
        ({"optimizer.lr": math.inf}, ["optimizer.lr"]),
        ({"optimizer.momentum": 1.0}, ["optimizer.momentum"]),
        ({"optimizer.ema_decay": 1.0}, ["optimizer.ema_decay", "[0, 1)"]),
        (
            {"training.precision": "fp16", "training.strategy": "fsdp", "fsdp.param_dtype": "bfloat16"},
            ["fsdp.param_dtype", "float32"],
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], words: list[str]) -> None:
    message = one_line(validate, override(Config(), values))
    assert all(word in message for word in words), message


def test_values_at_the_edge_are_valid() -> None:
    validate(override(Config(), {"loss.num_codes": 2, "loss.embedding_dim": 1}))
    validate(override(Config(), {"loss.codes": "hadamard", "loss.embedding_dim": 1, "loss.num_codes": 2}))
    validate(override(Config(), {"loss.epsilon": 1 / 16385, "optimizer.lr": 1e-12, "optimizer.momentum": 0.999}))
    validate(override(Config(), {"training.precision": "bf16", "optimizer.ema_decay": 0.9999}))


def test_a_config_of_before_there_were_precisions_means_the_same(tmp_path: Path) -> None:
    new = ("precision", "accumulate", "exclude_bias_and_norm", "clip_norm", "ema_decay")
    lines = dump_config(load_recipe("digits")).splitlines()
    (tmp_path / "config.toml").write_text("\n".join(line for line in lines if not line.startswith(new)) + "\n")
    assert load_config(tmp_path / "config.toml") == load_recipe("digits")


@pytest.mark.parametrize(
    ("lines", "meant"),
    [
        ("amp = true", "bf16"),
        ("amp = false", "auto"),
        ('amp = true\nprecision = "auto"', "bf16"),
        ('amp = true\nprecision = "bf16"', "bf16"),
        ('amp = false\nprecision = "auto"', "auto"),
        ('amp = false\nprecision = "tf32"', "tf32"),
        ('amp = false\nprecision = "fp16"', "fp16"),
    ],
)
def test_a_config_that_holds_amp_is_read_as_the_precision_that_it_meant(lines: str, meant: str, tmp_path: Path) -> None:
    """config.toml as it was written while `training.amp` was a setting of its own."""
    expected = override(load_recipe("digits"), {"training.precision": meant, "training.seed": 7})
    old = dump_config(expected).replace(f'precision = "{meant}"', lines)
    assert "amp" in old
    assert load_text(tmp_path, old) == expected
    assert "amp" not in dump_config(load_text(tmp_path, old))


def test_a_config_that_contradicts_itself_is_one_line(tmp_path: Path) -> None:
    message = one_line(load_text, tmp_path, '[training]\namp = true\nprecision = "fp16"')
    assert "training.amp" in message and "'fp16'" in message and "conflict" in message


def test_amp_is_no_setting_any_more() -> None:
    for ask in (lambda: parse_assignment("training.amp=true"), lambda: override(Config(), {"training.amp": True})):
        assert "'training.amp': use training.precision=bf16, or --amp" in one_line(ask)


# ---- a config.toml that somebody else wrote ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 50_000, "nested too deeply"),
        ("a." * 1000 + "a = 1", "has a line of more than 512 dots"),
        ("# " + "x" * 70_000, "but at most 65,536 are read"),
        ("x = " + "9" * 5000, "not valid TOML"),
        ("[training]\nseed = 0x" + "f" * 5000, "training.seed must fit into 64 bits"),
        ("training = [0x" + "f" * 5000 + "]", "training must be a table, .*not a list"),
        ("[training]\nseed = {a = 1}", "training.seed must be an integer, not a table"),
        ('[data]\nsize = "' + "x" * 1000 + '"', r"data.size must be an integer, not 'x{75} \.\.\."),
        ('[data]\n"a\\nb" = 1', r"unknown key 'a\\nb' in \[data\]"),
        ('["' + "x" * 10_000 + '"]', r"unknown section 'x+ \.\.\."),
        ("[data]\nsize = 100000", "data.size must be at most 4096 pixels"),
        ("[data]\nsize = 1\nsize = 2", "not valid TOML"),
        ("[training]\nbatch_size = nan", "training.batch_size must be an integer"),
        ("[loss]\nepsilon = nan", "epsilon"),
        ("[loss]\nbeta = inf", "loss.beta must be at least 0, not inf"),
        ('recipe = "\x00"', "not valid TOML"),
    ],
    ids=lambda value: f"{value[:30]!r}-{len(value)}",
)
def test_a_hostile_config_is_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_text(tmp_path, text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_are_read_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump_config(load_recipe("cifar10")))
    outcome = fuzz(lambda: load_config(path), [path], count, name="config.toml", memory=96 * MIB)
    assert outcome.refused > count // 4
