"""For MkDocs: pages may link to files of the repository, which are then part of the site.

A page links to `../examples/slurm.sh` or `../benchmarks/results/digits-curves.png` relative to itself, as a forge shows it.
The site has no files from outside docs/, so this hook adds each linked file under `repository/` and points the link there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
PLACE = "repository"


def _repository_path(source: str, target: str) -> str | None:
    """The path in the repository that a link of the page `source` (below docs/) leads to; None where it stays inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if path.startswith(("docs/", "..")) or not (ROOT / path).is_file() else path


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to."""
    found = set()
    for page in files.documentation_pages():
        text = Path(page.abs_src_path).read_text(encoding="utf-8")
        found |= {_repository_path(page.src_uri, target) for _, target in LINK.findall(text)}
    for path in sorted(filter(None, found)):
        files.append(File.generated(config, f"{PLACE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files of the repository to their copies in the site."""

    def moved(match: re.Match[str]) -> str:
        path = _repository_path(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(f"{PLACE}/{path}", posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)
