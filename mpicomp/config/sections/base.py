"""What the sections of a configuration have in common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, create_model

from mpicomp.config.parameters import Choice
from mpicomp.errors import ConfigError
from mpicomp.plugins import Factory, find, make, names

Values = dict[str, Any]


class Section(BaseModel):
    """A section of the file: its fixed keys, and the choices that bring further keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    section: ClassVar[str]
    choices: ClassVar[Mapping[str, Choice]] = {}

    @classmethod
    def specialized(cls, values: Values) -> type[Section]:
        """Return the pydantic model of this section with the parameters of the factories that `values` choose.

        Raises:
            ConfigError: a choice does not exist, or its parameters cannot be keys of this section.

        """
        chosen, taken = [], set(cls.model_fields) - {"lr"}
        for key, choice in cls.choices.items():
            name = values.get(key, cls.model_fields[key].default)
            if name is None:
                continue
            dotted = f"{cls.section}.{key}"
            if not isinstance(name, str):
                known = ", ".join(names(dotted, choice.registry))
                raise ConfigError(f"{dotted} = {shown(name)} must be a name: {known}")
            target = find(dotted, cls.normalized(name), choice.registry)
            try:
                own = choice.parameters(target)
            except ConfigError as error:
                raise ConfigError(f"{dotted} = {name!r}: {error}") from error
            if clash := [parameter for parameter in own if parameter in taken or hasattr(cls, parameter)]:
                raise ConfigError(
                    f"{dotted} = {name!r}: its parameter {clash[0]!r} needs another name: the section "
                    f"[{cls.section}] has that one already"
                )
            taken.update(own)
            chosen.append((key, target))
        return _with_parameters(cls, tuple(chosen))

    @classmethod
    def normalized(cls, name: str) -> str:
        """Return the name of a choice as its registry spells it."""
        return name

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build what needs neither ranks nor data nor model, as a check; raise ConfigError if that fails.

        `others` holds the sections of the file that have no problems.
        """

    def arguments(self, key: str = "kind") -> Values:
        """Return the values of the parameters of the factory that `key` names."""
        return {name: getattr(self, name) for name in self.choices[key].parameters(self.chosen(key))}

    def chosen(self, key: str = "kind") -> Factory:
        """Return the factory that `key` names."""
        return find(f"{self.section}.{key}", getattr(self, key), self.choices[key].registry)

    def make(self, kind: type | tuple[type, ...], *given: object, **beside: object) -> Any:
        """Return the object of type `kind` that the factory makes; see `mpicomp.plugins.make`."""
        name: str = getattr(self, "kind")  # noqa: B009
        registry = self.choices["kind"].registry
        return make(f"{self.section}.kind", name, registry, kind, *given, **self.arguments(), **beside)


@lru_cache
def _with_parameters(section: type[Section], chosen: tuple[tuple[str, Factory], ...]) -> type[Section]:
    """Return `section` with the parameters of the chosen factories as further fields; the class is cached."""
    fields: dict[str, Any] = {}
    for key, target in chosen:
        for name, (annotation, default) in section.choices[key].parameters(target).items():
            if name not in section.model_fields:
                fields[name] = (annotation, default)
    return create_model(section.__name__, __base__=section, __module__=__name__, **fields)


def shown(value: Any) -> str:
    """Return a value approximately as TOML writes it, for messages."""
    return str(value).lower() if isinstance(value, bool) else repr(value)
