"""What the methods that add up the compressed gradients of all ranks share.

All ranks hold the same model: each adds the same weighted sum, formed over a star or a ring (`exchange.aggregate`).
Batch-norm statistics are each rank's own. Weight decay is best left to the optimizer, which adds the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, require_no_feedback
from mpicomp.compression.base import Compressor, Payload
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError
from mpicomp.exchange.aggregate import Aggregator, plan
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule

S = TypeVar("S")

Weights = Literal["equal", "volume"]
"""What a rank counts in the sum: ``1 / size``, or its part of the samples."""


@dataclass(frozen=True)
class AggregatedAlgorithm(Algorithm[S]):
    """A method that adds up compressed gradients.

    Attributes:
        compressor: any contractive compressor; the method remembers what it leaves out.
        weights: what a rank counts: ``"equal"``, or by its ``"volume"``.
        volumes: the samples of each rank, for ``"volume"``; a configured run fills them in.

    """

    compressor: Compressor = Identity()
    weights: Weights = "equal"
    volumes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_no_feedback(self.name, self.compressor)
        if self.weights not in get_args(Weights):
            words = ", ".join(map(repr, get_args(Weights)))
            raise ConfigError(f"algorithm.weights = {self.weights!r} must be one of {words}")
        empty = [rank for rank, volume in enumerate(self.volumes) if volume <= 0]
        if empty:
            raise ConfigError(
                f"algorithm.volumes: rank {empty[0]} has {self.volumes[empty[0]]} samples, and so no weight: give it "
                "some, or set algorithm.weights = 'equal'"
            )

    def check(self, schedule: Schedule) -> None:
        """Need a star or a ring."""
        plan(schedule)

    def rank_weights(self, size: int) -> list[float] | None:
        """Return what each of `size` ranks counts, ``volumes[i] / sum(volumes)``; None for ``1 / size``.

        Raises:
            ConfigError: not one volume for each rank.

        """
        if self.weights == "equal":
            return None
        if len(self.volumes) != size:
            raise ConfigError(
                f"algorithm.weights = 'volume' needs the number of samples of each of {size} ranks in "
                f"algorithm.volumes: {len(self.volumes)} are given"
            )
        return [volume / sum(self.volumes) for volume in self.volumes]

    def average_(self, payload: Payload, local: Local, exchange: Exchange, out: Tensor) -> None:
        """``out = sum_k w_k q_k`` (n,), where `payload` is the own ``q_k``."""
        weights = self.rank_weights(exchange.size)
        Aggregator(exchange).average_(payload, self.compressor, local.spec, out, weights)


def require_no_momentum(name: str, local: Local) -> None:
    """Raise ConfigError if the optimizer has momentum: the method has its own, ahead of the compression."""
    if local.momentum:
        raise ConfigError(
            f"optimizer.momentum = {local.momentum:g} (or its betas): {name} has a momentum of its own, ahead of the "
            "compression, and would count it twice. Use optimizer.kind = 'sgd' with momentum 0, and "
            "algorithm.momentum."
        )


def require_momentum(momentum: float) -> None:
    """Raise ConfigError unless `momentum` is in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ConfigError(f"algorithm.momentum = {momentum} must be in [0, 1)")
