"""Where files of the repository are in the site, links between them, and the pages of sources that are linked to."""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpicomp.algorithms import ALGORITHMS
from mpicomp.compression import COMPRESSORS

from .markdown import listing, split_at_fences, without_fences

ROOT = Path(__file__).parents[3]
METHODS = Path(__file__).parents[1] / "methods"
"""Equations and advice for each method, written by hand."""

INCLUDED = {
    "README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Markdown files outside ``docs/`` that are pages, with their paths in the site."""

IMAGES = {".svg", ".png"}
LISTED_BYTES = 200_000
"""Longer files are not shown as a page."""

Pages = dict[str, str | Path]
"""By its path in the site: a page's Markdown, or a file to copy."""


def sources(pages: Pages) -> Pages:
    """Return a page for each file, and each folder with its files, that `pages` or those of ``docs/`` link to."""
    texts = [(origin, (ROOT / origin).read_text(encoding="utf-8")) for origin in INCLUDED if (ROOT / origin).is_file()]
    texts += [(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in (ROOT / "docs").rglob("*.md")]
    wanted = {path for origin, text in texts for path in _linked(text, origin)}
    wanted |= {source_of(target) for target in (*ALGORITHMS.values(), *COMPRESSORS.values())}
    found: Pages = {}
    while wanted:
        path = wanted.pop()
        full, page = ROOT / path, site_path(path)
        if page in found or page in pages or not page.startswith("source/") or not full.exists():
            continue
        if full.is_dir():
            files = [f for f in sorted(full.iterdir()) if f.is_file() and _is_shown(f)]
            wanted |= {f.relative_to(ROOT).as_posix() for f in files}
            names = [f"- [{f.name}]({relative(site_path(f.relative_to(ROOT).as_posix()), page)})" for f in files]
            found[page] = _unlisted(path) + "\n".join(names) + "\n"
        elif full.suffix in IMAGES:
            found[page] = full
        elif _is_shown(full):
            found[page] = _unlisted(path) + listing(full) + "\n"
    return found


def _is_shown(path: Path) -> bool:
    return path.suffix != ".pyc" and path.stat().st_size <= LISTED_BYTES


def _unlisted(path: str) -> str:
    """Return the head of a page that search leaves out."""
    return f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"


def source_of(target: Callable[..., Any]) -> str:
    """Return the file of `target` in the repository."""
    file = inspect.getsourcefile(target)
    assert file is not None
    return Path(file).resolve().relative_to(ROOT).as_posix()


def site_path(path: str) -> str:
    """Return where a file or folder of the repository is in the site."""
    if path in INCLUDED:
        return INCLUDED[path]
    if Path(ROOT, path).parent == METHODS:
        return f"methods/{Path(path).name}"
    if path.startswith("docs/") and path.endswith(".md") and not path.startswith("docs/site/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if Path(path).suffix in IMAGES else f"source/{path}.md"


_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def relink(text: str, origin: str, page: str) -> str:
    """Return Markdown of the file `origin` with its links as they are in the site, seen from `page`."""

    def replaced(match: re.Match[str]) -> str:
        path = _resolved(match[1], origin)
        if path is None:
            return match[0]
        return relative(site_path(path), page) + (match[2] or "")

    return "".join(part if is_fence else _LINK.sub(replaced, part) for is_fence, part in split_at_fences(text))


def _linked(text: str, origin: str) -> Iterator[str]:
    for match in _LINK.finditer("\n".join(without_fences(text))):
        if (path := _resolved(match[1], origin)) is not None:
            yield path


def _resolved(link: str, origin: str) -> str | None:
    """Return the path in the repository that a link of `origin` leads to, or None."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def relative(target: str, page: str) -> str:
    """Return the link from a page to a target, both by their paths in the site."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
