"""The sections of a configuration: their fixed keys, and what is built from them.

A key such as ``kind`` names an entry of a registry; the other keys of the section are the parameters of that entry.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    create_model,
    field_validator,
    model_validator,
)
from torch import nn

from mpicomp import models
from mpicomp.algorithms import ALGORITHMS, GOSSIP, Algorithm, AnyAlgorithm, AsynchronousAlgorithm, Gossip
from mpicomp.compression import COMPRESSORS, Compressor, ErrorFeedback, Identity, PerTensor
from mpicomp.compression.wrap.allocation import BY_BANDWIDTH, Rule, check_rule
from mpicomp.config.parameters import Choice
from mpicomp.config.schedule import SCHEDULES, LearningRateSchedule
from mpicomp.config.signals import signal_number
from mpicomp.data import datasets as data
from mpicomp.data.partition import PARTITIONS, Indices, partition
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import together
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.node import groups_by_host, groups_of_size, nodes_of
from mpicomp.exchange.node_sums import NodeSums
from mpicomp.plugins import Factory, find, make, names
from mpicomp.replica.clipping import Clip
from mpicomp.replica.gradient_delay import GradientDelay, Spread
from mpicomp.replica.several_optimizers import SeveralOptimizers
from mpicomp.topology import TOPOLOGIES, make_topology
from mpicomp.topology.absence import Absences
from mpicomp.topology.base import Schedule

Values = dict[str, Any]

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
    choices: ClassVar[Mapping[str, Choice]] = {}

    @classmethod
    def section(cls) -> str:
        """Return the name of the section."""
        return SECTION_NAMES[next(base for base in cls.__mro__ if base in SECTION_NAMES)]

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
            dotted = f"{cls.section()}.{key}"
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
                    f"[{cls.section()}] has that one already"
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
        return find(f"{self.section()}.{key}", getattr(self, key), self.choices[key].registry)

    def make(self, kind: type | tuple[type, ...], *given: object, **beside: object) -> Any:
        """Return the object of type `kind` that the factory makes; see `mpicomp.plugins.make`."""
        name: str = getattr(self, "kind")  # noqa: B009
        registry = self.choices["kind"].registry
        return make(f"{self.section()}.kind", name, registry, kind, *given, **self.arguments(), **beside)


class RunSection(Section):
    """``[run]``: the run as a whole."""

    seed: NonNegativeInt = 0
    """The seed of initialization, partition and batches; random graphs and compressors have seeds of their own."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``"auto"`` takes a GPU if there is one."""

    allow_shared_gpu: bool = False
    """Whether several ranks may share a GPU."""

    node_sums: NodeSums = "auto"
    """What adds up dense vectors inside a node, before MPI does between nodes: ``"nccl"`` between GPUs, ``"gloo"`` on
    the CPU, or ``"mpi"``. ``"auto"`` takes NCCL if every rank has a GPU of its own and a node has several ranks. For
    ``ssgd``, whose rounding may differ then."""

    log_every: PositiveInt = 10
    """Steps from one record in ``metrics.jsonl`` to the next."""

    evaluate_every_epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Epochs from one evaluation of the averaged model to the next; may be fractional. The model after the last step is
    evaluated, too."""

    stop_signal: str = "USR1"
    """The signal, sent to any rank, that asks the run to store a checkpoint and to end with exit code 75."""

    hang_timeout_s: float = Field(600.0, ge=0, allow_inf_nan=False)
    """Seconds without a step after which a rank reports what it waits for, and the run ends; 0 for no limit."""

    on_peer_loss: Literal["stop", "continue"] = "stop"
    """What the other ranks do when one has died; ``"continue"`` for ``dpsgd``, ``choco``, ``adagossip`` and, on one
    machine, ``dc_gossip``."""

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Check the name of the signal."""
        signal_number(self.stop_signal)


class DataSection(Section):
    """``[data]``: the data set, and its partition over the ranks."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(data.DATASETS, 1), "partition": Choice(PARTITIONS, 3)}

    kind: str = "digits"
    path: str | None = None
    """The data folder, or the file itself; by default the environment variable ``MPICOMP_DATA``, else ``./data``."""

    partition: str = "iid"

    validation: NonNegativeInt = 0
    """How many training samples are held out and evaluated in place of the test samples, to choose settings by."""

    def load(self) -> data.Dataset:
        """Read the data set; raise DataError if it is missing or damaged."""
        dataset = data.load(self.kind, Path(self.path) if self.path else None, **self.arguments())
        return dataset.with_validation(self.validation) if self.validation else dataset

    def split(self, labels: npt.NDArray[np.int64], ranks: int, seed: int) -> list[Indices]:
        """Return the training samples of each rank, given the class (n,) of every sample."""
        return partition(self.partition, labels, ranks, seed, **self.arguments("partition"))


class ModelSection(Section):
    """``[model]``: the model to train."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(models.MODELS, 1)}

    kind: str = "mlp"

    def build(self, dataset: data.Dataset, seed: int) -> nn.Module:
        """Return the model for `dataset` on the CPU; its parameters depend only on the arguments."""
        return models.build(
            self.kind,
            dataset.input_shape,
            dataset.classes,
            seed,
            task=dataset.task,
            data_kind=dataset.kind,
            **self.arguments(),
        )


class TopologySection(Section):
    """``[topology]``: who talks to whom."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(TOPOLOGIES, 1)}

    kind: str = "ring"

    level: Literal["rank", "node"] = "rank"
    """What the graph joins: ranks; or ``"node"``: nodes, each of several ranks that hold one model and share its
    messages."""

    node_size: NonNegativeInt = 0
    """How many consecutive ranks a node has, for ``level = "node"`` and ``checkpoint.files = "node"``; 0: the ranks of
    a host are a node."""

    def build(self, size: int) -> Schedule:
        """Return the graph over `size` ranks or nodes; raise TopologyError if there is none."""
        return make_topology(self.kind, size, **self.arguments())

    def groups(self, world: World) -> Groups | None:
        """Return the ranks of each node, None if the graph joins ranks; collective on all ranks.

        Raises:
            ConfigError: on every rank: the ranks do not divide into nodes of equal size.

        """
        if self.level == "rank":
            return None
        with together(world):
            return groups_of_size(world.size, self.node_size) if self.node_size else groups_by_host(world)

    def nodes(self, world: World) -> Groups:
        """Return the ranks of each node, also if the graph joins ranks; collective on all ranks."""
        return nodes_of(world, self.node_size)


class CompressorSection(Section):
    """A section that makes a compressor."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(COMPRESSORS)}

    kind: str = "identity"
    per_tensor: bool = False
    """Whether each tensor is compressed by itself, instead of the model as one vector."""

    dense_1d: bool = False
    """Whether tensors of fewer than two dimensions (biases, scales) are sent uncompressed; with `per_tensor`."""

    error_feedback: bool = False
    """Whether error feedback adds what was not sent to the next message; most algorithms do that by themselves."""

    def build(self) -> Compressor:
        """Return the compressor: ``ErrorFeedback(PerTensor(inner))`` if both keys are true."""
        compressor: Compressor = self.make(Compressor)
        if self.dense_1d and not self.per_tensor:
            raise ConfigError(f"{self.section()}.dense_1d needs {self.section()}.per_tensor = true")
        if self.per_tensor:
            compressor = PerTensor(compressor, self.dense_1d)
        return ErrorFeedback(compressor) if self.error_feedback else compressor

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the compressor, as a check."""
        self.build()


class CompressionSection(CompressorSection):
    """``[compression]``: what is sent."""

    allocation: Rule = "uniform"
    """The rule that sets the ratio or threshold of each rank. By its number of samples: ``"dagc"``; `ratio` or
    `threshold` is then the mean. By the bandwidth of its link: ``"bandwidth"``; `ratio` is then that of the slowest
    rank, and the others send more. ``"dagc_bandwidth"`` is the smaller of both ratios. The gamma of a gossip method
    must suit the smallest ratio."""

    bandwidths: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """The bandwidth of each rank in bytes a second, for ``"bandwidth"`` and ``"dagc_bandwidth"``: the rate at which a
    message reaches its neighbors. Only the proportions count. By default a trial at the start measures them, and they
    are written here, in the run's ``config.toml``, so that a run that goes on has the same ratios."""

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the compressor, and check that it has a ratio or threshold if these are allocated."""
        check_rule(self.build(), self.allocation)
        if self.bandwidths is not None and self.allocation not in BY_BANDWIDTH:
            raise ConfigError(
                f"compression.bandwidths has no use with compression.allocation = {self.allocation!r}: leave it out, "
                "or set compression.allocation = 'bandwidth'"
            )


class DownlinkSection(CompressorSection):
    """``[downlink]``: the compressor of hubs' answers, for algorithms that compress in both directions."""


class AlgorithmSection(Section):
    """``[algorithm]``: the training method, which decides when ranks compute and when they communicate."""

    choices: ClassVar[Mapping[str, Choice]] = {
        "kind": Choice(ALGORITHMS, beside=("compressor", "downlink", "inner")),
        "inner": Choice(GOSSIP, beside=("compressor", "downlink")),
    }

    kind: str = "dpsgd"
    inner: str | None = None
    """The method by which ``"local_sgd"`` (by default D-PSGD) and ``"diloco"`` (by default none) mix; its parameters
    are then keys, too."""

    @classmethod
    def specialized(cls, values: Values) -> type[Section]:
        """See `Section.specialized`; raise ConfigError if `inner` is set and the algorithm takes none."""
        kind, inner = values.get("kind", "dpsgd"), values.get("inner")
        goes_around = (
            isinstance(kind, str) and "inner" in inspect.signature(find("algorithm.kind", kind, ALGORITHMS)).parameters
        )
        if inner is not None and not goes_around:
            raise ConfigError(
                f"algorithm.inner = {inner!r}: algorithm.kind = {kind!r} does not go around another algorithm. "
                "Leave algorithm.inner out, or use algorithm.kind = 'local_sgd' or 'diloco'."
            )
        return super().specialized(values)

    def build(self, compressor: Compressor, downlink: Compressor = Identity()) -> AnyAlgorithm:
        """Return the algorithm, with `compressor` for messages and `downlink` for answers of hubs.

        Raises:
            ConfigError: a parameter is out of its range, or the algorithm does not use a compressor that is set.

        """
        target = self.chosen()
        around = inspect.signature(target).parameters.get("inner")
        holds_another = around is not None and (self.inner is not None or around.default is not None)
        inner = self.inner or "dpsgd"
        sender = find("algorithm.inner", inner, GOSSIP) if holds_another else target
        takes, beside = inspect.signature(sender).parameters, {}
        for key, section, value in (("compressor", "compression", compressor), ("downlink", "downlink", downlink)):
            if key in takes:
                beside[key] = value
            elif not value.is_lossless:
                users = [
                    f"'{name}'" for name, entry in ALGORITHMS.items() if key in inspect.signature(entry).parameters
                ]
                raise ConfigError(
                    f"algorithm.kind = {self.kind!r} has no use for the section [{section}], so leave it out (or "
                    f"{section}.kind = 'identity'). Algorithms that have: {', '.join(users)}."
                )
        if holds_another:
            settings = self.arguments("inner") if self.inner else {}
            beside = {"inner": make("algorithm.inner", inner, GOSSIP, Gossip, **settings, **beside)}
        algorithm: AnyAlgorithm = self.make((Algorithm, AsynchronousAlgorithm), **beside)
        return algorithm

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the algorithm, as a check; the section of a compressor reports what is wrong with that."""
        compressors: list[Compressor] = [Identity(), Identity()]
        for i, name in enumerate(("compression", "downlink")):
            section = others.get(name)
            if isinstance(section, CompressorSection):
                with contextlib.suppress(ConfigError):
                    compressors[i] = section.build()
        self.build(*compressors)


class OptimizerSection(Section):
    """``[optimizer]``: the local step, by a class of `torch.optim` other than LBFGS and SparseAdam."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(OPTIMIZERS, 1)}

    kind: str = "sgd"
    lr: float = Field(gt=0, allow_inf_nan=False)
    """The learning rate, required; ``[schedule]`` changes it over the run."""

    decay_1d: bool = True
    """Whether weight decay also holds for biases and the scales of normalizations, as in plain `torch.optim`."""

    adamw_lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With ``kind = "muon"``, the learning rate of AdamW, which trains all but the matrices of hidden layers; by
    default `lr`."""

    @classmethod
    def normalized(cls, name: str) -> str:
        """Return `name` in lower case, so that names of `torch.optim` are accepted as they are."""
        return name if ":" in name else name.lower()

    @field_validator("kind")
    @classmethod
    def _lower(cls, kind: str) -> str:
        return cls.normalized(kind)

    @model_validator(mode="after")
    def _adamw_beside_muon(self) -> OptimizerSection:
        if self.adamw_lr is not None and self.kind != "muon":
            raise ValueError(f"has adamw_lr, which is for optimizer.kind = 'muon', not {self.kind!r}: leave it out")
        return self

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the trainable parameters of `model`."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return self._muon(model, trained) if self.kind == "muon" else self.over(self._groups(trained))

    def _muon(self, model: nn.Module, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Muon for the matrices of hidden layers, and AdamW for the rest."""
        matrices = _hidden_matrices(model)
        if not matrices:
            raise ConfigError("optimizer.kind = 'muon': the model has no linear layer but its last one: use 'adamw'")
        muon, others = self.over([{"params": matrices}]), [p for p in trained if all(p is not q for q in matrices)]
        if not others:
            return muon
        decay = self.arguments()["weight_decay"]
        adamw = torch.optim.AdamW(self._groups(others), lr=self.adamw_lr or self.lr, weight_decay=decay)
        return SeveralOptimizers([muon, adamw])

    def _groups(self, parameters: list[nn.Parameter]) -> list[Values]:
        """Return the groups of `parameters`."""
        groups: list[Values] = [{"params": parameters}]
        if not self.decay_1d:
            groups = [{"params": [p for p in parameters if p.ndim > 1]}]
            groups += [{"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def over(self, groups: list[Values]) -> torch.optim.Optimizer:
        """Return the optimizer over groups of parameters; raise ConfigError if it refuses a value or a group."""
        optimizer: torch.optim.Optimizer = self.make(torch.optim.Optimizer, groups)
        return optimizer

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the optimizer over a matrix, as a check; some optimizers accept only matrices."""
        self.over([{"params": [torch.zeros(1, 1, requires_grad=True)]}])


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers of `model`, but not of the last one, nor those that an embedding has."""
    linear = [id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    embeddings = [id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
    hidden = set(linear[:-1]) - set(linear[-1:]) - set(embeddings)
    return [p for p in model.parameters() if p.requires_grad and id(p) in hidden]


class ScheduleSection(Section):
    """``[schedule]``: the learning rate over time."""

    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(SCHEDULES, 1)}

    kind: str = "constant"

    def build(self, total_epochs: float) -> LearningRateSchedule:
        """Return the factor of ``optimizer.lr`` as a function of the epoch, for a run of `total_epochs`."""
        schedule: LearningRateSchedule = self.make(LearningRateSchedule, total_epochs)
        return schedule

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the schedule, as a check, if the length of the run is given in epochs."""
        training = others.get("training")
        if isinstance(training, TrainingSection) and training.epochs is not None:
            self.build(training.epochs)


class TrainingSection(Section):
    """``[training]``: the length of the run, and the batch size."""

    epochs: PositiveInt | None = None
    """Passes over the data of all ranks together; or give `steps`."""

    steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    """Samples per rank and step."""

    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The largest Euclidean norm of a rank's gradient, which is scaled down to it before anything is compressed."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of training.epochs and training.steps")
        return self

    def clip(self) -> Clip | None:
        """Return the limit for gradients."""
        return None if self.clip_norm is None else Clip(norm=self.clip_norm)


class CheckpointSection(Section):
    """``[checkpoint]``: when the state of all ranks is stored, and which of the checkpoints are kept."""

    every_steps: PositiveInt | None = None
    """Steps from one checkpoint to the next."""

    every_minutes: float = Field(15.0, ge=0, allow_inf_nan=False)
    """Minutes from one checkpoint to the next; 0 for none by time. A run also stores one when it ends or stops."""

    keep_last: NonNegativeInt = 2
    """How many of the newest checkpoints to keep; 0 for all."""

    keep_every: PositiveInt | None = None
    """Checkpoints at a multiple of so many steps are kept, too."""

    files: Literal["rank", "node"] = "rank"
    """What has a file in a checkpoint: each rank; or ``"node"``: each node (see `topology.node_size`), whose ranks take
    turns to write into it, for file systems that suffer from many files."""

    stop_before_end_s: float = Field(120.0, ge=0, allow_inf_nan=False)
    """Seconds before the end of the time limit at which to stop; at most a quarter of the limit."""


_Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Bandwidth = Annotated[float, Field(gt=0)]


class SlowSection(Section):
    """``[slow]``: ranks that are made slow on purpose, to measure what a method gains with ranks of unequal speed."""

    ranks: list[NonNegativeInt] = []
    """The ranks whose gradients take longer; ranks that the run does not have are ignored."""

    factor: _Factor | list[_Factor] = 1.0
    """The factor by which gradients take longer (of the host's time, so use `seconds` on a GPU); or one per rank."""

    seconds: _Seconds | list[_Seconds] = 0.0
    """Seconds by which gradients take longer in addition; or a number for each of `ranks`."""

    spread: Spread = "fixed"
    """The distribution of the additional time: ``"fixed"``, or with this mean ``"uniform"`` or ``"exponential"``."""

    @model_validator(mode="after")
    def _one_for_each(self) -> SlowSection:
        for key, value in (("factor", self.factor), ("seconds", self.seconds)):
            if isinstance(value, list) and len(value) != len(self.ranks):
                raise ValueError(f"needs as many slow.{key} as slow.ranks, or one number: {len(value)} are given")
        return self

    def build(self, rank: int, seed: int, simulation: SimulationSection | None) -> GradientDelay:
        """Return the `GradientDelay` of `rank`, in real time, or in simulated time if `simulation` is given."""
        simulated = {} if simulation is None else simulation.gradient()
        if rank not in self.ranks:
            return GradientDelay(seed=seed, rank=rank, **simulated)
        place = self.ranks.index(rank)
        factor, seconds = (v[place] if isinstance(v, list) else v for v in (self.factor, self.seconds))
        return GradientDelay(factor, seconds, self.spread, seed, rank, **simulated)


class SimulationSection(Section):
    """``[simulation]``: the durations of gradients and messages with ``--simulate``, and what goes wrong."""

    gradient_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The mean time of a gradient, in seconds, with what a rank computes beside it: compression and update. The section
    ``[slow]`` makes it longer."""

    spread: Spread = "fixed"
    """The distribution of the time: ``"fixed"``, or with this mean ``"jitter"`` (within 5 %), ``"uniform"`` (from zero
    to twice the mean) or ``"exponential"``."""

    latency_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Seconds from the end of sending a message to its arrival."""

    bytes_per_s: _Bandwidth | list[_Bandwidth] = float("inf")
    """The bandwidth of a node's link to the network, in each direction: 12.5e6 for 100 Mbit/s; or one for each node."""

    node_size: PositiveInt = 1
    """How many consecutive ranks share a link to the network. Messages between them take no time."""

    loss: float = Field(0.0, ge=0, lt=1)
    """The probability of each message to be lost."""

    churn: str | None = None
    """A CSV file that says which ranks leave and come back, and after how many steps: ``rank,leaves,returns``."""

    @property
    def fault(self) -> str:
        """What goes wrong, as key and value, e.g. ``"simulation.loss = 0.1"``; empty if nothing does."""
        if self.churn is not None:
            return f"simulation.churn = {self.churn!r}"
        return f"simulation.loss = {self.loss!r}" if self.loss else ""

    def gradient(self) -> Values:
        """Return the arguments for `GradientDelay` that set simulated time."""
        return {"gradient_s": self.gradient_s, "gradient_spread": self.spread}

    def links(self) -> Links:
        """Return the simulated network."""
        if isinstance(self.bytes_per_s, list):
            return Links(self.latency_s, node_size=self.node_size, bytes_per_s_of_nodes=tuple(self.bytes_per_s))
        return Links(self.latency_s, self.bytes_per_s, self.node_size)

    def absences(self, size: int) -> Absences:
        """Return which of `size` ranks are away when; raise ConfigError, with file and line, if `churn` is wrong."""
        return Absences() if self.churn is None else Absences.read(Path(self.churn), size)


SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "data": DataSection,
    "model": ModelSection,
    "topology": TopologySection,
    "compression": CompressionSection,
    "downlink": DownlinkSection,
    "algorithm": AlgorithmSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "training": TrainingSection,
    "checkpoint": CheckpointSection,
    "slow": SlowSection,
    "simulation": SimulationSection,
}
SECTION_NAMES: dict[type, str] = {section: name for name, section in SECTIONS.items()}


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
