"""Settings by their names `section.key`: how they are typed on a command line, checked for their type, and overridden."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from falcon_fast.config.settings import SECTIONS, Config
from falcon_fast.errors import UsageError


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the nearest valid name, or all valid names if none is near and they are few."""
    valid, name = sorted(valid), name[:80]
    few = len(valid) <= 12
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5 if few else 0.0)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(valid)}"


def all_keys() -> list[str]:
    """Return the names of all settings."""
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def checked(key: str, value: Any, kind: type) -> Any:
    """Return `value` as a `kind`. Raises UsageError if it has another type; only an int is accepted as a float."""
    if type(value) is int and not -(2**63) <= value < 2**63:  # the limits of TOML's integers and of torch's seeds
        raise UsageError(f"{key} must fit into 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{key} must be {_KIND_NAMES[kind]}, not {shown(value)}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        # A file name that is not UTF-8 arrives with surrogates, which a TOML file cannot hold.
        raise UsageError(f"{key} must be UTF-8 text, not {value!r}: rename the folder or link to it")
    return value


def shown(value: Any) -> str:
    """Return a value as messages show it: on one line of at most 80 characters."""
    if isinstance(value, Mapping | list):  # one may be large or deep, or hold an integer that is too long to be printed
        return "a table" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _unknown(name: str) -> UsageError:
    """Return the error for a setting that does not exist, with the name that was probably meant."""
    replaced = name == "training.amp"  # a setting of development versions
    return UsageError(
        f"unknown setting {name!r}: {'use training.precision=bf16, or --amp' if replaced else nearest(name, all_keys())}"
    )


def override(config: Config, assignments: Mapping[str, Any]) -> Config:
    """Return `config` with other values for some settings.

    assignments: `section.key` to a value of the setting's own type.

    Raises:
        UsageError: a setting is unknown, or its value has another type.
    """
    for name, value in assignments.items():
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            raise _unknown(name)
        types = get_type_hints(SECTIONS[section])
        if key not in types:
            raise _unknown(name)
        part = dataclasses.replace(getattr(config, section), **{key: checked(name, value, types[key])})
        config = dataclasses.replace(config, **{section: part})
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of `section.key=value`, as typed on a command line. The value is read as the setting's type.

    Raises:
        UsageError: there is no `=`, the setting is unknown, or the value has another type.
    """
    name, equals, raw = text.partition("=")
    name, raw = name.strip(), raw.strip()
    if not equals:
        raise UsageError(f"--set takes section.key=value, not {text!r}")
    section, _, key = name.partition(".")
    kind = get_type_hints(SECTIONS[section]).get(key) if section in SECTIONS else None
    if kind is None:
        raise _unknown(name)
    try:
        if kind is bool:
            return name, {"true": True, "false": False, "1": True, "0": False}[raw.lower()]
        return name, kind(raw)
    except (ValueError, KeyError):
        raise UsageError(f"{name} must be {_KIND_NAMES[kind]}, not {raw!r}") from None
