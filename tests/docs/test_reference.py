"""docs/reference agrees with the code, has every option and setting, and the site builds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from falcon_fast import config
from falcon_fast.cli.main import cli
from falcon_fast.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["command-line.md", "settings.md", "recipes.md"])
def test_the_committed_page_is_what_the_code_gives(generate: ModuleType, name: str) -> None:
    written = (REFERENCE / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), "run `python docs/generate.py`"


def test_every_setting_is_on_the_page_with_its_default() -> None:
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    for section, cls in config.SECTIONS.items():
        for field in dataclasses.fields(cls):
            row = next(line for line in page.splitlines() if line.startswith(f"| `{section}.{field.name}` |"))
            cells = [cell.strip() for cell in row.split(" | ")]
            assert json.loads(cells[2].strip("`")) == field.default
            assert len(cells[4]) > 5


def test_the_choices_on_the_page_are_those_that_are_valid(generate: ModuleType) -> None:
    """Each is accepted where nothing else speaks against it, and no other is."""
    for key, choices in generate.CHOICES.items():
        if key == "data.augmentation":
            continue  # checked when the run is made
        for choice in choices:
            config.validate(config.override(config.Config(), {key: choice}))
        with pytest.raises(UsageError, match=f"unknown {re.escape(key)}"):
            config.validate(config.override(config.Config(), {key: "nonsense"}))


def test_every_command_and_option_is_on_the_page() -> None:
    page = (REFERENCE / "command-line.md").read_text(encoding="utf-8")

    def check(command: click.Command, path: str) -> None:
        part = page.split(f"\n## {path}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and path != "falcon-fast":
                row = next(line for line in part.splitlines() if line.startswith(f"| `{parameter.opts[0]}`"))
                assert len(row.split(" | ")[3].strip(" |")) > 5, f"{path} {parameter.opts[0]} has no text"
        if isinstance(command, click.Group):
            for name, sub in command.commands.items():
                check(sub, f"{path} {name}")

    check(cli, "falcon-fast")


def test_a_comment_is_found_wherever_the_field_has_it(generate: ModuleType) -> None:
    comments = generate._comments()
    names = {f"{section}.{f.name}" for section, cls in config.SECTIONS.items() for f in dataclasses.fields(cls)}
    assert set(comments) <= names
    assert names - set(comments) <= set(generate.MEANINGS)
    assert set(generate.MEANINGS) <= names


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the site's builder is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)', text)
        assert not loaded, f"{page.name} loads {loaded[0]} from elsewhere"
        for target in re.findall(r'(?:src|href)="([^"#:]+)(?:#[^"]*)?"', text) if page.name != "404.html" else ():
            assert (page.parent / target).exists(), f"{page.name} leads to {target}, which is not in the site"
