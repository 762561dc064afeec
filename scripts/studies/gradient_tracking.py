#!/usr/bin/env python3
"""Plot how far each method stays from the optimum of all ranks, where every rank holds other data.

    MPICOMP_DATA=... .venv-mpich/bin/python scripts/studies/gradient_tracking.py docs/images/gradient_tracking.svg

8 ranks on a ring, exact gradients in double precision, and the same constant learning rate for all methods:

    quadratic   F_i(x) = 1/2 (x - c_i)' D (x - c_i), with another optimum c_i on each rank
    logistic    F_i(x) = mean log(1 + exp(-y a'x)) + l2/2 |x|^2 over the mushrooms of rank i, dealt out in the order of
                their labels, so that one rank has both labels and no other

The optimum of the mean of F_i is the mean of c_i, or SciPy's. MPICOMP_DATA names the folder of the data sets. It takes
two minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from mpicomp.algorithms import DPSGD, LEAD, Algorithm, Choco, MoTEF
from mpicomp.compression import Natural, Spec, TopK
from mpicomp.data.datasets import load
from mpicomp.exchange.base import World
from mpicomp.exchange.loopback import run
from mpicomp.topology import ring

RANKS = 8
STEPS = 1500
TOP = TopK(ratio=0.1)
METHODS: dict[str, Algorithm] = {
    "D-PSGD, not compressed": DPSGD(),
    "CHOCO-SGD, top-k 10 %": Choco(0.3, TOP),
    "MoTEF, top-k 10 %": MoTEF(0.3, TOP),
    "LEAD, natural compression": LEAD(compressor=Natural()),
}


@dataclass(frozen=True)
class Problem:
    """A strongly convex problem.

    Attributes:
        title: for the plot.
        gradient: of F_i at x (n,), of rank i.
        optimum: (n,) where the mean of all F_i is least.
        lr: the learning rate of all methods.

    """

    title: str
    gradient: Callable[[int, np.ndarray], np.ndarray]
    optimum: np.ndarray
    lr: float


@dataclass
class Local:
    """The model of one rank, with plain gradient descent as its optimizer (see `mpicomp.algorithms.base.Local`)."""

    problem: Problem
    rank: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self.x = torch.zeros(len(self.problem.optimum), dtype=torch.float64)
        self.g = torch.zeros_like(self.x)
        self.spec = Spec(("x",), (tuple(self.x.shape),), self.x.dtype)
        self.groups = [(slice(0, len(self.x)), {"lr": self.problem.lr, "weight_decay": 0.0})]

    def gradient(self) -> torch.Tensor:
        """Return the gradient on all data of this rank."""
        return self.g.copy_(torch.from_numpy(self.problem.gradient(self.rank, self.x.numpy())))

    def update(self, part: slice | None = None) -> None:
        """Take a step of gradient descent."""
        self.x.sub_(self.g, alpha=self.problem.lr)


def quadratic(size: int = 100) -> Problem:
    """Return the quadratic, with curvatures from 0.5 to 1.5."""
    centers = np.random.default_rng(0).normal(size=(RANKS, size))
    curvature = np.linspace(0.5, 1.5, size)
    return Problem("quadratic", lambda i, x: curvature * (x - centers[i]), centers.mean(axis=0), lr=0.05)


def logistic(inputs: np.ndarray, labels: np.ndarray, l2: float = 0.1) -> Problem:
    """Return logistic regression on `inputs` (m, n) with `labels` 0 or 1 (m,), split by label."""
    order = np.argsort(labels, kind="stable")
    signed = inputs[order] * (2 * labels[order, None] - 1.0)
    parts = np.array_split(signed, RANKS)

    def gradient(i: int, x: np.ndarray) -> np.ndarray:
        part = parts[i]
        return l2 * x - part.T @ expit(-part @ x) / len(part)

    def loss(x: np.ndarray) -> float:
        return float(np.mean([np.logaddexp(0, -part @ x).mean() for part in parts]) + l2 / 2 * x @ x)

    def hessian(x: np.ndarray) -> np.ndarray:
        curvatures = [expit(part @ x) * expit(-part @ x) for part in parts]
        sums = [part.T @ (c[:, None] * part) / len(part) for part, c in zip(parts, curvatures, strict=True)]
        return np.mean(sums, axis=0) + l2 * np.eye(len(x))

    found = minimize(
        loss,
        np.zeros(inputs.shape[1]),
        jac=lambda x: np.mean([gradient(i, x) for i in range(RANKS)], axis=0),
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-10},
    )
    if not found.success:
        raise RuntimeError(f"the optimum was not found: {found.message}")
    return Problem("logistic regression, mushrooms by label", gradient, found.x, lr=0.2)


def mushrooms() -> Problem:
    """Return logistic regression on the mushrooms in the folder of the data sets."""
    train = load("libsvm", file="agaricus.txt.train").train
    return logistic(train.inputs.numpy().astype(np.float64), train.labels.numpy())


def distances(problem: Problem, method: Algorithm, steps: int = STEPS) -> np.ndarray:
    """Return the distance to the optimum of the rank that is farthest away, before the first step and after each."""

    def serve(world: World) -> list[float]:
        local, exchange = Local(problem, world.rank), world.exchange(ring(RANKS))
        state = method.init(local, exchange)
        found = [float(np.linalg.norm(problem.optimum))]
        for _ in range(steps):
            for _ in method.phases(local, state, exchange):
                local.gradient()
            found.append(float(np.linalg.norm(local.x.numpy() - problem.optimum)))
        return found

    return np.max(run(RANKS, serve), axis=0)


def draw(problems: Sequence[Problem], path: Path) -> None:
    """Draw the distances of all methods on each problem."""
    plt.style.use(Path(__file__).parents[1] / "figures.mplstyle")
    figure, both = plt.subplots(1, len(problems), figsize=(8, 3), sharey=True)
    for problem, axes in zip(problems, both, strict=True):
        for name, method in METHODS.items():
            found = distances(problem, method)
            axes.semilogy(range(0, STEPS + 1, 10), found[::10], label=name)
            print(f"{problem.title}: {name}: {found[-1]:.2g}, the optimum is {found[0]:.2g} from the start")
        axes.axhline(1e-6, color="0.5", linewidth=0.8, linestyle="--")
        axes.set(title=problem.title, xlabel=f"steps, learning rate {problem.lr:g}")
    both[0].set(ylabel="largest distance to the optimum", ylim=(1e-10, 20))
    both[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.86))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the SVG file to write")
    draw([quadratic(), mushrooms()], parser.parse_args().path)
