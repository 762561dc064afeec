"""The pages of the sections of a configuration, and of the API."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

import mpicomp
from mpicomp.algorithms import ALGORITHMS
from mpicomp.compression import COMPRESSORS
from mpicomp.config.parameters import Choice
from mpicomp.config.sections import SECTIONS, Section

from .docstrings import as_markdown, attribute_docs, first_sentence, meaning_of, module_doc, parameter_docs, title_of
from .links import ROOT, Pages
from .markdown import key_table, listing, prose, table


def sections() -> Pages:
    """Return a page for each section of a configuration, and their list."""
    rows, pages = [], Pages()
    for name, section in SECTIONS.items():
        pages[f"toml/{name}.md"] = "\n\n".join(_section(name, section)) + "\n"
        rows.append(
            [f"[`[{name}]`]({name}.md)", meaning_of(section), ", ".join(f"`{key}`" for key in section.model_fields)]
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
            table(["section", "", "fixed keys"], rows),
            "## Example",
            listing(example, title="configs/quickstart.toml"),
        ]
    )
    return pages


def _section(name: str, section: type[Section]) -> Iterator[str]:
    yield f"# [{name}]"
    about = meaning_of(section)
    yield about[:1].upper() + about[1:]
    docs = attribute_docs(section)
    rows = []
    for key, field in section.model_fields.items():
        doc = docs.get(key, "")
        if key in section.choices:
            doc = f"{doc} One of {', '.join(_choice_link(name, key, kind) for kind in section.choices[key].registry)}"
        rows.append([f"`{name}.{key}`", _type(field.annotation, field), _default(field), prose(doc)])
    yield key_table(["key", "type", "default", ""], rows)
    for key, choice in section.choices.items():
        yield f"## Values of {name}.{key}"
        if all(str(entry.__module__).startswith("torch.") for entry in choice.registry.values()):
            yield "The classes of `torch.optim` in lower case, whose arguments are further keys."
            yield table(
                ["value", "further keys"],
                [[f"`{kind}`", _inline(choice.parameters(entry))] for kind, entry in choice.registry.items()],
            )
            continue
        for kind, entry in choice.registry.items():
            yield f"### {kind} {{ #{key}-{kind} }}"
            yield _entry(kind, entry)
            yield parameter_table(entry, choice) or "No further keys."


def _choice_link(section: str, key: str, kind: str) -> str:
    return f"`{kind}`" if section == "optimizer" else f"[`{kind}`](#{key}-{kind})"


def _entry(kind: str, entry: Callable[..., Any]) -> str:
    """Return what a value means, with a link where it has a page of its own."""
    for registry, folder in ((ALGORITHMS, "methods"), (COMPRESSORS, "compressors")):
        if registry.get(kind) is entry:
            title, summary = title_of(module_doc(entry))
            return f"[{title}](../{folder}/{kind}.md): {summary}"
    doc = inspect.getdoc(entry) or ""
    return as_markdown(re.split(r"\n(?:Args|Attributes|Raises|Returns):", doc)[0])


def parameter_table(entry: Callable[..., Any], choice: Choice) -> str:
    """Return the table of the parameters of an entry of a registry; empty if it has none."""
    docs = parameter_docs(entry)
    rows = [
        [f"`{name}`", _type(annotation, field), _default(field), prose(docs.get(name, ""))]
        for name, (annotation, field) in choice.parameters(entry).items()
    ]
    columns = 4 if any(row[3] for row in rows) else 3
    return key_table(["key", "type", "default", ""][:columns], [row[:columns] for row in rows]) if rows else ""


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


def api() -> Pages:
    """Return a page for each public module, and the list of what ``import mpicomp`` offers."""
    rows, pages = [], Pages()
    for name in mpicomp.__all__:
        found = getattr(mpicomp, name)
        if isinstance(found, types.ModuleType):
            rows.append([f"[`mpicomp.{name}`]({found.__name__}.md)", first_sentence(inspect.getdoc(found) or "")])
        elif not isinstance(found, str):
            path = f"{found.__module__}.{found.__qualname__}"
            rows.append([f"[`mpicomp.{name}`][{path}]", first_sentence(inspect.getdoc(found) or "")])
    modules = []
    for module, file in public_modules():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        pages[f"api/{module}.md"] = f"::: {module}\n{_own_members(tree, file)}"
        modules.append([f"[`{module}`]({module}.md)", first_sentence(doc)])
    pages["api/index.md"] = "\n\n".join(
        [
            "# API",
            "What a script of your own needs is in `mpicomp` itself, `mpicomp.algorithms`, `mpicomp.compression` and "
            "`mpicomp.topology`.",
            table(["name", ""], rows),
            "## All modules",
            table(["module", ""], modules),
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
