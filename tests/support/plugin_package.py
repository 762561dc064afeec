"""A package from outside, as users write them: one factory for each kind, each with a parameter that it requires.

`install` puts it into a folder as pip does: the module, and a ``.dist-info`` with its entry points.
"""

MODULE = '''
from __future__ import annotations

from dataclasses import dataclass

import networkx
import numpy as np
import torch
from torch import nn

from mpicomp.algorithms import Algorithm
from mpicomp.compression import Compressor, Identity, TopK
from mpicomp.config.schedule import LearningRateSchedule
from mpicomp.data.dataset import Dataset, Samples
from mpicomp.models import Problem
from mpicomp.topology import Topology, from_graph


@dataclass(frozen=True)
class Lines(Dataset):
    power: float = 2.0

    def loss(self, outputs, targets):
        return (outputs - targets).abs().pow(self.power).mean()


def lines(folder, samples: int, power: float = 2.0) -> Dataset:
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 1.0]])
    kept = Samples(x[10:], y[10:])
    return Lines("lines", "regression", 2, kept, Samples(x[:10], y[:10]), power=power)


class Each(Lines):
    def loss(self, outputs, targets):
        return (outputs - targets) ** 2


def each(folder) -> Dataset:
    return Each("each", *list(vars(lines(folder, 30)).values())[1:])


class Near(Lines):
    def score(self, outputs, targets):
        """Look at two of a batch only."""
        return int(((outputs - targets).abs().amax(dim=1) < 1)[:2].sum()), 2


def near(folder) -> Dataset:
    return Near("near", *list(vars(lines(folder, 30)).values())[1:])


class Scaled(nn.Linear):
    def __init__(self, problem: Problem, scale: float, *, bias: bool = True):
        super().__init__(*problem.input_shape, problem.classes, bias=bias)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


def blocks(labels, ranks, seed, first: int) -> list:
    return np.split(np.arange(len(labels)), [first * (rank + 1) for rank in range(ranks - 1)])


def path(size: int, lazy: bool) -> Topology:
    return from_graph(networkx.path_graph(size), lazy=lazy)


@dataclass(frozen=True)
class Largest(TopK):
    """Top-k under another name; the ratio is required."""


@dataclass
class Count:
    step: int = 0


@dataclass(frozen=True)
class Elastic(Algorithm):
    rho: float
    compressor: Compressor = Identity()

    def init(self, local, exchange):
        return Count()

    def phases(self, local, state, exchange):
        yield None
        local.update()
        topology = exchange.schedule(state.step)
        payload = self.compressor.compress(local.x, local.spec, None)
        arrived = exchange.start(payload, self.compressor.layout(local.spec), topology).wait()
        local.x.mul_(1 - self.rho * (1 - topology.weight(exchange.rank, exchange.rank)))
        for source, payload in arrived.items():
            weight = self.rho * topology.weight(exchange.rank, source)
            self.compressor.accumulate(payload, local.spec, local.x, weight)
        state.step += 1


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr: float, floor: float):
        super().__init__(params, {"lr": lr, "floor": floor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / (parameter.grad.abs() + group["floor"]))


@dataclass(frozen=True, kw_only=True)
class Power(LearningRateSchedule):
    exponent: float

    def shape(self, epoch):
        return (1 - epoch / (self.epochs + 1)) ** self.exponent


def takes_a_module(problem, body: nn.Module):
    return body


def wrong(*given, **own):
    return 3


def no_first_argument(*, width: int):
    return nn.Linear(1, 1)


def unequal(labels, ranks, seed):
    return [np.arange(len(labels))]


def refuses(size):
    raise ValueError("out of luck")
'''

NAMES = {
    "mpicomp.data": {"lines": "lines"},
    "mpicomp.models": {"scaled": "Scaled", "mlp": "wrong"},
    "mpicomp.topologies": {"path": "path"},
    "mpicomp.compressors": {"largest": "Largest"},
    "mpicomp.algorithms": {"elastic": "Elastic"},
    "mpicomp.schedules": {"power": "Power"},
}
"""By group: what the package offers. One collides with a name of mpicomp."""


def install(folder, module, distribution, names=NAMES):
    """Put the package into `folder`, whose Python files `module` names."""
    (folder / f"{module}.py").write_text(MODULE)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = []
    for group, entries in names.items():
        lines += [f"[{group}]", *(f"{name} = {module}:{attribute}" for name, attribute in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
