"""Links, images and paths in README.md, CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and docs/ lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of, prose, spans

LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PLACES = ("falcon_fast", "kernels", "tests", "benchmarks", "examples", "docs", ".ci", ".github")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"[`*]", "", heading).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", words)).strip("-"))
    return found


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_relative_links_and_images_exist(page: Path) -> None:
    links = LINK.findall(prose(page))
    for target in links:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_relative_to(ROOT), target
        assert place.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(place), f"{name_of(page)} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_paths_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        path = span.rstrip("/")
        if path.split("/")[0] in PLACES and re.fullmatch(r"[\w./-]+", span) and "/" in span:
            assert (ROOT / path).exists(), f"{name_of(page)} names {span}, which does not exist"
        if re.fullmatch(r"falcon_fast(\.\w+)+", span):
            check_name(span)


def check_name(name: str) -> None:
    """`falcon_fast.x.y` is a module, or a name in one."""
    import importlib

    module, _, attribute = name.rpartition(".")
    found = importlib.import_module(module)
    if not hasattr(found, attribute):
        importlib.import_module(name)


def test_there_are_links_to_check() -> None:
    """The expressions above find what they are for."""
    assert sum(len(LINK.findall(prose(page))) for page in LINKED) > 80
    assert "what-may-change" in anchors(ROOT / "docs" / "how-to" / "resuming.md")
    with pytest.raises(ImportError):
        check_name("falcon_fast.nothing")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
