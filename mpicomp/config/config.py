"""The configuration: one TOML file describes one run. Sections, checks, defaults, and the objects built from them.

    [run]          seed, device, how often to record and to evaluate
    [data]         kind, path, partition; the parameters of both
    [model] [topology] [compression] [algorithm] [optimizer] [schedule]     kind, and the parameters of that kind
    [training]     epochs or steps, batch_size, clip_norm
    [checkpoint]   when to store the state of all ranks, and how many checkpoints to keep
    [downlink]     kind, and its parameters: the compressor of hubs' answers
    [slow]         ranks that are made slow on purpose
    [simulation]   the durations of gradients and messages with --simulate, and what goes wrong

The keys of a kind are the parameters of the function or class that the registry names. Types and defaults are read from
its signature, so a new kind needs only one line in the registry. ``kind = "my_pkg.my_file:MyCompressor"`` takes a
factory from outside the package, and installed packages may offer further kinds (see `mpicomp.plugins`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from mpicomp.algorithms import Algorithm, AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.asynchronous.base import RegroupingAlgorithm
from mpicomp.algorithms.gossip.base import RegroupingGossip
from mpicomp.compression.wrap.allocation import BY_SAMPLES
from mpicomp.config.problems import Checked, refusals, unknown
from mpicomp.config.sections import (
    SECTIONS,
    AlgorithmSection,
    CheckpointSection,
    CompressionSection,
    DataSection,
    DownlinkSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    SimulationSection,
    SlowSection,
    TopologySection,
    TrainingSection,
    Values,
    shown,
)
from mpicomp.config.toml import parse, parse_value
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.loopback.world import LoopbackWorld
from mpicomp.replica.gradient_delay import GradientDelay
from mpicomp.topology.base import Schedule

FREE = {
    "checkpoint",
    "slow",
    "simulation.gradient_s",
    "simulation.spread",
    "simulation.latency_s",
    "simulation.bytes_per_s",
    "simulation.node_size",
    "data.path",
    "data.cache",
    "run.device",
    "run.allow_shared_gpu",
    "run.node_sums",
    "run.stop_signal",
    "run.hang_timeout_s",
    "run.on_peer_loss",
    "training.epochs",
    "training.steps",
}
"""What may change when a run continues. If it becomes longer, it then follows the longer learning rate schedule."""


MEASURED = "compression.bandwidths"
"""The key that a run fills in with what it measures, if it is left out."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A checked configuration with all defaults filled in. Two are equal if all values are equal."""

    run: RunSection
    data: DataSection
    model: ModelSection
    topology: TopologySection
    compression: CompressionSection
    downlink: DownlinkSection
    algorithm: AlgorithmSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    training: TrainingSection
    checkpoint: CheckpointSection
    slow: SlowSection
    simulation: SimulationSection

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
        """Read and check the file `path`.

        Args:
            path: a TOML file.
            overrides: ``section.key=value``. The value is TOML; if it is not valid TOML, it is taken as text. An empty
                value removes the key. ``training.steps`` replaces ``training.epochs``, and vice versa.

        Raises:
            ConfigError: the file cannot be read, or has problems; lists all problems, one on each line.

        """
        values = read_values(Path(path))
        problems = _override_(values, overrides)
        return cls._from_values(values, problems, str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "configuration") -> RunConfig:
        """Check a configuration given as text; raise ConfigError with `source` and all problems."""
        return cls._from_values(parse(text, source), [], source)

    @classmethod
    def _from_values(cls, values: Values, problems: list[str], source: str) -> RunConfig:
        sections = {name: Checked(SECTIONS[name], values.get(name, {})) for name in SECTIONS}
        known = {name: checked.known for name, checked in sections.items()}
        problems += [unknown(name, "", known) for name in values if name not in SECTIONS]
        problems += [problem for checked in sections.values() for problem in checked.problems(known)]
        sound = {name: checked.result for name, checked in sections.items() if checked.result is not None}
        problems += refusals(sound)
        if problems:
            raise ConfigError(_report(source, problems))
        return cls(**sound)  # type: ignore[arg-type]

    def to_toml(self) -> str:
        """Return the configuration as TOML with all defaults; `from_toml` makes an equal configuration from it."""
        return tomli_w.dumps(
            {name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in SECTIONS}
        )

    def check_continues(self, stored: RunConfig) -> None:
        """Raise ConfigError, naming each key, if a run of `stored` cannot continue with this configuration bit for bit.

        The sections and keys in `FREE` may change, because the arithmetic of a step does not depend on them.
        """
        problems = []
        for name in SECTIONS:
            own, theirs = getattr(self, name).model_dump(), getattr(stored, name).model_dump()
            for key in sorted(own.keys() | theirs.keys()):
                dotted = f"{name}.{key}"
                if dotted == MEASURED and own.get(key) is None:
                    continue  # those of the stored run
                if own.get(key) != theirs.get(key) and name not in FREE and dotted not in FREE:
                    problems.append(f"{dotted} was {_shown(theirs.get(key))} and is now {_shown(own.get(key))}")
        if problems:
            source = "a run cannot go on under another configuration (put it back, or start a new run)"
            raise ConfigError(_report(source, problems))

    def gradient_delay(self, world: World) -> GradientDelay:
        """Return the `GradientDelay` of this rank, from ``[slow]`` and ``[simulation]``."""
        delay = self.slow.build(world.rank, self.run.seed, self.simulation if world.is_simulated else None)
        delay.sleep = world.sleep
        if isinstance(world, LoopbackWorld) and world.is_simulated:
            delay.rest = world.rest
        return delay

    def check(self, size: int, groups: Groups | None = None) -> tuple[Schedule, AnyAlgorithm]:
        """Return graph and algorithm for `size` ranks, and check that they fit; allocates nothing large.

        Args:
            size: how many ranks there are.
            groups: the ranks of each node, if the graph joins nodes.

        Raises:
            ConfigError: the graph does not exist at this size, or the algorithm cannot use it.

        """
        schedule = self.topology.build(size if groups is None else len(groups))
        algorithm = self.algorithm.build(self.compression.build(), self.downlink.build())
        algorithm.check(schedule)
        bandwidths = self.compression.bandwidths
        if bandwidths is not None and len(bandwidths) != size:
            raise ConfigError(
                f"compression.bandwidths has {len(bandwidths)} entries for {size} ranks: ratios belong to ranks. Start "
                "as many ranks, or a new run with one for each, or without this key, which then measures them"
            )
        if groups is not None:
            self._check_nodes(algorithm)
        if isinstance(algorithm, AsynchronousAlgorithm):
            self._check_asynchronous(algorithm, size)
            self._check_allocation(algorithm, size)
        if self.simulation.fault:
            self._check_faults(algorithm, schedule, size, groups)
        if self.run.on_peer_loss == "continue":
            self._check_survivable(algorithm, size, groups)
        return schedule, algorithm

    def _check_nodes(self, algorithm: AnyAlgorithm) -> None:
        """Raise ConfigError if the ranks of a node cannot hold one model together."""
        if isinstance(algorithm, AsynchronousAlgorithm):
            raise ConfigError(
                f"topology.level = 'node' does not go with algorithm.kind = {self.algorithm.kind!r}: the ranks of a "
                "node take every step together. Take a synchronous method, e.g. 'choco', or topology.level = 'rank'"
            )
        if self.compression.allocation != "uniform" or getattr(algorithm, "weights", None) == "volume":
            raise ConfigError(
                "topology.level = 'node': ratios and weights of a rank (compression.allocation, "
                "algorithm.weights) are for graphs that join ranks. Leave them out, or set topology.level = 'rank'"
            )

    def _check_faults(self, algorithm: AnyAlgorithm, schedule: Schedule, size: int, groups: Groups | None) -> None:
        """Raise ConfigError if messages cannot be lost, or ranks cannot leave, as the section ``simulation`` says."""
        given = self.simulation.fault
        if not (isinstance(algorithm, Algorithm) and algorithm.tolerates_loss):
            part = "kind" if self.algorithm.inner is None else "inner"
            raise ConfigError(
                f"{given} does not go with algorithm.{part} = {getattr(self.algorithm, part)!r}, which needs every "
                "message: what is lost would be missing for good. Take algorithm.kind = 'dpsgd', 'deep_squeeze', or "
                "'noloco' without compression; or 'local_sgd' or 'diloco' with algorithm.inner = 'dpsgd' or "
                "'deep_squeeze'"
            )
        if self.simulation.churn is None:
            return
        if groups is not None:
            raise ConfigError(
                f"{given} does not go with topology.level = 'node': the ranks of a node hold one model together, and "
                "none can leave alone. Take topology.level = 'rank'"
            )
        if not schedule(0).is_symmetric:
            raise ConfigError(
                f"{given} does not go with topology.kind = {self.topology.kind!r}: without some ranks, a directed "
                "graph no longer preserves the mean. Take an undirected one, such as 'ring' or 'random_matching'"
            )
        self.simulation.absences(size)

    def _check_survivable(self, algorithm: AnyAlgorithm, size: int, groups: Groups | None) -> None:
        """Raise ConfigError if the ranks cannot continue when one of them dies."""
        if self.compression.allocation != "uniform":
            raise ConfigError(
                f"run.on_peer_loss = 'continue' does not go with compression.allocation = "
                f"{self.compression.allocation!r}: the ranks that remain get new numbers, to which their ratios do not "
                "belong. Set compression.allocation = 'uniform', or take 'stop' and --resume"
            )
        if isinstance(algorithm, RegroupingGossip):
            self._check_smaller(size, groups)
            return
        if not isinstance(algorithm, RegroupingAlgorithm):
            why = "it cannot make its state anew for fewer ranks"
            if isinstance(algorithm, AsynchronousAlgorithm):
                why = "a rank may have asked the dead one for an average, and waits for its answer"
                if len(algorithm.trainers(size)) < size:
                    why = "the part of the model that a hub holds is gone with it"
            raise ConfigError(
                f"run.on_peer_loss = 'continue' does not go with algorithm.kind = {self.algorithm.kind!r}: {why}. Take "
                "algorithm.kind = 'choco', 'adagossip', 'dpsgd' or 'dc_gossip', or 'stop' and --resume"
            )
        if algorithm.share != "by_speed":
            raise ConfigError(
                "run.on_peer_loss = 'continue' needs algorithm.share = 'by_speed': with 'equal', the samples of a rank "
                "would be lost with it"
            )

    def _check_smaller(self, size: int, groups: Groups | None) -> None:
        """Raise ConfigError if a gossip method cannot continue with one rank less."""
        stop = "or run.on_peer_loss = 'stop' and --resume"
        if groups is not None:
            raise ConfigError(
                "run.on_peer_loss = 'continue' does not go with topology.level = 'node': a rank that dies takes its "
                f"shard of the model along. Take topology.level = 'rank', {stop}"
            )
        try:
            self.topology.build(max(size - 1, 1))
        except ConfigError as error:
            raise ConfigError(
                f"run.on_peer_loss = 'continue': if one of {size} ranks dies, there is no graph for the others "
                f"({error}). Take topology.kind = 'ring' or another for any number of ranks, {stop}"
            ) from error

    def _check_asynchronous(self, algorithm: AsynchronousAlgorithm[Any], size: int) -> None:
        """Raise ConfigError if another section contradicts an asynchronous algorithm."""
        trainers = algorithm.trainers(size)
        if slow := [rank for rank in self.slow.ranks if rank < size and rank not in trainers]:
            raise ConfigError(
                f"slow.ranks: rank {slow[0]} is a hub of algorithm.kind = {self.algorithm.kind!r}, which computes no "
                f"gradients that could be slow: choose among ranks {trainers[0]} to {trainers[-1]}"
            )
        if algorithm.share == "by_speed" and self.data.partition != "iid":
            raise ConfigError(
                f"algorithm.share = 'by_speed' lets all ranks take batches from one queue, so data.partition = "
                f"{self.data.partition!r} would mean nothing: set algorithm.share = 'equal', or data.partition = 'iid'"
            )

    def _check_allocation(self, algorithm: AsynchronousAlgorithm[Any], size: int) -> None:
        """Raise ConfigError if ratios are to be set by each rank's samples, but ranks have no samples of their own."""
        rule, kind = self.compression.allocation, self.algorithm.kind
        if rule not in BY_SAMPLES:
            return
        if algorithm.share == "by_speed":
            raise ConfigError(
                f"compression.allocation = {rule!r} sets ratios by the samples of each rank, but with "
                "algorithm.share = 'by_speed' all ranks take batches from one queue: set algorithm.share = 'equal', or "
                "compression.allocation = 'uniform'"
            )
        if len(algorithm.trainers(size)) < size:
            raise ConfigError(
                f"compression.allocation = {rule!r} sets ratios by the samples of each rank, but the hubs of "
                f"algorithm.kind = {kind!r} have none, and count every gradient alike: set compression.allocation = "
                "'uniform', or use a synchronous algorithm or 'dc_gossip'"
            )


def _report(source: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])


def _shown(value: Any) -> str:
    return "absent" if value is None else shown(value)


def read_values(path: Path) -> Values:
    """Return the values of a file, unchecked; raise ConfigError if there is none, or it is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse(text, str(path))


def _override_(values: Values, overrides: Sequence[str]) -> list[str]:
    """Apply `overrides` to `values`; return the problems found in them."""
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
                table[key] = parse_value(text)
    return problems
