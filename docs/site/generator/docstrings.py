"""What docstrings say, as Markdown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from mpicomp.config.sections import Section

from .markdown import prose


def module_doc(target: Callable[..., Any]) -> str:
    """Return the docstring of the module that defines `target`."""
    module = inspect.getmodule(target)
    assert module is not None
    return inspect.getdoc(module) or ""


def title_of(doc: str) -> tuple[str, str]:
    """Return name and summary from a first line ``Name: summary.``"""
    title, _, summary = doc.split("\n", 1)[0].partition(":")
    return title.strip(), prose(summary.strip()[:1].upper() + summary.strip()[1:])


def sentence_after(mark: str, doc: str) -> str:
    """Return what a docstring says after ``mark:``, up to the next mark or the end of the sentence."""
    match = re.search(rf"\b{mark}:\s+(.*?)(?:\n\n|\Z)", doc, re.DOTALL)
    if match is None:
        return ""
    text = " ".join(match[1].split())
    text = first_sentence(re.split(r"\s*\b(?:Memory|Wire|Needs):\s", text)[0])
    if (other := re.search(r"see `(mpicomp[\w.]+)`", text)) and mark == "Wire":
        there = inspect.getdoc(importlib.import_module(other[1])) or ""
        if amount := re.search(r"\bBytes sent, .*?\.(?=\s+[A-Z]|\Z)", there, re.DOTALL):
            text = f"{text.rstrip('.')}. {' '.join(amount[0].split())}"
    return prose(text)


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring, on one line."""
    text = " ".join(text.split("\n\n", 1)[0].split())
    match = re.match(r"(.*?[^.\s]\.)(?=\s+[A-Z`]|$)", text)
    return match[1] if match else text


def parameter_docs(entry: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstrings of a class and its bases, of a function, and of their modules say of parameters."""
    docs: dict[str, str] = {}
    owners = list(entry.__mro__) if isinstance(entry, type) else [entry]
    texts = [module_doc(entry), *(inspect.cleandoc(o.__doc__ or "") for o in reversed(owners) if o is not object)]
    for text in texts:
        for block in re.findall(
            r"^(?:Attributes|Args|Common arguments):\n((?:(?: {4}.*)?(?:\n|$))+)", text, re.MULTILINE
        ):
            for name, doc in re.findall(r"^(\w+): ((?:.*\n?)(?:^ +.*\n?)*)", textwrap.dedent(block), re.MULTILINE):
                docs[name] = " ".join(doc.split())
    return docs


def attribute_docs(section: type) -> dict[str, str]:
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


def meaning_of(section: type) -> str:
    """Return what the first line of a section's docstring says after its name."""
    return prose((inspect.getdoc(section) or "").split("\n", 1)[0].partition(":")[2].strip())


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown: indented listings stay listings."""
    parts = re.split(r"((?:^ {4}.*(?:\n|$)|^\n(?= {4}))+)", text, flags=re.MULTILINE)
    out = []
    for i, part in enumerate(parts):
        if i % 2 and part.strip():
            language = "python" if "mpicomp.distribute(" in part else "text"
            out.append(f"```{language}\n" + textwrap.dedent(part).strip("\n") + "\n```")
        elif part.strip():
            out.append(prose(part.strip("\n")))
    return "\n\n".join(out)
