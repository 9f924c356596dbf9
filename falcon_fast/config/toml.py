"""Recipes, and the config.toml of a run: TOML read into the tree of settings, and written from it."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from falcon_fast.config.assignments import checked, nearest, shown
from falcon_fast.config.settings import SECTIONS, Config
from falcon_fast.config.validation import validate
from falcon_fast.errors import UsageError
from falcon_fast.reading import read_toml

LARGEST_CONFIG = 2**16  # bytes of a config.toml: the settings take 2 KB, and a path 4 KB


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in resources.files("falcon_fast.recipes").iterdir()
        if p.name.endswith(".toml")
    )


def recipe_description(name: str) -> str:
    """Return the one-line description of a recipe."""
    return str(_recipe_tables(name)["description"])


def _recipe_tables(name: str) -> dict[str, Any]:
    if name not in recipe_names():
        raise UsageError(f"unknown recipe {name!r}: {nearest(name, recipe_names())}")
    return tomllib.loads((resources.files("falcon_fast.recipes") / f"{name}.toml").read_text(encoding="utf-8"))


def load_recipe(name: str) -> Config:
    """Return the configuration of a recipe of the package. Raises UsageError, with the nearest name, if it is unknown."""
    tables = _recipe_tables(name)
    tables.pop("description")
    return config_from({"recipe": name, **tables}, where=f"recipe {name}")


def load_config(path: Path) -> Config:
    """Read the configuration of a run, as `dump_config` wrote it.

    Raises:
        UsageError: the file is missing or not valid.
    """
    try:
        tables = read_toml(path, LARGEST_CONFIG)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"cannot read the settings in {path.parent}: {error}") from None
    return validate(config_from(_translated(tables), where=str(path)))


def _translated(tables: dict[str, Any]) -> dict[str, Any]:
    """Replace `training.amp`, which config.toml of older runs holds, by the `training.precision` that it meant."""
    training = tables.get("training")
    if not isinstance(training, dict) or "amp" not in training:
        return tables
    training = dict(training)
    amp, precision = checked("training.amp", training.pop("amp"), bool), training.get("precision", "auto")
    if amp and precision not in ("auto", "bf16"):
        raise UsageError(
            f"training.amp = true and training.precision = {shown(precision)} conflict: remove training.amp"
        )
    if amp:
        training["precision"] = "bf16"
    return {**tables, "training": training}


def config_from(tables: Mapping[str, Any], where: str) -> Config:
    """Return the configuration that nested tables hold; settings that they do not hold have their defaults.

    where: what the tables are, for messages.

    Raises:
        UsageError: a section or a setting is unknown, or a value has another type.
    """
    if not isinstance(tables, Mapping):
        raise UsageError(f"{where}: the settings must be a table, not {shown(tables)}")
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section == "recipe":
            values[section] = checked("recipe", table, str)
            continue
        if section not in SECTIONS:
            raise UsageError(f"{where}: unknown section {shown(section)}: {nearest(section, SECTIONS)}")
        if not isinstance(table, Mapping):
            raise UsageError(f"{where}: {section} must be a table, [{section}], not {shown(table)}")
        cls = SECTIONS[section]
        types = get_type_hints(cls)
        for key in table:
            if key not in types:
                name = f"{section}.{key}" if key.isidentifier() else f"{shown(key)} in [{section}]"
                raise UsageError(f"{where}: unknown key {name[:80]}: {nearest(key, types)}")
        values[section] = cls(**{key: checked(f"{section}.{key}", value, types[key]) for key, value in table.items()})
    return Config(**values)


def toml_value(value: str | int | float | bool) -> str:
    """Return a value as TOML: JSON's integers, booleans and finite floats are valid TOML, and so are strings without a DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def dump_config(config: Config) -> str:
    """Return the whole configuration as TOML text, which `load_config` reads."""
    lines = [f"recipe = {toml_value(config.recipe)}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{k} = {toml_value(v)}" for k, v in dataclasses.asdict(getattr(config, section)).items()]
    return "\n".join(lines) + "\n"
