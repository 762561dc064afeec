"""What a step of each method would take over given links: measured computing, simulated messages.

Each method does steps with its own code on the model and a batch of a configuration: what it computes is measured, what
it sends is counted, and its messages travel in simulated time (`mpicomp.exchange.loopback.network`). There, a gradient
takes its measured seconds, and messages with overlap travel meanwhile.

One rank is enough (`mpicomp.exchange.loopback.symmetric`): it hears from its neighbors what it sends itself. So a plan
for 64 ranks takes memory for one model, and the time of one rank's steps; a sum round a ring is relayed and added up as
often as with all of them. Of an irregular graph, it is the rank with the most neighbors. Sums are planned on a ring.

DistributedDataParallel adds up buckets of gradients as the backward pass makes them, in their order:

    end_b = max(time at which bucket b is complete, end_{b - 1}) + time of an all-reduce of bucket b
    step = max(gradient, end of the last bucket) + two copies of the gradient + optimizer's step

with torch's sizes of buckets, 1 MiB for the first and 25 MiB for the others (Li et al. 2020, arXiv 2006.15704). By
default it copies the gradients into the buckets and back.

What is not seen: ranks of unequal speed, links that others use, and computing that the transport of messages itself
takes from the ranks. How much a step learns differs from method to method; this is about its seconds alone.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.algorithms import (
    DPSGD,
    GMC,
    SSGD,
    AdaGossip,
    Algorithm,
    Choco,
    DeMo,
    DiLoCo,
    LocalSGD,
    NoLoCo,
    PowerSGD,
    SparseLoCo,
    StreamingDiLoCo,
)
from mpicomp.compression.base import Compressor
from mpicomp.compression.block_topk import BlockTopK
from mpicomp.compression.identity import Identity
from mpicomp.compression.topk import TopK
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import all_reduce_nbytes
from mpicomp.exchange.loopback.network import Links, Network
from mpicomp.exchange.loopback.symmetric import SymmetricExchange
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.gradient_delay import GradientDelay
from mpicomp.topology import RandomMatching, ring
from mpicomp.topology.base import Schedule

DDP = "DDP"

MARGIN = 1.15
"""A step that takes up to so many times as long as another one counts as equally fast: plans are not more accurate."""

LOCAL_PERIOD = 8
"""Steps from one mixing of local SGD to the next."""

_RATIO = 0.01
_OVERLAP = ((False, ""), (True, ", overlap"))
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
_GRADIENTS = 15
_MOST_WARM, _WARM_S = 100, 0.5
_WARM, _ROUND, _STEPS = 6, 4, 12


@dataclass(frozen=True)
class Method:
    """A method that a plan looks at.

    Attributes:
        name: its name in the table.
        make: makes the algorithm; raises ConfigError if that cannot have the compressor.
        is_dense: whether it sends all of a model or gradient in every step.
        graph: makes the graph of so many ranks; None for that of the configuration.
        has_own_momentum: whether the optimizer must have none.
        period: steps from one time that it sends to the next.

    """

    name: str
    make: Callable[[], Algorithm]  # type: ignore[type-arg]
    is_dense: bool = False
    graph: Callable[[int], Schedule] | None = None
    has_own_momentum: bool = False
    period: int = 1


@dataclass(frozen=True)
class Computing:
    """What a rank computes in every step, measured.

    Attributes:
        gradient_s: seconds of forward and backward pass.
        copy_s: seconds of a copy of the parameters.
        parameters: their number.
        buckets: of `DistributedDataParallel`: the seconds from the begin of the forward pass at which each is complete,
            and its number of bytes.

    """

    gradient_s: float
    copy_s: float
    parameters: int
    buckets: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Prediction:
    """What a step of a method takes.

    Attributes:
        name: of the method.
        seconds: of a step.
        computing_s: the part of it in which the rank computes.
        nbytes: bytes that a rank sends in a step.
        is_dense: as in `Method`.
        period: as in `Method`.

    """

    name: str
    seconds: float
    computing_s: float
    nbytes: float
    is_dense: bool
    period: int = 1

    @property
    def waiting_s(self) -> float:
        """The part of the step in which the rank waits for messages."""
        return self.seconds - self.computing_s


@dataclass(frozen=True)
class Plan:
    """The steps of all methods.

    Attributes:
        ranks: the number of ranks.
        computing: what each rank computes in every step.
        predictions: by method, in the order in which methods change training, the least first.
        refused: by the name of each method that cannot be used here, why.

    """

    ranks: int
    computing: Computing
    predictions: tuple[Prediction, ...]
    refused: dict[str, str]


def methods(compressor: Compressor) -> list[Method]:
    """Return the methods of a plan but DDP, those first that change training least; they compress by `compressor`."""
    ratio = getattr(compressor, "ratio", None)
    how = f"{100 * ratio:g} %" if isinstance(ratio, float) else type(compressor).__name__
    gossip: dict[str, Callable[..., Algorithm]] = {  # type: ignore[type-arg]
        "CHOCO": partial(Choco, 0.01),
        "AdaGossip": partial(AdaGossip, 0.001),
    }
    return [
        Method("all-reduce after the gradient (ssgd)", SSGD, is_dense=True),
        Method("PowerSGD, rank 2", PowerSGD, graph=ring, has_own_momentum=True),
        *(
            Method(f"GMC, {how}{mark}", partial(GMC, compressor, overlap=overlap), graph=ring, has_own_momentum=True)
            for overlap, mark in _OVERLAP
        ),
        Method("D-PSGD", DPSGD, is_dense=True),
        Method("D-PSGD, overlap", partial(DPSGD, order="combine_then_adapt"), is_dense=True),
        *(
            Method(f"{name}, {how}{mark}", partial(make, compressor, overlap=overlap))
            for name, make in gossip.items()
            for overlap, mark in _OVERLAP
        ),
        Method(f"local SGD, every {LOCAL_PERIOD} steps", partial(LocalSGD, LOCAL_PERIOD), period=LOCAL_PERIOD),
        Method("DeMo", DeMo, graph=ring, has_own_momentum=True),
        Method(f"DiLoCo, every {DiLoCo.period} steps", DiLoCo, period=DiLoCo.period),
        Method(
            f"Streaming DiLoCo, every {StreamingDiLoCo.period} steps",
            StreamingDiLoCo,
            graph=ring,
            period=StreamingDiLoCo.period,
        ),
        Method(f"NoLoCo, every {NoLoCo.period} steps", NoLoCo, graph=RandomMatching, period=NoLoCo.period),
        Method(
            f"SparseLoCo, every {SparseLoCo.period} steps",
            partial(SparseLoCo, BlockTopK(0.03125, values="statistical")),
            graph=ring,
            period=SparseLoCo.period,
        ),
    ]


def plan(
    config: RunConfig,
    ranks: int,
    links: Links,
    sums: Links | None = None,
    device: torch.device | str = "cpu",
    stopwatch: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Measure here what a rank computes, and return what a step of each method would take.

    Args:
        config: gives model, data, batch, optimizer, graph and compressor; without a compressor, it is top-k of 1 %. Its
            method is not looked at.
        ranks: their number, at least 2.
        links: of messages between neighbors.
        sums: of MPI's all-reduces; by default as `links`. DDP has the faster of the two.
        device: on which a rank computes.
        stopwatch: the time in seconds, when the device has done what it was given.

    Raises:
        ConfigError: there are fewer than two ranks, or fewer samples than in a batch.
        TopologyError: the graph does not exist with so many ranks.

    """
    if ranks < 2:
        raise ConfigError(f"--ranks {ranks}: a plan is about messages between ranks; give at least 2")
    sums = sums or links
    schedule = config.topology.build(ranks)
    dataset = config.data.load()
    size = config.training.batch_size
    if size > len(dataset.train):
        raise ConfigError(
            f"training.batch_size = {size}: data.kind = {dataset.kind!r} has {len(dataset.train)} samples"
        )
    inputs, targets = dataset.batch("train", np.arange(size), device, (config.run.seed, 0, 0, 0))
    model = config.model.build(dataset, config.run.seed).to(device)

    def loss(own: nn.Module) -> Tensor:
        return dataset.loss(own(inputs), targets)

    computing = measure(model, config.optimizer.build, loss, stopwatch)
    compressor = config.compression.build()
    fastest = max(links, sums, key=lambda way: way.bytes_per_s)  # its all-reduce is not MPI's, and fills the link
    predictions: list[Prediction] = []
    refused: dict[str, str] = {}
    for method in methods(TopK(_RATIO) if isinstance(compressor, Identity) else compressor):
        own, build = copy.deepcopy(model), config.optimizer.build
        optimizer = torch.optim.SGD(own.parameters(), lr=config.optimizer.lr) if method.has_own_momentum else build(own)
        graph = method.graph(ranks) if method.graph else schedule
        local = FlatModel(own, optimizer)
        local.closure = partial(loss, own)
        try:
            predictions.append(predict(method, local, computing, graph, links, sums, stopwatch))
        except (ConfigError, TopologyError) as error:
            refused[method.name] = str(error)
    update_s = max(0.0, predictions[0].computing_s - computing.gradient_s)  # of the all-reduce, which goes everywhere
    ddp = predict_ddp(computing, update_s, ranks, fastest)
    return Plan(ranks, computing, (ddp, *predictions), refused)


def measure(
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[nn.Module], Tensor],
    stopwatch: Callable[[], float],
) -> Computing:
    """Measure the gradient on a copy of `model`, as the optimizer moves it: medians."""
    model = copy.deepcopy(model)
    local = FlatModel(model, build_optimizer(model))
    local.closure = partial(loss, model)
    room = torch.empty_like(local.x)
    begin = stopwatch()
    for _ in range(_MOST_WARM):  # the allocator of memory learns what a step needs
        local.gradient()
        local.update()
        if stopwatch() - begin > _WARM_S:
            break
    gradients, copies = [], []
    for _ in range(_GRADIENTS):
        moments = [stopwatch()]
        local.gradient()
        moments.append(stopwatch())
        room.copy_(local.x)
        moments.append(stopwatch())
        gradients.append(moments[1] - moments[0])
        copies.append(moments[2] - moments[1])
        local.update()
    gradient_s, copy_s = statistics.median(gradients), statistics.median(copies)
    buckets = _buckets(local, gradient_s, stopwatch)
    return Computing(gradient_s, copy_s, local.x.numel(), buckets)


def _buckets(local: FlatModel, gradient_s: float, stopwatch: Callable[[], float]) -> tuple[tuple[float, int], ...]:
    """Return when each bucket is complete, as the parts of one gradient fall into `gradient_s`, and its bytes."""
    arrived: list[tuple[float, int]] = []

    def note(parameter: Tensor) -> None:
        arrived.append((stopwatch() - begin, parameter.numel() * parameter.element_size()))

    trained = [p for p in local.model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(note) for p in trained]  # type: ignore[no-untyped-call]
    begin = stopwatch()
    local.gradient()
    whole_s = stopwatch() - begin
    for hook in hooks:
        hook.remove()
    scale = gradient_s / whole_s if whole_s else 0.0
    buckets: list[tuple[float, int]] = []
    filled = 0
    for number, (at_s, nbytes) in enumerate(arrived):
        filled += nbytes
        if filled >= (_BUCKET if buckets else _FIRST_BUCKET) or number == len(arrived) - 1:
            buckets.append((scale * at_s, filled))
            filled = 0
    return tuple(buckets)


def predict_ddp(computing: Computing, update_s: float, ranks: int, links: Links) -> Prediction:
    """Return what a step of `DistributedDataParallel` takes, with `update_s` of the optimizer; see above."""
    network, end_s, sent = Network(ranks, links), 0.0, 0
    for complete_s, nbytes in computing.buckets:
        part = all_reduce_nbytes(torch.empty(nbytes, dtype=torch.uint8, device="meta"), ranks)
        end_s = max(end_s, complete_s) + network.all_reduce_ns(part, range(ranks)) / 1e9
        sent += part
    after_s = 2 * computing.copy_s + update_s
    computing_s = computing.gradient_s + after_s
    seconds = max(computing.gradient_s, end_s) + after_s
    return Prediction(DDP, seconds, computing_s, sent, is_dense=True)


def predict(
    method: Method,
    local: FlatModel,
    computing: Computing,
    schedule: Schedule,
    links: Links,
    sums: Links,
    stopwatch: Callable[[], float],
) -> Prediction:
    """Return what a step of `method` takes: medians over rounds of steps, after a few that are not counted.

    ``local.closure`` computes the loss. The gradients are computed in these steps, and all count as the median of the
    first ones. They take longer than a gradient alone where the vectors of the method no longer fit into a cache.

    Raises:
        ConfigError: the method cannot have this compressor or optimizer.
        TopologyError: it cannot use this graph.

    """
    algorithm = method.make()
    algorithm.check(schedule)
    exchange = SymmetricExchange(_busiest(schedule), schedule, links, sums, stopwatch)
    steps = Steps(algorithm, local, exchange, computing.gradient_s)
    steps.run(_WARM)
    steps.set_gradient_s(statistics.median(steps.taken_s))
    length = max(method.period, _ROUND)
    rounds = [steps.run(length) for _ in range(max(1, _STEPS // length))]
    seconds, waiting_s, nbytes = (statistics.median(figures) / length for figures in zip(*rounds, strict=True))
    return Prediction(method.name, seconds, seconds - waiting_s, nbytes, method.is_dense, method.period)


class Steps:
    """The steps of a method on one rank, in simulated time.

    Args:
        algorithm: the method.
        local: the model.
        exchange: has the simulated time.
        gradient_s: the simulated seconds that a gradient takes.

    Attributes:
        taken_s: the seconds that each gradient has really taken.

    """

    def __init__(
        self,
        algorithm: Algorithm,  # type: ignore[type-arg]
        local: FlatModel,
        exchange: SymmetricExchange,
        gradient_s: float,
    ) -> None:
        self._algorithm, self._local, self._exchange = algorithm, local, exchange
        self._state = algorithm.init(local, exchange)
        self.taken_s: list[float] = []
        self.set_gradient_s(gradient_s)
        exchange.skip()

    def set_gradient_s(self, seconds: float) -> None:
        """Let each gradient take so many simulated seconds from here on."""
        self._delay = GradientDelay(gradient_s=seconds)
        self._delay.sleep = self._exchange.sleep

    def run(self, count: int) -> tuple[float, float, int]:
        """Do `count` steps; return their seconds, those of waiting among them, and the bytes sent."""
        exchange = self._exchange
        begin, waited, sent = exchange.now(), exchange.waited_s, exchange.bytes_sent
        for _ in range(count):
            for meanwhile in self._algorithm.phases(self._local, self._state, exchange):
                exchange.now()
                self._local.gradient()
                self.taken_s.append(exchange.skip())
                self._delay.keep(0.0, meanwhile)
        return exchange.now() - begin, exchange.waited_s - waited, exchange.bytes_sent - sent


def choose(predictions: Sequence[Prediction]) -> Prediction:
    """Return the first that is as fast as the fastest, within `MARGIN`, of those that send in every step."""
    return _first_of_fast([prediction for prediction in predictions if prediction.period == 1])


def choose_rarer(predictions: Sequence[Prediction]) -> Prediction | None:
    """Return the same of those that send once in many steps; None unless it beats `choose` by more than `MARGIN`."""
    rarer = [prediction for prediction in predictions if prediction.period > 1]
    found = _first_of_fast(rarer) if rarer else None
    return found if found and MARGIN * found.seconds < choose(predictions).seconds else None


def _first_of_fast(predictions: Sequence[Prediction]) -> Prediction:
    fastest_s = min(prediction.seconds for prediction in predictions)
    return next(prediction for prediction in predictions if prediction.seconds <= MARGIN * fastest_s)


def _busiest(schedule: Schedule) -> int:
    """Return the rank with the most neighbors in the first graph."""
    topology = schedule(0)
    return max(range(topology.size), key=lambda rank: len(topology.targets(rank)) + len(topology.sources(rank)))
