#!/usr/bin/env python3
"""Try AdaGossip's step for each parameter on directed graphs: print how far the ranks end from the optimum.

    .venv-mpich/bin/python scripts/studies/adaptive_push.py

SGP has one consensus step gamma. Here each entry has its own, as in AdaGossip, from the gossip error r_i and its
second moment v_i; the weights, which are sent as they are, are mixed with step 1:

    y_i = x_i - lr g_i;  r_i = sum_j P_ij xhat_j - xhat_i
    v_i = beta v_i + (1 - beta) r_i * r_i
    Gamma_i = min(gamma / (sqrt(v_i / (1 - beta^t)) + epsilon), 1)
    x_i = y_i + Gamma_i * r_i;  w_i = sum_j P_ij w_j;  z_i = x_i / w_i

xhat_i are public copies with top-k 10 % on a fixed graph, and y_i itself where the graph changes, as nothing is
compressed there. The other symbols are those of `mpicomp.algorithms.gossip.sgp`. The third rule takes the mean of v_i
over the ranks, so that all have the same Gamma: no rank could know it, but it shows what unequal steps do.

8 ranks, F_i(x) = 1/2 (x - c_i)' D (x - c_i) with 100 entries, 2,000 steps, a learning rate that falls to 0 along a
cosine, and 8 values of gamma for each rule, of which the best is printed. Takes half a minute.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicomp.topology import OnePeerExponential, Schedule, directed_ring, random_digraph, ring

RANKS, SIZE, STEPS = 8, 100, 2000
GRAPHS = (ring(RANKS), directed_ring(RANKS), random_digraph(RANKS), OnePeerExponential(RANKS))
GAMMAS = 2.0 ** np.arange(-7, 1)
RULES = ("one step", "a step for each entry", "the same on all ranks")
CURVATURE = np.linspace(0.5, 1.5, SIZE)
RATES = 0.05 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))


def top_k(x: np.ndarray, k: int) -> np.ndarray:
    """Return the `k` largest entries of each row of `x`, and zeros."""
    chosen = np.argpartition(-np.abs(x), k, axis=1)[:, :k]
    kept = np.zeros_like(x)
    np.put_along_axis(kept, chosen, np.take_along_axis(x, chosen, axis=1), axis=1)
    return kept


def train(
    rule: str,
    gamma: float,
    graph: Schedule,
    centers: np.ndarray,
    curvature: np.ndarray = CURVATURE,
    rates: Sequence[float] = RATES,
    *,
    kept: int = SIZE // 10,
    noise: np.ndarray | float = 0.0,
    seed: int = 0,
    beta: float = 0.999,
    epsilon: float = 1e-8,
) -> np.ndarray:
    """Return the models of all ranks, shaped as `centers` (ranks, n); infinite if they diverge.

    Args:
        rule: one of `RULES`.
        gamma: the consensus step, or AdaGossip's.
        graph: from whom each rank takes what share.
        centers: the optimum of each rank.
        curvature: the diagonal D, (n,).
        rates: the learning rate of each step.
        kept: how many entries a message has on a fixed graph.
        noise: the standard deviation of each entry of the gradients.
        seed: of the noise.
        beta: of the second moment.
        epsilon: added to its root.

    """
    generator = np.random.default_rng(seed)
    x, copies, v = (np.zeros_like(centers) for _ in range(3))
    w = np.ones((len(centers), 1))
    for step, lr in enumerate(rates):
        shares = graph(step).mixing
        x = x - lr * (curvature * (x / w - centers) + noise * generator.normal(size=x.shape))
        copies = x if isinstance(graph, OnePeerExponential) else copies + top_k(x - copies, kept)
        r = shares @ copies - copies
        if rule == RULES[0]:
            x = x + gamma * r
            w = w + gamma * (shares @ w - w)
        else:
            v = beta * v + (1 - beta) * r * r
            used = v if rule == RULES[1] else v.mean(axis=0)
            x = x + np.minimum(gamma / (np.sqrt(used / (1 - beta ** (step + 1))) + epsilon), 1) * r
            w = shares @ w
        if not np.abs(x).max() < 1e6:
            return np.full_like(x, np.inf)
    return x / w


def main() -> None:
    """Print a table for each problem: the largest distance of a rank from the optimum, and that of the mean model."""
    own = np.random.default_rng(0).normal(size=(RANKS, SIZE))
    scales = np.random.default_rng(1).permutation(np.geomspace(0.1, 10, SIZE))
    for title, centers, noise, seeds in (
        ("an optimum of its own on each rank, exact gradients", own, 0.0, 1),
        ("the same optimum on all ranks, noise of unequal size in the entries, 3 seeds", own[:1] + 0 * own, scales, 3),
    ):
        print(f"\n{title}\n\n| graph | {' | '.join(RULES)} |\n| --- | --- | --- | --- |")
        for graph in GRAPHS:
            cells = [best(rule, graph, centers, noise, seeds) for rule in RULES]
            print(f"| {graph.name} | {' | '.join(cells)} |", flush=True)


def best(rule: str, graph: Schedule, centers: np.ndarray, noise: np.ndarray | float, seeds: int) -> str:
    """Return the distances with the best gamma of the grid, and that gamma."""
    optimum, found = centers.mean(axis=0), []
    for gamma in GAMMAS:
        runs = [train(rule, gamma, graph, centers, noise=noise, seed=seed) for seed in range(seeds)]
        farthest = np.mean([np.linalg.norm(z - optimum, axis=1).max() for z in runs])
        mean = np.mean([np.linalg.norm(z.mean(axis=0) - optimum) for z in runs])
        found.append((farthest, mean, gamma))
    farthest, mean, gamma = min(found)
    return f"{farthest:.2g}, mean {mean:.2g} ({gamma:.2g})"


if __name__ == "__main__":
    main()
