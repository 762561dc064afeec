"""What MkDocs calls while it builds: generated pages, the list of pages, links into the repository, equations."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from generator.links import INCLUDED, relink  # MkDocs finds what lies beside its hooks
from generator.pages import generated
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mpicomp.algorithms import ALGORITHMS
from mpicomp.compression import COMPRESSORS
from mpicomp.config.sections import SECTIONS

GUIDES = ["tutorial.md", "training_script.md", "transformers.md", "lightning.md"]
"""The first pages after the start, in this order; further ones in ``docs/`` follow, and those of ``docs/how_to``."""
LAST = ["troubleshooting.md"]

Nav = list[Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and list all pages."""
    for path, content in generated().items():
        if isinstance(content, Path):
            files.append(File.generated(config, path, abs_src_path=str(content)))
        else:
            files.append(File.generated(config, path, content=content))
    for name in ("style.css", "worker.js"):
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(Path(__file__).parent / name)))
    config.nav = _nav({file.src_uri for file in files.documentation_pages()})
    return files


def _nav(found: set[str]) -> Nav:
    """Return the pages by subject; a page in ``docs/`` that is not listed here is among the guides."""
    known = {*GUIDES, *LAST, *INCLUDED.values()}
    further = sorted(page for page in found if "/" not in page and page not in known)

    def there(*names: str) -> Nav:
        return [name for name in names if name in found]

    def folder(name: str) -> Nav:
        inside = sorted(page for page in found if page.startswith(f"{name}/") and page != f"{name}/index.md")
        return [*there(f"{name}/index.md"), *inside]

    nav: Nav = [
        {"Start": "index.md"},
        {"Guides": [*there(*GUIDES), *further, *folder("how_to"), *there(*LAST)]},
        {"Methods": ["methods/index.md", *(f"methods/{kind}.md" for kind in ALGORITHMS)]},
        {"Compressors": ["compressors/index.md", *(f"compressors/{kind}.md" for kind in COMPRESSORS)]},
        {"Measured": [*folder("studies"), *there("benchmarks.md")]},
        {
            "Reference": [
                {"Command line": folder("cli")},
                {"Configuration": ["toml/index.md", *(f"toml/{name}.md" for name in SECTIONS)]},
                {"API": _modules(found)},
            ]
        },
        {"Project": there("changelog.md", "contributing.md")},
    ]
    return nav


def _modules(found: set[str]) -> Nav:
    """Return the pages of the API, those of a package together."""
    nav: Nav = ["api/index.md"]
    packages: dict[str, Nav] = {}
    for page in sorted(page for page in found if page.startswith("api/mpicomp.")):
        name = page.removeprefix("api/").removesuffix(".md")
        package = ".".join(name.split(".")[:2])
        if package not in packages:
            packages[package] = []
        packages[package].append({name.removeprefix(f"{package}.").removeprefix("mpicomp."): page})
    for package, entries in packages.items():
        nav += entries if len(entries) == 1 else [{package.removeprefix("mpicomp."): entries}]
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of pages in ``docs/`` to files of the repository into links to their pages."""
    if page.file.generated_by is not None:
        return markdown
    return relink(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


_EQUATION = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render equations as MathML, which browsers show without a script and without internet."""

    def rendered(match: re.Match[str]) -> str:
        is_block = match[1] == "div"
        latex = html.unescape(match[2]).strip()
        latex = latex.removeprefix("\\[" if is_block else "\\(").removesuffix("\\]" if is_block else "\\)").strip()
        try:
            math = latex2mathml.converter.convert(latex, display="block" if is_block else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: equation {latex!r} cannot be rendered: {error!r}") from error
        if "<mi>&</mi>" in math or "\\" in math:  # what the converter does not know, it shows as it stands
            raise PluginError(f"{page.file.src_uri}: equation {latex!r} has a command or environment that is not known")
        return f'<div class="equation">{math}</div>' if is_block else math

    return _EQUATION.sub(rendered, content)
