"""Settings by name: typed, checked and overridden."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from falcon_fast.config import (
    Config,
    load_recipe,
    nearest,
    override,
    parse_assignment,
)

from .lines import one_line


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


def test_nearest_always_names_something_valid() -> None:
    many = [f"name{i}" for i in range(50)]
    assert nearest("nam7", many) == "did you mean 'name7'?"
    assert nearest("zzz", many).split("'")[1] in many
    assert nearest("zzz", ["b", "a"]) == "choose one of a, b"


def test_amp_is_no_setting_any_more() -> None:
    for ask in (lambda: parse_assignment("training.amp=true"), lambda: override(Config(), {"training.amp": True})):
        assert "'training.amp': use training.precision=bf16, or --amp" in one_line(ask)
