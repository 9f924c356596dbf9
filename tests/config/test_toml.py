"""Recipes, and a config.toml that loads back whatever it holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

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
    override,
    recipe_description,
    recipe_names,
    validate,
)
from falcon_fast.errors import UsageError

from ..fuzz import COUNTS, MIB, fuzz
from .lines import load_text, one_line


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


def test_an_unknown_recipe_gives_the_nearest() -> None:
    assert "'digits'" in one_line(load_recipe, "digit")
    assert "'cifar10-resnet8'" in one_line(load_recipe, "cifar10-resnet-8")
    assert "cifar10, cifar10-resnet8, cifar100, digits, folder, imagenet100, svhn" in one_line(load_recipe, "zzz")
    one_line(load_recipe, "../recipes/digits")
    one_line(load_recipe, "")


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
        ("[data]\nsize = 100000", "data.size must be at most 4096, not 100000"),
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
