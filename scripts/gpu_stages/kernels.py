"""Kernels beside a copy on the device and torch.topk, with the bytes that they move; launches and synchronizations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from stage import Stage
from torch.profiler import ProfilerActivity, profile

FLOORS = {
    "top-k": 1,
    "threshold": 1,
    "CHOCO: difference, top-k, public copy": 2,
    "CHOCO mix": 4,
    "AdaGossip mix": 6,
    "pack signs": 1 + 1 / 32,
    "pack 4-bit levels": 1 + 1 / 8,
    "sign: compress": 1 + 1 / 32,
    "sign: add a message": 2 + 1 / 32,
    "QSGD, 4 bits: compress": 1 + 1 / 8,
    "QSGD, 4 bits: add a message": 2 + 1 / 8,
}
"""Vectors that an operation must read and write at least; a copy moves 2. Selected entries are not counted."""

TARGETS = {
    "top-k, 1.0%": 2.0,
    "CHOCO: difference, top-k, public copy": 3.0,
    "AdaGossip mix": 2.5,
    "pack signs": 1.0,
    "pack 4-bit levels": 1.0,
}
"""The copies that an operation may take on an H100 or H200."""

LAUNCHES, SYNCHRONIZATIONS = 5, 1
"""The most launches for all tensors of a ResNet-20, and the most synchronizations in a step."""


def main() -> None:
    """Run the stage."""
    stage = Stage("kernels")
    sizes = (1_000,) if stage.tiny else (1_000_000, 11_000_000, 100_000_000)
    stage.run(
        {
            **{f"{entries:,} entries": partial(measure, stage, entries) for entries in sizes},
            "launches": partial(launches, stage),
            "synchronizations": partial(synchronizations, stage),
        }
    )


def measure(stage: Stage, entries: int) -> Mapping[str, Any]:
    """Run `mpicomp bench compress`, and add what its figures mean in bytes a second."""
    path = stage.folder / f"{entries}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ["-m", "mpicomp", "bench", "compress", "--device", stage.device, "--entries", entries, "--json", path]
    stage.program([*words, "--rounds", 2 if stage.tiny else 15], limit=100)
    report: dict[str, Any] = json.loads(path.read_text())
    nbytes = 4 * entries
    report["copy_bytes_per_s"] = 2 * nbytes / report["copy_ms"] * 1e3
    for result in report["results"]:
        floor = FLOORS.get(result["name"]) or FLOORS.get(result["name"].partition(",")[0])
        result["bytes_per_s"] = floor and floor * nbytes / result["ms"] * 1e3
        if (target := TARGETS.get(result["name"])) is not None:
            result |= {"target_copies": target, "is_met": result["copies"] <= target}
    return report


def launches(stage: Stage) -> Mapping[str, Any]:
    """Count what top-k of all tensors of a ResNet-20 launches."""
    from mpicomp.compression import PerTensor, Spec, TopK
    from mpicomp.models.base import Problem
    from mpicomp.models.resnet import resnet20

    device = torch.device(stage.place)
    model = resnet20(Problem((3, 32, 32), 10))
    named = dict(model.named_parameters())
    spec = Spec(tuple(named), tuple(tuple(parameter.shape) for parameter in named.values()))
    x = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0)).to(device)
    compressor = PerTensor(TopK(0.01))
    state = compressor.init(spec, device)
    for _ in range(3):  # compiles
        compressor.compress(x, spec, state)
    events = calls_of(lambda: compressor.compress(x, spec, state))
    found = sum(number for name, number in events.items() if "LaunchKernel" in name)
    return {"launches": found, "target": LAUNCHES, "is_met": found <= LAUNCHES, "events": events}


def synchronizations(stage: Stage) -> Mapping[str, Any]:
    """Count how often a step of CHOCO-SGD at 1 % waits for the device, the loss left on it."""
    from mpicomp.algorithms import Choco
    from mpicomp.compression import TopK
    from mpicomp.exchange import loopback
    from mpicomp.replica.distribute import distribute
    from mpicomp.topology import ring

    def serve(world: Any, steps: int) -> None:
        layers = torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
        model = torch.nn.Sequential(*layers).to(world.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        gossip = distribute(model, optimizer, Choco(0.2, TopK(0.01)), ring, world=world)
        inputs = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).to(world.device)
        for _ in range(steps):
            gossip.step(lambda: model(inputs).square().mean())

    loopback.run(2, serve, 3, device=stage.place)  # compiles
    few, more = (calls_of(partial(loopback.run, 2, serve, steps, device=stage.place)) for steps in (3, 8))
    events = {name: (number - few.get(name, 0)) / 10 for name, number in more.items()}  # 5 steps of 2 ranks
    found = sum(number for name, number in events.items() if "Synchronize" in name)
    met = found <= SYNCHRONIZATIONS
    return {"synchronizations": found, "target": SYNCHRONIZATIONS, "is_met": met, "events": events}


def calls_of(run: Callable[[], object]) -> dict[str, int]:
    """Return how often each function of CUDA's interface is called in a run, by any thread."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        run()
    return {event.key: event.count for event in recorded.key_averages() if event.key.startswith(("cuda", "cu"))}


if __name__ == "__main__":
    main()
