"""What mkdocs needs beside docs/: the pages of the root, and files that pages link to, under names inside the site.

In the repository a page links to `../README.md` or `../examples/new_rule.py`, and README.md to `docs/options.md`. The
same links lead to the same things in the site: root pages are pages of it, other files lie in its folder `source`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)([^)\s#]+)")
_found: dict[str, str] = {}  # the text of each root page, with the links of the site


def on_files(files: Files, config: Any) -> Files:
    """Add root pages, and every file outside docs/ that a page links to."""
    linked: set[str] = set()
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_linked((ROOT / name).read_text("utf-8"), "", linked)))
    for file in list(files.documentation_pages()):
        if file.src_uri not in PAGES.values():
            _found[file.src_uri] = _linked(file.content_string, "docs", linked)
    for name in sorted(linked):
        path = ROOT / name
        if path.is_file():  # one that is not there is a link that mkdocs warns of
            files.append(File.generated(config, f"source/{name}", content=path.read_bytes()))
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The text of a page of docs/ with the links of the site."""
    return _found.get(page.file.src_uri)


def _linked(text: str, folder: str, linked: set[str]) -> str:
    """The text with links as they are in the site, noting those to files outside docs/."""

    def replaced(match: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(folder, match[1]))
        if name.startswith("docs/"):
            return name.removeprefix("docs/")
        if name in PAGES:
            return PAGES[name]
        linked.add(name)
        return f"source/{name}"

    return LINK.sub(replaced, text)
