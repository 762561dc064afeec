"""All pages that are made from the code: one a method, compressor, command and section, the API and sources.

`generated` returns Markdown by its path in the site. What is documented is found by import (registries, commands,
sections), so that a file may move and a new entry of a registry has its page at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from mpicomp.algorithms import ALGORITHMS
from mpicomp.cli import main
from mpicomp.compression import COMPRESSORS
from mpicomp.config.sections import SECTIONS

from .docstrings import as_markdown, module_doc, sentence_after, title_of
from .links import INCLUDED, METHODS, ROOT, Pages, relative, relink, site_path, source_of, sources
from .markdown import cells, key_table, listing, plain, prose, slug, table, tables_of
from .reference import api, parameter_table, public_modules, sections


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


def methods() -> Pages:
    """Return a page for each algorithm, and their list."""
    rows, pages = [], Pages()
    for kind, algorithm in ALGORITHMS.items():
        page = f"methods/{kind}.md"
        pages[page] = _method(kind, algorithm, page)
        title, summary = title_of(module_doc(algorithm))
        sends = sentence_after("Wire", module_doc(algorithm)) or "-"
        rows.append([f"[{title}]({kind}.md)", f"`{kind}`", summary, _linked_modules(sends, "methods/index.md")])
    pages["methods/index.md"] = "\n\n".join(
        [
            "# Methods",
            "When a rank computes and when it talks: the values of `algorithm.kind`. Each page has equations, what is "
            "sent and kept, advice, parameters, and what was measured.",
            key_table(["method", "`kind`", "in a sentence", "sends"], rows),
        ]
    )
    return pages


def _method(kind: str, algorithm: type, page: str) -> str:
    doc = module_doc(algorithm)
    title, summary = title_of(doc)
    facts = [["`algorithm.kind`", f'`"{kind}"`'], *_facts(algorithm, page, {"Sends": "Wire", "Keeps": "Memory"})]
    parts = [f"# {title}", summary, table(["", ""], facts)]
    by_hand = METHODS / f"{kind}.md"
    if by_hand.is_file():
        text = by_hand.read_text(encoding="utf-8")
        parts.append(relink(text, by_hand.relative_to(ROOT).as_posix(), page))
    parts += [
        "## Parameters",
        parameter_table(algorithm, SECTIONS["algorithm"].choices["kind"]) or "None beside those of its section.",
    ]
    config = f"configs/methods/{kind}.toml"
    if (ROOT / config).is_file():
        parts += [
            "## A run",
            f"```console\n$ mpiexec -n 4 mpicomp train {config}\n```",
            listing(ROOT / config, title=config),
        ]
    parts += [
        "## In the words of the source",
        "This is the head of its source file.",
        as_markdown(doc),
    ]
    if tables := list(measured(title, algorithm.__name__, page)):
        parts += ["## Measured", "The first row of each table is shown for comparison.", *tables]
    return _linked_modules("\n\n".join(parts) + "\n", page)


def compressors() -> Pages:
    """Return a page for each compressor, and their list."""
    rows, pages = [], Pages()
    for kind, compressor in COMPRESSORS.items():
        page = f"compressors/{kind}.md"
        doc = module_doc(compressor)
        title, summary = title_of(doc)
        size = sentence_after("Bytes", doc) or "-"
        pages[page] = _linked_modules(
            "\n\n".join(
                [
                    f"# {title}",
                    summary,
                    table(
                        ["", ""],
                        [["`compression.kind`", f'`"{kind}"`'], *_facts(compressor, page, {"Bytes": "Bytes"})],
                    ),
                    "## Definition",
                    as_markdown(doc),
                    "## Parameters",
                    parameter_table(compressor, SECTIONS["compression"].choices["kind"])
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
            key_table(["compressor", "`kind`", "in a sentence", "bytes of a message"], rows),
        ]
    )
    return pages


def _linked_modules(text: str, page: str) -> str:
    """Return a text in which the names of modules lead to their pages."""
    names = {name for name, _ in public_modules()}

    def replaced(match: re.Match[str]) -> str:
        return f"[{match[0]}]({relative(f'api/{match[1]}.md', page)})" if match[1] in names else match[0]

    return re.sub(r"`(mpicomp[\w.]*)`", replaced, text)


def _facts(target: type, page: str, marks: dict[str, str]) -> list[list[str]]:
    """Return the rows about `target` that its module's docstring and its place tell."""
    doc = module_doc(target)
    rows = [[label, text] for label, mark in marks.items() if (text := sentence_after(mark, doc))]
    papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{4,5})", doc))
    if papers:
        rows.append(["Papers", ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)])
    source = source_of(target)
    rows.append(["Source", f"[`{source}`]({relative(site_path(source), page)})"])
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
        for heading, lines in tables_of(path.read_text(encoding="utf-8")):
            header, rule, *rows = lines
            found = [row for row in rows if starts.match(cells(row)[0]) and re.search(r"\d", row)]
            if any(starts.match(cell) for cell in cells(header)[1:]):
                found = rows
            if not found or (key := (header, *found)) in seen:
                continue
            seen.add(key)
            first = rows[:1] if rows[0] not in found else []
            anchor = "#" + slug(heading) if heading else ""
            link = f"From [{heading or origin}]({relative(site_path(origin), page)}{anchor}):"
            yield "\n".join([link, "", relink("\n".join([header, rule, *first, *found]), origin, page)])


def commands() -> Pages:
    """Return a page for each command, and their list."""
    context = click.Context(main, info_name="mpicomp")
    rows, pages = [], Pages()
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        pages[f"cli/{name}.md"] = "\n\n".join(_command(command, name, context, 1)) + "\n"
        rows.append([f"[`mpicomp {name}`]({name}.md)", prose(command.get_short_help_str(200))])
    pages["cli/index.md"] = "\n\n".join(
        [
            "# Command line",
            prose(plain(main.help)),
            table(["command", ""], rows),
            "## Options of all commands",
            _options(main, context),
        ]
    )
    return pages


def _command(command: click.Command, name: str, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * min(level, 4)} {context.command_path}"
    yield prose(plain(command.help))
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
    return key_table(["option", ""], [[f"`{plain(left)}`", prose(plain(right))] for left, right in records])
