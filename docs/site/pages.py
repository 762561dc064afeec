"""The pages that are made from the code: one a method, compressor, command and section, the API and sources.

Nothing here needs MkDocs. `generated` returns Markdown by its path in the site, and `hooks.py` hands it to the build.
What is documented is found by import (registries, commands, sections), so that a file may move and a new entry of a
registry has its page at once.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import posixpath
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

import mpicomp
from mpicomp.algorithms import ALGORITHMS
from mpicomp.cli import main
from mpicomp.compression import COMPRESSORS
from mpicomp.config.parameters import Choice
from mpicomp.config.sections import SECTIONS, Section

ROOT = Path(__file__).parents[2]
METHODS = Path(__file__).parent / "methods"
"""Equations and advice for each method, written by hand."""

INCLUDED = {
    "README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Markdown files outside ``docs/`` that are pages, with their paths in the site."""

LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash", ".json": "json", ".cff": "yaml", ".yml": "yaml"}
IMAGES = {".svg", ".png"}
LISTED_BYTES = 200_000
"""Longer files are not shown as a page."""

Pages = dict[str, str | Path]
"""By its path in the site: a page's Markdown, or a file to copy."""


def generated() -> Pages:
    """Return all pages that are not written by hand in ``docs/``."""
    pages: Pages = {}
    pages.update(methods())
    pages.update(compressors())
    pages.update(commands())
    pages.update(sections())
    pages.update(api())
    for name, page in INCLUDED.items():
        if (ROOT / name).is_file():
            head = "---\nhide: [navigation]\n---\n\n" if page == "index.md" else ""
            pages[page] = head + relink((ROOT / name).read_text(encoding="utf-8"), name, page)
    pages.update(sources(pages))
    return pages


# Methods and compressors


def methods() -> Pages:
    """Return a page for each algorithm, and their list."""
    rows, pages = [], Pages()
    for kind, algorithm in ALGORITHMS.items():
        page = f"methods/{kind}.md"
        pages[page] = _method(kind, algorithm, page)
        title, summary = _title(_module_doc(algorithm))
        sends = _sentence_after("Wire", _module_doc(algorithm)) or "-"
        rows.append([f"[{title}]({kind}.md)", f"`{kind}`", summary, _linked_modules(sends, "methods/index.md")])
    pages["methods/index.md"] = "\n\n".join(
        [
            "# Methods",
            "When a rank computes and when it talks: the values of `algorithm.kind`. Each page has equations, what is "
            "sent and kept, advice, parameters, and what was measured.",
            _key_table(["method", "`kind`", "in a sentence", "sends"], rows),
        ]
    )
    return pages


def _method(kind: str, algorithm: type, page: str) -> str:
    doc = _module_doc(algorithm)
    title, summary = _title(doc)
    facts = [["`algorithm.kind`", f'`"{kind}"`'], *_facts(algorithm, page, {"Sends": "Wire", "Keeps": "Memory"})]
    parts = [f"# {title}", summary, _table(["", ""], facts)]
    by_hand = METHODS / f"{kind}.md"
    if by_hand.is_file():
        text = by_hand.read_text(encoding="utf-8")
        parts.append(relink(text, by_hand.relative_to(ROOT).as_posix(), page))
    parts += [
        "## Parameters",
        _parameter_table(algorithm, SECTIONS["algorithm"].choices["kind"]) or "None beside those of its section.",
    ]
    config = f"configs/methods/{kind}.toml"
    if (ROOT / config).is_file():
        parts += [
            "## A run",
            f"```console\n$ mpiexec -n 4 mpicomp train {config}\n```",
            _code(ROOT / config, title=config),
        ]
    parts += [
        "## In the words of the source",
        "This is the head of its source file.",
        _docstring(doc),
    ]
    if tables := list(measured(title, algorithm.__name__, page)):
        parts += ["## Measured", "The first row of each table is shown for comparison.", *tables]
    return _linked_modules("\n\n".join(parts) + "\n", page)


def compressors() -> Pages:
    """Return a page for each compressor, and their list."""
    rows, pages = [], Pages()
    for kind, compressor in COMPRESSORS.items():
        page = f"compressors/{kind}.md"
        doc = _module_doc(compressor)
        title, summary = _title(doc)
        size = _sentence_after("Bytes", doc) or "-"
        pages[page] = _linked_modules(
            "\n\n".join(
                [
                    f"# {title}",
                    summary,
                    _table(
                        ["", ""],
                        [["`compression.kind`", f'`"{kind}"`'], *_facts(compressor, page, {"Bytes": "Bytes"})],
                    ),
                    "## Definition",
                    _docstring(doc),
                    "## Parameters",
                    _parameter_table(compressor, SECTIONS["compression"].choices["kind"])
                    or "None beside those of its section.",
                    "The switches `per_tensor`, `dense_1d` and `error_feedback` go with every compressor: see "
                    "[`[compression]`](../toml/compression.md).",
                ]
            )
            + "\n",
            page,
        )
        rows.append([f"[{title}]({kind}.md)", f"`{kind}`", summary, _linked_modules(size, "compressors/index.md")])
    pages["compressors/index.md"] = "\n\n".join(
        [
            "# Compressors",
            "What is sent: the values of `compression.kind`. n is the number of entries.",
            _key_table(["compressor", "`kind`", "in a sentence", "bytes of a message"], rows),
        ]
    )
    return pages


def _linked_modules(text: str, page: str) -> str:
    """Return a text in which the names of modules lead to their pages."""
    names = {name for name, _ in public_modules()}

    def replaced(match: re.Match[str]) -> str:
        return f"[{match[0]}]({_relative(f'api/{match[1]}.md', page)})" if match[1] in names else match[0]

    return re.sub(r"`(mpicomp[\w.]*)`", replaced, text)


def _facts(target: type, page: str, marks: dict[str, str]) -> list[list[str]]:
    """Return the rows about `target` that its module's docstring and its place tell."""
    doc = _module_doc(target)
    rows = [[label, text] for label, mark in marks.items() if (text := _sentence_after(mark, doc))]
    papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{4,5})", doc))
    if papers:
        rows.append(["Papers", ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)])
    source = _source(target)
    rows.append(["Source", f"[`{source}`]({_relative(site_path(source), page)})"])
    rows.append(["API", f"[`{target.__name__}`][{target.__module__}.{target.__qualname__}]"])
    return rows


def measured(title: str, class_name: str, page: str) -> Iterator[str]:
    """Yield what the tables of the studies and benchmarks say of a method, as Markdown.

    A table whose first column names methods is cut down to its first row and those of this method; one that has them
    in its columns stays whole.
    """
    names = {name.strip() for name in re.split(r" / | and |, ", title)}
    names |= {name.removesuffix("-SGD") for name in names}
    if len(class_name) > 3:  # the file that is called SGD is no name for what a table calls so
        names.add(class_name)
    starts = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?![\w])", re.IGNORECASE)
    seen = set()
    for path in [*map(ROOT.joinpath, INCLUDED), *sorted((ROOT / "docs").rglob("*.md"))]:
        if not path.is_file() or METHODS in path.parents:
            continue
        origin = path.relative_to(ROOT).as_posix()
        for heading, lines in _tables(path.read_text(encoding="utf-8")):
            header, rule, *rows = lines
            found = [row for row in rows if starts.match(_cells(row)[0]) and re.search(r"\d", row)]
            if any(starts.match(cell) for cell in _cells(header)[1:]):
                found = rows
            if not found or (key := (header, *found)) in seen:
                continue
            seen.add(key)
            first = rows[:1] if rows[0] not in found else []
            anchor = "#" + slug(heading) if heading else ""
            link = f"From [{heading or origin}]({_relative(site_path(origin), page)}{anchor}):"
            yield "\n".join([link, "", relink("\n".join([header, rule, *first, *found]), origin, page)])


def _tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each table of a Markdown text, with the heading above it."""
    for section in re.split(r"^(?=#)", "\n".join(_without_fences(text)), flags=re.MULTILINE):
        heading = section.split("\n", 1)[0].lstrip("# ").strip() if section.startswith("#") else ""
        for table in re.findall(r"(?:^\|.*\n?){3,}", section, flags=re.MULTILINE):
            yield heading, table.splitlines()


# The command line


def commands() -> Pages:
    """Return a page for each command, and their list."""
    context = click.Context(main, info_name="mpicomp")
    rows, pages = [], Pages()
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        pages[f"cli/{name}.md"] = "\n\n".join(_command(command, name, context, 1)) + "\n"
        rows.append([f"[`mpicomp {name}`]({name}.md)", _prose(command.get_short_help_str(200))])
    pages["cli/index.md"] = "\n\n".join(
        [
            "# Command line",
            _prose(_plain(main.help)),
            _table(["command", ""], rows),
            "## Options of all commands",
            _options(main, context),
        ]
    )
    return pages


def _command(command: click.Command, name: str, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * min(level, 4)} {context.command_path}"
    yield _prose(_plain(command.help))
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```"
    yield _options(command, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            inner = command.get_command(context, child)
            assert inner is not None
            yield from _command(inner, child, context, level + 1)


def _options(command: click.Command, context: click.Context) -> str:
    records = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    return _key_table(["option", ""], [[f"`{_plain(left)}`", _prose(_plain(right))] for left, right in records])


# The configuration


def sections() -> Pages:
    """Return a page for each section of a configuration, and their list."""
    rows, pages = [], Pages()
    for name, section in SECTIONS.items():
        pages[f"toml/{name}.md"] = "\n\n".join(_section(name, section)) + "\n"
        rows.append(
            [f"[`[{name}]`]({name}.md)", _about(section), ", ".join(f"`{key}`" for key in section.model_fields)]
        )
    example = ROOT / "configs/quickstart.toml"
    pages["toml/index.md"] = "\n\n".join(
        [
            "# Configuration",
            "A run is one TOML file. Every key has a default unless it says *required*; a section that is left out has "
            "all of its defaults. `--set section.key=value` changes a key on the command line. A key such as `kind` "
            'chooses an entry, whose parameters are further keys of the section; `kind = "package.module:Name"` takes '
            "one from [outside the package](../how_to/plugins.md), and installed packages may add names. The run "
            "folder's `config.toml` has every value filled in.",
            _table(["section", "", "fixed keys"], rows),
            "## Example",
            _code(example, title="configs/quickstart.toml"),
        ]
    )
    return pages


def _section(name: str, section: type[Section]) -> Iterator[str]:
    yield f"# [{name}]"
    about = _about(section)
    yield about[:1].upper() + about[1:]
    docs = _attribute_docs(section)
    rows = []
    for key, field in section.model_fields.items():
        doc = docs.get(key, "")
        if key in section.choices:
            doc = f"{doc} One of {', '.join(_choice_link(name, key, kind) for kind in section.choices[key].registry)}"
        rows.append([f"`{name}.{key}`", _type(field.annotation, field), _default(field), _prose(doc)])
    yield _key_table(["key", "type", "default", ""], rows)
    for key, choice in section.choices.items():
        yield f"## Values of {name}.{key}"
        if all(str(entry.__module__).startswith("torch.") for entry in choice.registry.values()):
            yield "The classes of `torch.optim` in lower case, whose arguments are further keys."
            yield _table(
                ["value", "further keys"],
                [[f"`{kind}`", _inline(choice.parameters(entry))] for kind, entry in choice.registry.items()],
            )
            continue
        for kind, entry in choice.registry.items():
            yield f"### {kind} {{ #{key}-{kind} }}"
            yield _entry(kind, entry)
            yield _parameter_table(entry, choice) or "No further keys."


def _choice_link(section: str, key: str, kind: str) -> str:
    return f"`{kind}`" if section == "optimizer" else f"[`{kind}`](#{key}-{kind})"


def _entry(kind: str, entry: Callable[..., Any]) -> str:
    """Return what a value means, with a link where it has a page of its own."""
    for registry, folder in ((ALGORITHMS, "methods"), (COMPRESSORS, "compressors")):
        if registry.get(kind) is entry:
            title, summary = _title(_module_doc(entry))
            return f"[{title}](../{folder}/{kind}.md): {summary}"
    doc = inspect.getdoc(entry) or ""
    return _docstring(re.split(r"\n(?:Args|Attributes|Raises|Returns):", doc)[0])


def _parameter_table(entry: Callable[..., Any], choice: Choice) -> str:
    docs = _parameter_docs(entry)
    rows = [
        [f"`{name}`", _type(annotation, field), _default(field), _prose(docs.get(name, ""))]
        for name, (annotation, field) in choice.parameters(entry).items()
    ]
    columns = 4 if any(row[3] for row in rows) else 3
    return _key_table(["key", "type", "default", ""][:columns], [row[:columns] for row in rows]) if rows else ""


def _inline(found: dict[str, tuple[Any, FieldInfo]]) -> str:
    return ", ".join(f"`{name} = {_default(field).strip('`')}`" for name, (_, field) in found.items() if name != "lr")


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return a type in words, with the bounds of `field`."""
    if field is not None and (bounds := _bounds(field.metadata)):
        return f"{_type(annotation)} {bounds}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin is typing.Annotated:
        nested = [m for item in arguments[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return f"{_type(arguments[0])} {_bounds(nested)}".strip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(member) for member in arguments if member is not types.NoneType)
    if origin is not None:
        inner = [_type(member) for member in arguments if member is not Ellipsis]
        return f"list of {inner[0]}"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return words.get(annotation, "value")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {getattr(mark, name):g}" for mark in metadata for name, sign in signs.items() if hasattr(mark, name)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    default = field.get_default(call_default_factory=True)
    return "-" if default is None else f"`{_toml(default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str | Path) else repr(value)


# The API


def api() -> Pages:
    """Return a page for each public module, and the list of what ``import mpicomp`` offers."""
    rows, pages = [], Pages()
    for name in mpicomp.__all__:
        found = getattr(mpicomp, name)
        if isinstance(found, types.ModuleType):
            rows.append([f"[`mpicomp.{name}`]({found.__name__}.md)", _first_sentence(inspect.getdoc(found) or "")])
        elif not isinstance(found, str):
            path = f"{found.__module__}.{found.__qualname__}"
            rows.append([f"[`mpicomp.{name}`][{path}]", _first_sentence(inspect.getdoc(found) or "")])
    modules = []
    for module, file in public_modules():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        pages[f"api/{module}.md"] = f"::: {module}\n{_own_members(tree, file)}"
        modules.append([f"[`{module}`]({module}.md)", _first_sentence(doc)])
    pages["api/index.md"] = "\n\n".join(
        [
            "# API",
            "What a script of your own needs is in `mpicomp` itself, `mpicomp.algorithms`, `mpicomp.compression` and "
            "`mpicomp.topology`.",
            _table(["name", ""], rows),
            "## All modules",
            _table(["module", ""], modules),
        ]
    )
    return pages


@lru_cache
def public_modules() -> list[tuple[str, Path]]:
    """Return name and file of every module whose name has no underscore in front, but those of the command line."""
    found = []
    for info in pkgutil.walk_packages(mpicomp.__path__, "mpicomp."):
        parts = info.name.split(".")[1:]
        if parts[0] == "cli" or any(part.startswith("_") for part in parts):
            continue
        spec = importlib.util.find_spec(info.name)
        assert spec is not None and spec.origin is not None
        found.append((info.name, Path(spec.origin)))
    return found


def _own_members(tree: ast.Module, file: Path) -> str:
    """Return the options that restrict the page of a package to what its ``__init__.py`` itself defines."""
    if file.name != "__init__.py":
        return ""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    public = [name for name in names if not name.startswith("_")]
    return f"    options:\n      members: {public if public else 'false'}\n"


# Sources, which pages link to


def sources(pages: Pages) -> Pages:
    """Return a page for each file, and each folder with its files, that `pages` or those of ``docs/`` link to."""
    texts = [(origin, (ROOT / origin).read_text(encoding="utf-8")) for origin in INCLUDED if (ROOT / origin).is_file()]
    texts += [(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in (ROOT / "docs").rglob("*.md")]
    wanted = {path for origin, text in texts for path in _linked(text, origin)}
    wanted |= {_source(target) for target in (*ALGORITHMS.values(), *COMPRESSORS.values())}
    found: Pages = {}
    while wanted:
        path = wanted.pop()
        full, page = ROOT / path, site_path(path)
        if page in found or page in pages or not page.startswith("source/") or not full.exists():
            continue
        if full.is_dir():
            files = [f for f in sorted(full.iterdir()) if f.is_file() and _is_shown(f)]
            wanted |= {f.relative_to(ROOT).as_posix() for f in files}
            names = [f"- [{f.name}]({_relative(site_path(f.relative_to(ROOT).as_posix()), page)})" for f in files]
            found[page] = _unlisted(path) + "\n".join(names) + "\n"
        elif full.suffix in IMAGES:
            found[page] = full
        elif _is_shown(full):
            found[page] = _unlisted(path) + _code(full) + "\n"
    return found


def _is_shown(path: Path) -> bool:
    return path.suffix != ".pyc" and path.stat().st_size <= LISTED_BYTES


def _unlisted(path: str) -> str:
    """Return the head of a page that search leaves out."""
    return f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"


def _code(path: Path, title: str = "") -> str:
    text = path.read_text(encoding="utf-8").rstrip()
    language = LANGUAGES.get(path.suffix)
    if language is None:
        language = "python" if "python" in text.split("\n", 1)[0] else "bash" if text.startswith("#!") else "text"
    heading = f' title="{title}"' if title else ' linenums="1"'
    return f"~~~~~~ {{ .{language}{heading} }}\n{text}\n~~~~~~"


# Links


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
        return _relative(site_path(path), page) + (match[2] or "")

    return "".join(part if is_fence else _LINK.sub(replaced, part) for is_fence, part in _parts(text))


def _linked(text: str, origin: str) -> Iterator[str]:
    for match in _LINK.finditer("\n".join(_without_fences(text))):
        if (path := _resolved(match[1], origin)) is not None:
            yield path


def _resolved(link: str, origin: str) -> str | None:
    """Return the path in the repository that a link of `origin` leads to, or None."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the text in pieces, and whether each is a fenced block."""
    for i, part in enumerate(re.split(r"(^```.*?^```$|^~~~.*?^~~~+$)", text, flags=re.MULTILINE | re.DOTALL)):
        yield bool(i % 2), part


def _without_fences(text: str) -> list[str]:
    return "".join("" if is_fence else part for is_fence, part in _parts(text)).splitlines()


def slug(heading: str) -> str:
    """Return the anchor of a heading, as Python-Markdown makes it."""
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


# Docstrings


def _module_doc(target: Callable[..., Any]) -> str:
    module = inspect.getmodule(target)
    assert module is not None
    return inspect.getdoc(module) or ""


def _source(target: Callable[..., Any]) -> str:
    """Return the file of `target` in the repository."""
    file = inspect.getsourcefile(target)
    assert file is not None
    return Path(file).resolve().relative_to(ROOT).as_posix()


def _title(doc: str) -> tuple[str, str]:
    """Return name and summary from a first line ``Name: summary.``"""
    title, _, summary = doc.split("\n", 1)[0].partition(":")
    return title.strip(), _prose(summary.strip()[:1].upper() + summary.strip()[1:])


def _sentence_after(mark: str, doc: str) -> str:
    """Return what a docstring says after ``mark:``, up to the next mark or the end of the sentence."""
    match = re.search(rf"\b{mark}:\s+(.*?)(?:\n\n|\Z)", doc, re.DOTALL)
    if match is None:
        return ""
    text = " ".join(match[1].split())
    text = _first_sentence(re.split(r"\s*\b(?:Memory|Wire|Needs):\s", text)[0])
    if (other := re.search(r"see `(mpicomp[\w.]+)`", text)) and mark == "Wire":
        there = inspect.getdoc(importlib.import_module(other[1])) or ""
        if amount := re.search(r"\bBytes sent, .*?\.(?=\s+[A-Z]|\Z)", there, re.DOTALL):
            text = f"{text.rstrip('.')}. {' '.join(amount[0].split())}"
    return _prose(text)


def _first_sentence(text: str) -> str:
    text = " ".join(text.split("\n\n", 1)[0].split())
    match = re.match(r"(.*?[^.\s]\.)(?=\s+[A-Z`]|$)", text)
    return match[1] if match else text


def _parameter_docs(entry: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstrings of a class and its bases, of a function, and of their modules say of parameters."""
    docs: dict[str, str] = {}
    owners = list(entry.__mro__) if isinstance(entry, type) else [entry]
    texts = [_module_doc(entry), *(inspect.cleandoc(o.__doc__ or "") for o in reversed(owners) if o is not object)]
    for text in texts:
        for block in re.findall(
            r"^(?:Attributes|Args|Common arguments):\n((?:(?: {4}.*)?(?:\n|$))+)", text, re.MULTILINE
        ):
            for name, doc in re.findall(r"^(\w+): ((?:.*\n?)(?:^ +.*\n?)*)", textwrap.dedent(block), re.MULTILINE):
                docs[name] = " ".join(doc.split())
    return docs


def _attribute_docs(section: type) -> dict[str, str]:
    """Return the strings below the fields of a class and its bases."""
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not issubclass(owner, Section):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                docs[field.target.id] = " ".join(inspect.cleandoc(str(below.value.value)).split())
    return docs


def _about(section: type) -> str:
    """Return what the first line of a section's docstring says after its name."""
    return _prose((inspect.getdoc(section) or "").split("\n", 1)[0].partition(":")[2].strip())


def _docstring(text: str) -> str:
    """Return a docstring as Markdown: indented listings stay listings."""
    parts = re.split(r"((?:^ {4}.*(?:\n|$)|^\n(?= {4}))+)", text, flags=re.MULTILINE)
    out = []
    for i, part in enumerate(parts):
        if i % 2 and part.strip():
            language = "python" if "mpicomp.distribute(" in part else "text"
            out.append(f"```{language}\n" + textwrap.dedent(part).strip("\n") + "\n```")
        elif part.strip():
            out.append(_prose(part.strip("\n")))
    return "\n\n".join(out)


# Markdown


def _plain(text: str | None) -> str:
    """Return the text of a command's help, without the marks that click takes out."""
    return inspect.cleandoc(text or "").replace("\b\n", "").split("\f")[0].strip()


def _prose(text: str) -> str:
    """Return a text in which nothing is taken for HTML or math; what is in backticks stays as it is."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(
        piece if i % 2 else piece.replace("<", "&lt;").replace("$", "&#36;") for i, piece in enumerate(pieces)
    )


def _key_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that is stacked on a phone."""
    return f'<div class="keys" markdown>\n\n{_table(header, rows)}\n\n</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return a text on one line; a bar that is no code is escaped."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(piece if i % 2 else re.sub(r"(?<!\\)\|", r"\|", piece) for i, piece in enumerate(pieces))


def _cells(row: str) -> list[str]:
    return [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
