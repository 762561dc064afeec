"""Problems in a section of a configuration: one sentence for each, with a guess at what was meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpicomp.config.sections import SECTIONS, Section, shown
from mpicomp.errors import ConfigError, MpicompError, nearest
from mpicomp.plugins import find

SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "name": "kind",
    "type": "kind",
    "batch": "batch_size",
    "max_steps": "steps",
    "k": "ratio",
    "fraction": "ratio",
    "consensus_step": "gamma",
}
"""Common names of keys that have another name here."""


class Checked:
    """The values of a section, checked: the pydantic model that they choose, and the result or the problems."""

    def __init__(self, section: type[Section], values: Any) -> None:
        self.name = section.section
        self.result: Section | None = None
        self._model: type[Section] = section
        self._problem: str | None = None
        self._errors: list[ErrorDetails] = []
        self._values = values
        if not isinstance(values, dict):
            self._problem = f"{self.name} = {shown(values)} must be a section: [{self.name}]"
            return
        try:
            self._model = section.specialized(values)
            # As JSON, because only there a list may become a tuple without numbers becoming text and the like.
            self.result = self._model.model_validate_json(json.dumps(values, default=str))
            if wrong := [key for key, value in values.items() if value != value]:
                self.result, self._problem = None, f"{self.name}.{wrong[0]} = nan must be a number"
        except ConfigError as error:
            self._problem = str(error)
        except ValidationError as error:
            self._errors = error.errors(include_url=False)

    @property
    def known(self) -> list[str]:
        """The known keys of the section."""
        return list(self._model.model_fields)

    def problems(self, known: Mapping[str, list[str]]) -> Iterator[str]:
        """Yield the problems, one sentence each; `known` holds the keys of all sections."""
        if self._problem is not None:
            yield self._problem
        grouped: dict[str, list[ErrorDetails]] = {}
        for error in self._errors:
            # Further entries of `loc` name members of a union, which mean nothing to a user.
            grouped.setdefault(str(error["loc"][0]) if error["loc"] else "", []).append(error)
        for key, errors in grouped.items():
            yield self._sentence(key, errors, known)

    def _sentence(self, key: str, errors: list[ErrorDetails], known: Mapping[str, list[str]]) -> str:
        dotted = f"{self.name}.{key}" if key else self.name
        kind = errors[0]["type"]
        if kind == "extra_forbidden":
            return unknown(self.name, key, known, self._values.get("kind"))
        if kind == "missing":
            return f"{dotted} is missing{self._needed_by(key)}"
        if not key:
            return f"{self.name} {errors[0]['msg'].removeprefix('Value error, ')}"
        rules = " or ".join(dict.fromkeys(_rule(error) for error in errors))
        return f"{dotted} = {shown(self._values.get(key))} {rules}"

    def _needed_by(self, key: str) -> str:
        for choosing, choice in self._model.choices.items():
            name = self._values.get(choosing)
            if name is None:
                continue
            if key in choice.parameters(find(f"{self.name}.{choosing}", self._model.normalized(name), choice.registry)):
                return f": {self.name}.{choosing} = {name!r} needs it"
        return " and has no default"


def _rule(error: ErrorDetails) -> str:
    """Return ``"must be ..."`` for a violated rule, with the closest allowed name."""
    allowed = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    hint = nearest(str(error["input"]), allowed) if error["type"] == "literal_error" else ""
    at = "".join(f"entry {part} " for part in error["loc"][1:] if isinstance(part, int))
    text = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{at and f'({at.strip()}) '}{text}{'.' + hint if hint else ''}"


def unknown(section: str, key: str, known: Mapping[str, list[str]], kind: str | None = None) -> str:
    """Return the sentence for an unknown section or key, with the closest known one."""
    if not key:
        hint = _elsewhere(section, known) or nearest(section, known)
        return f"{section} is unknown.{hint or ' Sections: ' + ', '.join(known) + '.'}"
    of = f" for {section}.kind = {kind!r}" if kind is not None else ""
    hint = _owners(section, key) or _elsewhere(key, known) or _close(section, key, known[section])
    return f"{section}.{key} is unknown{of}.{hint or ' Known: ' + ', '.join(known[section]) + '.'}"


def _owners(section: str, key: str) -> str:
    """Return the choices of the section that have the parameter `key`."""
    owners = [
        f"{section}.{choosing} = {name!r}"
        for choosing, choice in SECTIONS[section].choices.items()
        for name, target in choice.registry.items()
        if key in choice.parameters(target)
    ]
    return f" It belongs to {' or '.join(owners[:4])}." if owners else ""


def _close(section: str, key: str, known: Iterable[str]) -> str:
    names = list(known)
    synonym = SYNONYMS.get(key.lower())
    close = [synonym] if synonym in names else difflib.get_close_matches(key.lower(), names, n=1)
    return f" Did you mean '{section}.{close[0]}'?" if close else ""


def _elsewhere(key: str, known: Mapping[str, list[str]]) -> str:
    """Return a hint to the other section that has `key`, if exactly one has it."""
    key = SYNONYMS.get(key, key)
    places = [section for section, keys in known.items() if key in keys]
    return f" Did you mean '{places[0]}.{key}'?" if len(places) == 1 else ""


def refusals(sections: Mapping[str, Section]) -> list[str]:
    """Return the problems of sections whose values have the right types."""
    found = []
    for section in sections.values():
        try:
            section.try_out(sections)
        except MpicompError as error:
            found.append(str(error))
    return found
