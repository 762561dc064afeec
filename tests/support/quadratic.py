"""A convex problem with known optimum, as the `Local` of an algorithm, and its matrix form in NumPy.

Rank i has F_i(x) = 1/2 (x - c_i)' D (x - c_i) with a common diagonal D, so the optimum of the mean is the mean of c_i.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.steps import one_step
from torch import Tensor

from mpicomp.algorithms import Algorithm, AsynchronousAlgorithm
from mpicomp.compression import Spec
from mpicomp.exchange.base import Mailbox, World
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.loss import LossyExchange
from mpicomp.topology import Schedule, Topology

DIM = 24
LOSS_SEED = 5
SHAPES = ((DIM // 2,), (2, DIM // 4))


def curvature() -> np.ndarray:
    return np.linspace(0.5, 1.5, DIM)


def centers(size: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(size, DIM))


@dataclass
class Quadratic:
    """The model of one rank, with heavy-ball momentum and weight decay as its optimizer."""

    x: Tensor
    center: Tensor
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    optimizer_classes = (torch.optim.SGD,)
    skips_update = False

    def __post_init__(self) -> None:
        self.spec = Spec(tuple("abcd"[: len(self.shapes)]), self.shapes, self.x.dtype)
        self.g = torch.zeros_like(self.x)
        self.m = torch.zeros_like(self.x)
        self.d = torch.as_tensor(curvature(), dtype=self.x.dtype)

    @property
    def groups(self):
        group = {"lr": self.lr, "weight_decay": self.weight_decay}
        return [(slice(0, 7), group), (slice(7, DIM), group)]  # two in the place of one change nothing

    def norm(self, x: Tensor) -> Tensor:
        return x.norm()

    def gradient(self, meanwhile=None) -> Tensor:
        for _ in range(5 if meanwhile else 0):
            time.sleep(0)  # another rank may go on
            meanwhile()
        return self.g.copy_(self.d * (self.x - self.center))

    def update(self, part: slice | None = None) -> None:
        if part == slice(0, 0):
            return
        self.m.mul_(self.momentum).add_(self.g).add_(self.x, alpha=self.weight_decay)
        self.x.sub_(self.m, alpha=self.lr)


@dataclass
class Trained:
    """The outcome on all ranks."""

    x: np.ndarray  # (size, DIM)
    states: list
    bytes_sent: list[int]


def train(
    algorithm: Algorithm,
    schedule: Schedule,
    steps: int,
    *,
    lr: float | Sequence[float] = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    start: np.ndarray | None = None,
    dtype: torch.dtype = torch.float64,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    loss: float = 0.0,
) -> Trained:
    """Run `algorithm` over the loopback from `start` (size, DIM), by default zero on all ranks.

    `lr` is the learning rate, or those of all steps; `loss` the probability of a message to be lost.
    """
    rates = [lr] * steps if isinstance(lr, int | float) else lr

    def serve(world: World):
        c = centers(world.size)[world.rank]
        x = np.zeros(DIM) if start is None else start[world.rank]
        tensors = torch.as_tensor(x.copy(), dtype=dtype), torch.as_tensor(c, dtype=dtype)
        local = Quadratic(*tensors, *rates[:1], momentum=momentum, weight_decay=weight_decay, shapes=shapes)
        exchange, step = world.exchange(schedule), 0
        if loss:
            exchange = LossyExchange(exchange, loss, (LOSS_SEED,), lambda: step)
        state = algorithm.init(local, exchange)
        for step, local.lr in enumerate(rates):  # noqa: B007 -- the exchange reads it
            one_step(algorithm, local, state, exchange)
        return local.x.numpy(), state, exchange.bytes_sent

    xs, states, sent = zip(*run(schedule.size, serve), strict=True)
    return Trained(np.stack(xs), list(states), list(sent))


@dataclass
class Asynchronous:
    """The outcome of an asynchronous algorithm in simulated time.

    Attributes:
        x: (size, DIM) the models.
        states: of the algorithm.
        served: by rank, the source of each message that was taken in, in that order (hubs only).

    """

    x: np.ndarray
    states: list
    served: list[list[int]]


def train_asynchronously(
    algorithm: AsynchronousAlgorithm,
    topology: Topology,
    gradients: int,
    paces: Sequence[float],
    *,
    lr: float = 0.1,
    common: bool = False,
    links: Links | None = None,
    jitter: float = 0.5,
) -> Asynchronous:
    """Run `algorithm`: rank i computes `gradients` gradients, and each takes it ``paces[i]`` times a random time.

    With `common`, all ranks have the same optimum. Times differ from their mean by up to `jitter` of it.
    """

    def serve(world: World):
        c = centers(world.size)[0 if common else world.rank]
        local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(c), lr)
        mailbox = world.mailbox(topology, algorithm.message_nbytes(local.spec, world.size), algorithm.depth)
        state = algorithm.init(local, mailbox)
        times = np.random.default_rng(world.rank)
        compute, computed, order = local.gradient, 0, []

        def gradient(meanwhile=None):
            nonlocal computed
            computed += 1
            found = compute().clone()
            slices = 50 if meanwhile else 1
            seconds = paces[world.rank] * times.uniform(1 - jitter, 1 + jitter)
            for _ in range(slices):
                world.sleep(seconds / slices)
                if meanwhile:
                    meanwhile()
            return local.g.copy_(found)

        local.gradient = gradient
        trains = world.rank in algorithm.trainers(world.size)
        awaited = gradients * sum(edge in algorithm.trainers(world.size) for edge in topology.sources(world.rank))
        while computed < gradients if trains else len(order) < awaited:
            answered = list(getattr(state, "answered", []))
            has_moved = (algorithm.step if trains else algorithm.serve)(local, state, mailbox)
            changed = [
                i for i, (a, b) in enumerate(zip(answered, getattr(state, "answered", []), strict=True)) if a != b
            ]
            order += [algorithm.hubs + worker for worker in changed]
            if not has_moved:
                mailbox.pause()
        mailbox.announce(computed, is_done=True)
        while trains and getattr(state, "is_computed", False):
            if not algorithm.step(local, state, mailbox):
                mailbox.pause()
        serve_until_done(algorithm, local, state, mailbox)
        for _ in range(2):
            mailbox.settle()
            algorithm.drain(local, state, mailbox)
        return local.x.numpy(), state, order

    outcomes = run(topology.size, serve, simulated=links or Links())
    xs, states, served = zip(*outcomes, strict=True)
    return Asynchronous(np.stack(xs), list(states), list(served))


def serve_until_done(algorithm: AsynchronousAlgorithm, local: Quadratic, state, mailbox: Mailbox) -> None:
    """Serve the neighbors until all of them have announced that they are done."""
    while not all(peer.is_done for peer in mailbox.peers().values()):
        if not algorithm.serve(local, state, mailbox):
            mailbox.pause()


def top_k(v: np.ndarray, k: int) -> np.ndarray:
    """Top-k of each row of `v`, written independently of the package."""
    kept = np.zeros_like(v)
    for row, out in zip(v, kept, strict=True):
        chosen = np.argsort(-np.abs(row), kind="stable")[:k]
        out[chosen] = row[chosen]
    return kept
