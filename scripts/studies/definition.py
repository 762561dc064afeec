"""The definition of a study, `study.toml`, and the configurations of its runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomllib

from mpicomp.run.search import Axis, Values

Sections = dict[str, Any]

TUNING_SEED = 100
"""The seed of all runs that choose settings; the table has others."""


DECIDE_BY = ("accuracy", "loss", "time")

WITH_HUB = ("asgd", "dc_asgd")
"""Methods whose rank 0 computes no gradients: it comes on top of the ranks of a study."""


class StudyError(Exception):
    """A study that cannot be run; the message names file and key."""


@dataclass(frozen=True)
class Variant:
    """A method or a setting: a part of the configuration, a title, and for a method what is searched for."""

    name: str
    title: str
    sections: Sections
    axes: tuple[Axis, ...] = ()
    ranks: int | None = None
    epochs: int | None = None
    settings: tuple[str, ...] | None = None
    decide_by: str | None = None


@dataclass(frozen=True)
class Study:
    """What `study.toml` says.

    Attributes:
        folder: of the study.
        title: of its table.
        ranks: how many ranks train.
        simulate: whether time is simulated.
        epochs: of a run of the table.
        short_epochs: of a run of the search.
        points: the budget of the search, in runs, of each method in each setting.
        finalists: how many of the best points of the search are run at full length.
        seeds: of the table.
        validation: how many training samples are held out to choose settings by.
        decide_by: ``"accuracy"``, ``"loss"``, or ``"time"``: the epochs until the mean accuracy of three evaluations
            has come to the target. A setting may have its own.
        target: an accuracy in percent, or a loss if that decides; the table then has epochs, seconds and megabytes to
            it.
        reference: the method with which the others are compared.
        other_links: simulations by their name, in which the methods of the table are timed, too: a method in step takes
            the same steps there.
        check: the method and setting of the short run that CI repeats.
        common: the sections of the configuration that all runs have.
        settings: data, ratio, graph; each has a table of its own.
        methods: the rows of the tables.

    """

    folder: Path
    title: str
    ranks: int
    simulate: bool
    epochs: int
    short_epochs: int
    points: int
    finalists: int
    seeds: tuple[int, ...]
    validation: int
    decide_by: str
    target: float | None
    reference: str
    other_links: dict[str, Sections]
    check: tuple[str, str]
    common: Sections
    settings: tuple[Variant, ...]
    methods: tuple[Variant, ...]

    def cells(self) -> Iterator[tuple[Variant, Variant]]:
        """Yield every setting with every method that is run in it."""
        for setting in self.settings:
            for method in self.methods:
                if method.settings is None or setting.name in method.settings:
                    yield setting, method

    def of(self, setting: Variant) -> Study:
        """Return the study as it is for a setting, which may decide otherwise."""
        return replace(self, decide_by=setting.decide_by) if setting.decide_by else self

    def config(self, setting: Variant, method: Variant, values: Values, **training: Any) -> Sections:
        """Return the configuration of a run, without seed and length but for `training`."""
        config = copy.deepcopy(self.common)
        for part in (setting.sections, method.sections):
            merge_(config, part)
        for key, value in values.items():
            section, name = key.split(".")
            config.setdefault(section, {})[name] = value
        config.setdefault("training", {}).update(training)
        return config

    def size(self, setting: Variant, method: Variant) -> int:
        """Return how many ranks are started."""
        ranks = method.ranks or setting.ranks or self.ranks
        has_hub = self.config(setting, method, {})["algorithm"]["kind"] in WITH_HUB
        return ranks + (has_hub and ranks > 1)

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Read `folder`/study.toml; raise StudyError, naming the key, if something is wrong with it."""
        path = folder / "study.toml"
        try:
            table = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise StudyError(f"{path}: {error}") from error
        values: Sections = {"simulate": False, "seeds": [0, 1, 2, 3, 4], "validation": 5000, "decide_by": "accuracy"}
        values |= {"finalists": 2, "target": None, "common": {}, "reference": "", "other_links": {}, **table}
        known = [field.name for field in fields(cls) if field.name != "folder"]
        if unknown := [key for key in values if key not in known]:
            raise StudyError(f"{path}: {unknown[0]} is unknown; a study has {', '.join(known)}")
        if missing := [key for key in known if key not in values]:
            raise StudyError(f"{path}: {missing[0]} is missing")
        for key in ("settings", "methods"):
            values[key] = tuple(_variant(path, key, *pair) for pair in values[key].items())
        for decide_by in (values["decide_by"], *(setting.decide_by for setting in values["settings"])):
            if decide_by not in (None, *DECIDE_BY) or (decide_by == "time" and values["target"] is None):
                raise StudyError(
                    f"{path}: decide_by must be one of {', '.join(DECIDE_BY)}; time needs a target in percent"
                )
        values |= {"check": tuple(values["check"]), "seeds": tuple(values["seeds"])}
        study = cls(folder=folder, **values)
        names = {setting.name for setting in study.settings}
        for method in study.methods:
            if unknown := sorted(set(method.settings or ()) - names):
                raise StudyError(f"{path}: methods.{method.name}.settings names {unknown[0]!r}, which is no setting")
        if study.other_links and not (study.simulate and study.target):
            raise StudyError(f"{path}: other_links needs simulate = true and a target")
        if study.check not in {(s.name, m.name) for s, m in study.cells()}:
            raise StudyError(f"{path}: check = {list(study.check)} must be a setting and a method of it")
        return study


def _variant(path: Path, key: str, name: str, table: Sections) -> Variant:
    axes = []
    for axis, given in table.pop("search", {}).items():
        if set(given) != {"start", "factor"} or not given["start"] > 0 or not given["factor"] > 1:
            raise StudyError(f"{path}: {key}.{name}.search.{axis!r} needs start > 0 and factor > 1")
        axes.append(Axis(axis, float(given["start"]), float(given["factor"])))
    title, chosen = table.pop("title", name), table.pop("settings", None)
    ranks, epochs, decide_by = (table.pop(entry, None) for entry in ("ranks", "epochs", "decide_by"))
    if wrong := [entry for entry, value in table.items() if not isinstance(value, dict)]:
        raise StudyError(f"{path}: {key}.{name}.{wrong[0]} is no section of a configuration")
    return Variant(name, title, table, tuple(axes), ranks, epochs, None if chosen is None else tuple(chosen), decide_by)


def merge_(into: Sections, part: Mapping[str, Any]) -> None:
    """Put the keys of `part` into `into`, section by section; another ``kind`` drops the keys of the one before."""
    for section, keys in part.items():
        before = into.get(section, {})
        if "kind" in keys and before.get("kind") not in (None, keys["kind"]):
            before = {}
        into[section] = before | copy.deepcopy(keys)


def digest(config: Sections) -> str:
    """Return what identifies a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
