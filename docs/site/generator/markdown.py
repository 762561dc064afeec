"""Markdown: tables, listings, escapes, and the parts of a text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash", ".json": "json", ".cff": "yaml", ".yml": "yaml"}


def plain(text: str | None) -> str:
    """Return the text of a command's help, without the marks that click takes out."""
    return inspect.cleandoc(text or "").replace("\b\n", "").split("\f")[0].strip()


def prose(text: str) -> str:
    """Return a text in which nothing is taken for HTML or math; what is in backticks stays as it is."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(
        piece if i % 2 else piece.replace("<", "&lt;").replace("$", "&#36;") for i, piece in enumerate(pieces)
    )


def key_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that is stacked on a phone."""
    return f'<div class="keys" markdown>\n\n{table(header, rows)}\n\n</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; its cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return a text on one line; a bar that is no code is escaped."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(piece if i % 2 else re.sub(r"(?<!\\)\|", r"\|", piece) for i, piece in enumerate(pieces))


def cells(row: str) -> list[str]:
    """Return the cells of a row of a table, without the stars around what is bold."""
    return [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def tables_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each table of a Markdown text, with the heading above it."""
    for section in re.split(r"^(?=#)", "\n".join(without_fences(text)), flags=re.MULTILINE):
        heading = section.split("\n", 1)[0].lstrip("# ").strip() if section.startswith("#") else ""
        for lines in re.findall(r"(?:^\|.*\n?){3,}", section, flags=re.MULTILINE):
            yield heading, lines.splitlines()


def without_fences(text: str) -> list[str]:
    """Return the lines of a text that are in no fenced block."""
    return "".join("" if is_fence else part for is_fence, part in split_at_fences(text)).splitlines()


def split_at_fences(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the text in pieces, and whether each is a fenced block."""
    for i, part in enumerate(re.split(r"(^```.*?^```$|^~~~.*?^~~~+$)", text, flags=re.MULTILINE | re.DOTALL)):
        yield bool(i % 2), part


def slug(heading: str) -> str:
    """Return the anchor of a heading, as Python-Markdown makes it."""
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def listing(path: Path, title: str = "") -> str:
    """Return a file as a fenced block, with a title or else with numbers of lines."""
    text = path.read_text(encoding="utf-8").rstrip()
    language = LANGUAGES.get(path.suffix)
    if language is None:
        language = "python" if "python" in text.split("\n", 1)[0] else "bash" if text.startswith("#!") else "text"
    heading = f' title="{title}"' if title else ' linenums="1"'
    return f"~~~~~~ {{ .{language}{heading} }}\n{text}\n~~~~~~"
