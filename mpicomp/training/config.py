"""One TOML file = one run: sections, checks, defaults, and what is built from them.

    [run]          seed, device, how often to record and to evaluate
    [data]         kind, path, partition; the parameters of both
    [model] [topology] [compression] [algorithm] [optimizer] [schedule]     kind, and the parameters of that kind
    [training]     epochs or steps, batch_size

The parameters of a kind are those of the function or class that its registry names: type and default are read from
the signature, so that one line in the registry makes a new kind known here. ``kind = "my_pkg.my_file:MyCompressor"``
takes one from outside the package; the current folder is searched too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import tomli_w
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from torch import nn

from mpicomp.algorithms import ALGORITHMS, Algorithm
from mpicomp.compression import COMPRESSORS, Compressor, ErrorFeedback, Identity, PerTensor
from mpicomp.errors import ConfigError, MpicompError, nearest, unknown_name
from mpicomp.topology import TOPOLOGIES, make_topology
from mpicomp.topology.base import Schedule
from mpicomp.training import data, models
from mpicomp.training.partition import PARTITIONS, Indices, partition
from mpicomp.training.schedule import SCHEDULES
from mpicomp.training.schedule import Schedule as LearningRate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Factory = Callable[..., Any]
Values = dict[str, Any]
B = TypeVar("B")

_UNSUPPORTED = {"lbfgs", "sparseadam"}
"""Optimizers that need a closure or sparse gradients, which the training loop does not have."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): optimizer
    for name, optimizer in vars(torch.optim).items()
    if isinstance(optimizer, type)
    and issubclass(optimizer, torch.optim.Optimizer)
    and optimizer is not torch.optim.Optimizer
    and name.lower() not in _UNSUPPORTED
}
"""The values of ``optimizer.kind``: the classes of `torch.optim` in lower case."""

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
"""What people write for a key whose name looks different."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key that names an entry of a registry.

    Attributes:
        registry: the entries; one from outside the package joins it under its import path.
        given: how many leading parameters of an entry are not the user's to set.

    """

    registry: MutableMapping[str, Any]
    given: int = 0

    def find(self, key: str, name: str) -> Factory:
        """Return the entry `name`; `key` is for the error.

        Raises:
            ConfigError: no such entry, or an import path that leads nowhere.

        """
        if name not in self.registry:
            if ":" not in name:
                raise unknown_name(key, name, self.registry)
            self.registry[name] = _imported(key, name)
        found: Factory = self.registry[name]
        return found


class Section(BaseModel):
    """A section of the file with fixed keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    choices: ClassVar[Mapping[str, Choice]] = {}

    @classmethod
    def section(cls) -> str:
        """Return the name of the section."""
        return SECTION_NAMES[next(base for base in cls.__mro__ if base in SECTION_NAMES)]

    @classmethod
    def specialized(cls, values: Values) -> type[Section]:
        """Return the model of this section with the parameters of what `values` choose.

        Raises:
            ConfigError: a choice that does not exist.

        """
        chosen = []
        for key, choice in cls.choices.items():
            name = values.get(key, cls.model_fields[key].default)
            if not isinstance(name, str):
                raise ConfigError(f"{cls.section()}.{key} = {_shown(name)} must be a name: {_listed(choice.registry)}")
            chosen.append((choice.find(f"{cls.section()}.{key}", cls.normalized(name)), choice.given))
        return _with_parameters(cls, tuple(chosen))

    @classmethod
    def normalized(cls, name: str) -> str:
        """Return the spelling of a choice under which its registry has it."""
        return name

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build what can be built before ranks, data and model are known; raise ConfigError if that is refused.

        `others` holds the sections of the file that are in order.
        """

    def parameters(self, key: str = "kind") -> Values:
        """Return the parameters of what `key` has chosen."""
        choice = self.choices[key]
        names = _parameters(choice.find(f"{self.section()}.{key}", getattr(self, key)), choice.given)
        return {name: getattr(self, name) for name in names}


class RunSection(Section):
    """``[run]``: the run as a whole."""

    seed: NonNegativeInt = 0
    """Of initialization, partition and batches; random graphs and compressors have a seed of their own."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``"auto"`` takes a GPU where there is one."""

    allow_shared_gpu: bool = False
    """Whether several ranks may share a GPU."""

    log_every: PositiveInt = 10
    """Steps from one record in ``metrics.jsonl`` to the next."""

    evaluate_every_epochs: PositiveInt = 1
    """Epochs from one evaluation of the averaged model to the next; the last step is always evaluated."""


class DataSection(Section):
    """``[data]``: what is learnt, and which rank holds which part of it."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(data.DATASETS, 1), "partition": Choice(PARTITIONS, 3)}

    kind: str = "digits"
    path: str | None = None
    """The data folder, or the file itself; else the environment variable ``MPICOMP_DATA``, else ``./data``."""

    partition: str = "iid"

    def load(self) -> data.Dataset:
        """Read the data set; raise DataError if it is missing or damaged."""
        return data.load(self.kind, Path(self.path) if self.path else None, **self.parameters())

    def split(self, labels: npt.NDArray[np.int64], ranks: int, seed: int) -> list[Indices]:
        """Return the training samples of each rank, given the class (n,) of every sample."""
        return partition(self.partition, labels, ranks, seed, **self.parameters("partition"))


class ModelSection(Section):
    """``[model]``: what is trained."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(models.MODELS, 1)}

    kind: str = "mlp"

    def build(self, dataset: data.Dataset, seed: int) -> nn.Module:
        """Return the model for `dataset` on the CPU; its parameters depend on the arguments alone."""
        return models.build(
            self.kind,
            dataset.input_shape,
            dataset.classes,
            seed,
            task=dataset.task,
            data_kind=dataset.kind,
            **self.parameters(),
        )


class TopologySection(Section):
    """``[topology]``: who talks to whom."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(TOPOLOGIES, 1)}

    kind: str = "ring"

    def build(self, size: int) -> Schedule:
        """Return the graph over `size` ranks; raise TopologyError if there is none."""
        return make_topology(self.kind, size, **self.parameters())


class CompressionSection(Section):
    """``[compression]``: what is sent."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(COMPRESSORS)}

    kind: str = "identity"
    per_tensor: bool = False
    """Whether each tensor is compressed by itself, instead of the model as one vector."""

    error_feedback: bool = False
    """Whether what was not sent is added to the next message; CHOCO-SGD and AdaGossip do that by themselves."""

    def build(self) -> Compressor:
        """Return the compressor: ``ErrorFeedback(PerTensor(inner))`` with both switches on."""
        compressor = _built(self, Compressor, lambda: COMPRESSORS[self.kind](**self.parameters()))
        if self.per_tensor:
            compressor = PerTensor(compressor)
        return ErrorFeedback(compressor) if self.error_feedback else compressor

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the compressor."""
        self.build()


class AlgorithmSection(Section):
    """``[algorithm]``: when to compute and when to talk."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(ALGORITHMS)}

    kind: str = "dpsgd"

    def build(self, compressor: Compressor) -> Algorithm[Any]:
        """Return the algorithm, which sends with `compressor`.

        Raises:
            ConfigError: a parameter out of its range, or a compressor for an algorithm that does not compress.

        """
        target = ALGORITHMS[self.kind]
        arguments = self.parameters()
        if "compressor" in inspect.signature(target).parameters:
            arguments["compressor"] = compressor
        elif not isinstance(compressor, Identity):
            raise ConfigError(
                f"algorithm.kind = {self.kind!r} sends uncompressed messages, so the section [compression] must be "
                "left out (or compression.kind = 'identity'). Algorithms that compress: 'choco', 'adagossip', "
                "'deep_squeeze'."
            )
        return _built(self, Algorithm, lambda: target(**arguments))

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the algorithm; a compressor that cannot be built is reported by its own section."""
        compression = others.get("compression")
        compressor: Compressor = Identity()
        if isinstance(compression, CompressionSection):
            with contextlib.suppress(ConfigError):
                compressor = compression.build()
        self.build(compressor)


class OptimizerSection(Section):
    """``[optimizer]``: the local step, any class of `torch.optim` but LBFGS and SparseAdam."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(OPTIMIZERS, 1)}

    kind: str = "sgd"
    lr: float = Field(gt=0, allow_inf_nan=False)
    """The learning rate, required; ``[schedule]`` changes it over the run."""

    decay_1d: bool = True
    """Whether weight decay also holds for biases and the scales of normalizations, as in plain `torch.optim`."""

    @classmethod
    def normalized(cls, name: str) -> str:
        """Return names of `torch.optim` in lower case."""
        return name if ":" in name else name.lower()

    @field_validator("kind")
    @classmethod
    def _lower(cls, kind: str) -> str:
        return cls.normalized(kind)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the trainable parameters of `model`."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[Values] = [{"params": trained}]
        if not self.decay_1d:
            groups = [{"params": [p for p in trained if p.ndim > 1]}]
            groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
        return self.over([group for group in groups if group["params"]])

    def over(self, groups: list[Values]) -> torch.optim.Optimizer:
        """Return the optimizer over groups of parameters; raise ConfigError if it refuses a value or a group."""
        return _built(self, torch.optim.Optimizer, lambda: OPTIMIZERS[self.kind](groups, **self.parameters()))

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the optimizer over a matrix: some take nothing else."""
        self.over([{"params": [torch.zeros(1, 1, requires_grad=True)]}])


class ScheduleSection(Section):
    """``[schedule]``: the learning rate over time."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(SCHEDULES, 1)}

    kind: str = "constant"

    def build(self, total_epochs: float) -> LearningRate:
        """Return the factor of ``optimizer.lr`` as a function of the epoch, for a run of `total_epochs`."""
        return _built(self, LearningRate, lambda: SCHEDULES[self.kind](total_epochs, **self.parameters()))

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the schedule if the length of the run is known in epochs."""
        training = others.get("training")
        if isinstance(training, TrainingSection) and training.epochs is not None:
            self.build(training.epochs)


class TrainingSection(Section):
    """``[training]``: how long, in which portions."""

    epochs: PositiveInt | None = None
    """Passes over the data of all ranks together; or give `steps`."""

    steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    """Samples per rank and step."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of training.epochs and training.steps")
        return self


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A checked configuration with all defaults filled in; equal to another one if all of its values are."""

    run: RunSection
    data: DataSection
    model: ModelSection
    topology: TopologySection
    compression: CompressionSection
    algorithm: AlgorithmSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    training: TrainingSection

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
        """Read and check the file `path`.

        Args:
            path: a TOML file.
            overrides: ``section.key=value``; the value is TOML, or text as it stands where it is not. An empty value
                removes the key from the file; ``training.steps`` takes the place of ``training.epochs`` and vice versa.

        Raises:
            ConfigError: a file that cannot be read, or all problems found in it, one a line.

        """
        values = _read(Path(path))
        problems = _override_(values, overrides)
        return cls._from_values(values, problems, str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "configuration") -> RunConfig:
        """Check a configuration that is given as text; raise ConfigError with all problems, which names `source`."""
        return cls._from_values(_parsed(text, source), [], source)

    @classmethod
    def _from_values(cls, values: Values, problems: list[str], source: str) -> RunConfig:
        sections = {name: _Checked(SECTIONS[name], values.get(name, {})) for name in SECTIONS}
        known = {name: checked.known for name, checked in sections.items()}
        problems += [_unknown(name, "", known) for name in values if name not in SECTIONS]
        problems += [problem for checked in sections.values() for problem in checked.problems(known)]
        sound = {name: checked.result for name, checked in sections.items() if checked.result is not None}
        problems += _refusals(sound)
        if problems:
            raise ConfigError(_report(source, problems))
        return cls(**sound)  # type: ignore[arg-type]

    def to_toml(self) -> str:
        """Return the configuration as TOML, all defaults filled in; `from_toml` gives an equal one back."""
        return tomli_w.dumps(
            {name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in SECTIONS}
        )

    def check(self, size: int) -> tuple[Schedule, Algorithm[Any]]:
        """Return graph and algorithm for `size` ranks, after a check that they fit; nothing large is allocated.

        Raises:
            ConfigError: a graph that does not exist at this size, or that the algorithm cannot use.

        """
        schedule = self.topology.build(size)
        algorithm = self.algorithm.build(self.compression.build())
        algorithm.check(schedule)
        return schedule, algorithm


SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "data": DataSection,
    "model": ModelSection,
    "topology": TopologySection,
    "compression": CompressionSection,
    "algorithm": AlgorithmSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "training": TrainingSection,
}
SECTION_NAMES: dict[type, str] = {section: name for name, section in SECTIONS.items()}


class _Checked:
    """A section against its values: the model that they choose, and the result or what is wrong."""

    def __init__(self, section: type[Section], values: Any) -> None:
        self.name = section.section()
        self.result: Section | None = None
        self._model: type[Section] = section
        self._problem: str | None = None
        self._errors: list[ErrorDetails] = []
        self._values = values
        if not isinstance(values, dict):
            self._problem = f"{self.name} = {_shown(values)} must be a section: [{self.name}]"
            return
        try:
            self._model = section.specialized(values)
            # As JSON, because only there a list may become a tuple without numbers becoming text and the like.
            self.result = self._model.model_validate_json(json.dumps(values, default=str))
        except ConfigError as error:
            self._problem = str(error)
        except ValidationError as error:
            self._errors = error.errors(include_url=False)

    @property
    def known(self) -> list[str]:
        """The keys of the section."""
        return list(self._model.model_fields)

    def problems(self, known: Mapping[str, list[str]]) -> Iterator[str]:
        """Yield what is wrong; `known` holds the keys of all sections."""
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
            return _unknown(self.name, key, known, self._values.get("kind"))
        if kind == "missing":
            return f"{dotted} is missing{self._needed_by()}"
        if not key:
            return f"{self.name} {errors[0]['msg'].removeprefix('Value error, ')}"
        rules = " or ".join(dict.fromkeys(_rule(error) for error in errors))
        return f"{dotted} = {_shown(self._values.get(key))} {rules}"

    def _needed_by(self) -> str:
        kind = self._values.get("kind")
        return f": {self.name}.kind = {kind!r} needs it" if kind is not None else " and has no default"


def _rule(error: ErrorDetails) -> str:
    """Return ``"must be ..."``, with the nearest of the allowed names."""
    allowed = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    hint = nearest(str(error["input"]), allowed) if error["type"] == "literal_error" else ""
    at = "".join(f"entry {part} " for part in error["loc"][1:] if isinstance(part, int))
    text = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{at and f'({at.strip()}) '}{text}{'.' + hint if hint else ''}"


def _unknown(section: str, key: str, known: Mapping[str, list[str]], kind: str | None = None) -> str:
    """Return the sentence for an unknown section or key, with what was probably meant."""
    if not key:
        hint = _elsewhere(section, known) or nearest(section, known)
        return f"{section} is unknown.{hint or f' Sections: {_listed(known)}.'}"
    of = f" for {section}.kind = {kind!r}" if kind is not None else ""
    hint = _owners(section, key) or _close(section, key, known[section]) or _elsewhere(key, known)
    return f"{section}.{key} is unknown{of}.{hint or f' Known: {_listed(known[section])}.'}"


def _owners(section: str, key: str) -> str:
    """Return which choices of the section have the parameter `key`."""
    owners = [
        f"{section}.{choosing} = {name!r}"
        for choosing, choice in SECTIONS[section].choices.items()
        for name, target in choice.registry.items()
        if key in _parameters(target, choice.given)
    ]
    return f" It belongs to {' or '.join(owners[:4])}." if owners else ""


def _close(section: str, key: str, known: Iterable[str]) -> str:
    names = list(known)
    synonym = SYNONYMS.get(key.lower())
    close = [synonym] if synonym in names else difflib.get_close_matches(key.lower(), names, n=1)
    return f" Did you mean '{section}.{close[0]}'?" if close else ""


def _elsewhere(key: str, known: Mapping[str, list[str]]) -> str:
    """Return a hint to the section that has `key`, if only one has."""
    key = SYNONYMS.get(key, key)
    places = [section for section, keys in known.items() if key in keys]
    return f" Did you mean '{places[0]}.{key}'?" if len(places) == 1 else ""


def _refusals(sections: Mapping[str, Section]) -> list[str]:
    """Return what is wrong with values that have the right type."""
    refusals = []
    for section in sections.values():
        try:
            section.try_out(sections)
        except MpicompError as error:
            refusals.append(str(error))
    return refusals


def _report(source: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])


def _built(section: Section, kind: Any, make: Callable[[], B]) -> B:
    """Return what `make` makes, a `kind`; errors of the constructor become ConfigErrors with dotted keys."""
    try:
        made = make()
    except ConfigError as error:
        raise type(error)(_dotted(section, str(error))) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section.section()}: {error}") from error
    if not isinstance(made, kind):
        name = getattr(section, "kind", None)
        raise ConfigError(f"{section.section()}.kind = {name!r} makes a {type(made).__name__}, not a {kind.__name__}")
    return made


def _dotted(section: Section, message: str) -> str:
    """Put the section in front of a key that a message begins with."""
    key = re.match(r"\w+(?= = )", message)
    return f"{section.section()}.{message}" if key and key[0] in type(section).model_fields else message


def _imported(key: str, path: str) -> Factory:
    """Return ``module:name``; the current folder is searched as it is by ``python -m``."""
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Factory = getattr(importlib.import_module(module), name)
        inspect.signature(found)
    except AttributeError as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {path!r} is no class or function whose parameters can be read") from error
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise ConfigError(f"{key} = {path!r}: {module!r} cannot be imported: {error!r}") from error
    return found


@lru_cache
def _with_parameters(section: type[Section], chosen: tuple[tuple[Factory, int], ...]) -> type[Section]:
    """Return `section` with the parameters of what was chosen as further fields; the same class each time."""
    fields: dict[str, Any] = {}
    for target, given in chosen:
        for name, (annotation, default) in _parameters(target, given).items():
            if name not in section.model_fields:
                fields[name] = (annotation, default)
    return create_model(section.__name__, __base__=section, __module__=__name__, **fields)


@lru_cache
def _parameters(target: Factory, given: int) -> dict[str, tuple[Any, FieldInfo]]:
    """Return type and default of each parameter of `target` that a configuration may set, without the first `given`."""
    hints = _type_hints(target)
    parameters: dict[str, tuple[Any, FieldInfo]] = {}
    for parameter in list(inspect.signature(target).parameters.values())[given:]:
        required = parameter.default is parameter.empty
        annotation = _plain(hints.get(parameter.name, Any if required else type(parameter.default)))
        if annotation is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not required and not _is_plain(parameter.default):
            continue
        field = Field() if required else Field(default=_as_read(annotation, parameter.default))
        parameters[parameter.name] = (annotation, field)
    return parameters


def _as_read(annotation: Any, default: Any) -> Any:
    """Return a default as it would come out of a file: a 0 of a float as 0.0, a sequence as the type says."""
    if default is None:
        return None
    return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_json(json.dumps(default, default=str))


def _type_hints(target: Factory) -> dict[str, Any]:
    if dataclasses.is_dataclass(target) or not isinstance(target, type):
        return get_type_hints(target, include_extras=True)
    initialize: Factory = target.__init__  # type: ignore[misc]
    return get_type_hints(initialize, include_extras=True)


def _plain(annotation: Any) -> Any:
    """Return the part of a type that TOML can express, or None."""
    if annotation in (bool, int, float, str, Path, Any):
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin is Annotated:
        return annotation if _plain(arguments[0]) is not None else None
    if origin in (Union, types.UnionType):
        members = [m if m is types.NoneType else _plain(m) for m in arguments]
        if all(m in (None, types.NoneType) for m in members):
            return None
        return Union[tuple(m for m in members if m is not None)]  # noqa: UP007
    if origin in (list, tuple, Sequence):
        members = [m if m is Ellipsis else _plain(m) for m in arguments]
        return None if None in members else origin[tuple(members)]
    return None


def _is_plain(value: Any) -> bool:
    """Whether a default can be written as TOML; None by itself is left out."""
    if isinstance(value, list | tuple):
        return all(entry is not None and _is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | Path)


def _read(path: Path) -> Values:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return _parsed(text, str(path))


def _parsed(text: str, source: str) -> Values:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not TOML: {error}") from error


def _override_(values: Values, overrides: Sequence[str]) -> list[str]:
    """Put `overrides` into `values`; return what is wrong with them."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        section, dot, key = dotted.strip().partition(".")
        if not (equals and dot and section and key):
            problems.append(f"--set {override}: must have the form section.key=value, e.g. --set optimizer.lr=0.1")
        elif isinstance(table := values.setdefault(section, {}), dict):
            if section == "training" and key in ("steps", "epochs"):
                table.pop("epochs" if key == "steps" else "steps", None)
            table.pop(key, None)
            if text:
                table[key] = _value(text)
    return problems


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
