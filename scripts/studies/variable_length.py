#!/usr/bin/env python3
"""The squared error of variable-length codes, and of top-k with the ratio that takes the same bytes, over that of x.

    .venv-mpich/bin/python scripts/studies/variable_length.py

It takes a minute. Vectors of 100,000 entries, and a gradient of a perceptron on digits after 100 steps of SGD.
"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mpicomp.compression import TopK, VariableLength
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Spec

N = 100_000
BITS = (0.25, 0.5, 1.0, 2.0)


def main() -> None:
    """Print the table."""
    data = {"Gaussian": torch.randn(N, generator=torch.Generator().manual_seed(0))}
    data |= {f"rank^-{power:g}": power_law(power) for power in (0.5, 0.75, 1.0)}
    data["gradient"] = gradient()
    print(f"{'data':12} {'bits':>5} {'this':>9} {'top-k':>9} {'top-k int8':>10}")
    for name, x in data.items():
        for bits in BITS:
            nbytes, error = measure(VariableLength(bits), x)
            full, int8 = at_most(nbytes, TopK, x), at_most(nbytes, lambda ratio: TopK(ratio, values="int8"), x)
            print(f"{name:12} {bits:5g} {error:9.2g} {full:9.2g} {int8:10.2g}")


def measure(compressor: Compressor, x: Tensor) -> tuple[int, float]:
    """Return the bytes of a message of `x` (n,), and ``|Q(x) - x|^2 / |x|^2``."""
    spec = Spec.flat(len(x))
    payload = compressor.compress(x, spec, compressor.init(spec, x.device))
    error = (compressor.decompress(payload, spec) - x).double().square().sum() / x.double().square().sum()
    return compressor.layout(spec).nbytes_of(payload), float(error)


def at_most(nbytes: int, make: Callable[[float], Compressor], x: Tensor) -> float:
    """Return the error with the largest ratio whose message takes at most `nbytes`, by bisection."""
    low, high = 1e-6, 1.0
    for _ in range(18):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(make(middle), x)[0] <= nbytes else (low, middle)
    return measure(make(low), x)[1]


def power_law(power: float) -> Tensor:
    """Return (N,) entries of magnitude ``rank^-power`` in random order, with random signs."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.arange(1, N + 1, dtype=torch.float64)[torch.randperm(N, generator=generator)]
    return (ranks**-power * (1 - 2 * torch.randint(0, 2, (N,), generator=generator))).float()


def gradient() -> Tensor:
    """Return a gradient (85002,) of a perceptron 64-256-256-10 on digits, after 100 steps."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        batch = torch.randint(0, len(inputs), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
