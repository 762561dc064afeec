"""How ranks train together: the graph, the messages and the algorithm."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt

from mpicomp.algorithms import ALGORITHMS, GOSSIP, Algorithm, AnyAlgorithm, AsynchronousAlgorithm, Gossip
from mpicomp.compression import COMPRESSORS, Compressor, ErrorFeedback, Identity, PerTensor
from mpicomp.compression.wrap.allocation import BY_BANDWIDTH, Rule, check_rule
from mpicomp.config.parameters import Choice
from mpicomp.config.sections.base import Section, Values
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import together
from mpicomp.exchange.node_groups import groups_by_host, groups_of_size, nodes_of
from mpicomp.plugins import find, make
from mpicomp.topology import TOPOLOGIES, make_topology
from mpicomp.topology.base import Schedule


class TopologySection(Section):
    """``[topology]``: who talks to whom."""

    section: ClassVar[str] = "topology"
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
            raise ConfigError(f"{self.section}.dense_1d needs {self.section}.per_tensor = true")
        if self.per_tensor:
            compressor = PerTensor(compressor, self.dense_1d)
        return ErrorFeedback(compressor) if self.error_feedback else compressor

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the compressor, as a check."""
        self.build()


class CompressionSection(CompressorSection):
    """``[compression]``: what is sent."""

    section: ClassVar[str] = "compression"

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

    section: ClassVar[str] = "downlink"


class AlgorithmSection(Section):
    """``[algorithm]``: the training method, which decides when ranks compute and when they communicate."""

    section: ClassVar[str] = "algorithm"
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
