"""Folders of empty files: the layout of a data set is read off names alone."""

from __future__ import annotations

from pathlib import Path


def make(root: Path, *patterns: str) -> Path:
    """Create empty files. `{a,b}` stands for each name in it, and `*3` at the end for three images in the folder before it."""
    for pattern in patterns:
        for path in expanded(pattern):
            folder, star, count = path.partition("*")
            names = [f"{folder}{i}.jpg" for i in range(int(count))] if star else [path]
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
    return root


def expanded(pattern: str) -> list[str]:
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [f"{head}{choice}{end}" for choice in choices.split(",") for end in expanded(tail)]
