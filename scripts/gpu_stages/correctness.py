"""On the device as on the CPU: tests/gpu, every compressor, every algorithm; and the kernels under compute-sanitizer.

Compressors promise the same bits. Algorithms promise them from run to run; against the CPU, gradients and the
arithmetic of the optimizer differ in their last bits, so the largest difference is recorded, as a fraction of the
largest parameter.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stage import Stage
from torch import nn

STEPS = 5
RANKS = 3
SANITIZERS = ("memcheck", "racecheck")
ASYNCHRONOUS = ("asgd", "dc_asgd", "ad_psgd", "dc_gossip")


def main() -> None:
    """Run the stage."""
    from support.methods import COMPRESSORS, DETERMINISTIC

    stage = Stage("correctness")
    compressors, methods = dict(COMPRESSORS), dict(DETERMINISTIC)
    asynchronous = ASYNCHRONOUS
    if stage.tiny:
        asynchronous = ASYNCHRONOUS[-1:]
        compressors = {name: compressors[name] for name in ("qsgd", "topk_error_feedback")}
        methods = {name: methods[name] for name in ("choco_overlapped", "gmc")}
    stage.run(
        {
            "tests/gpu": partial(gpu_tests, stage),
            **{f"compressor {name}": partial(compress, stage, kind) for name, kind in compressors.items()},
            **{f"algorithm {name}": partial(train, stage, kind) for name, kind in methods.items()},
            **{f"algorithm {name}": partial(simulate, stage, name) for name in asynchronous},
            **{tool: partial(sanitize, stage, tool) for tool in SANITIZERS},
        }
    )


def gpu_tests(stage: Stage) -> Mapping[str, Any]:
    """Run tests/gpu; without a GPU all of them are skipped."""
    report = stage.folder / "tests.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    words = ["-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "tests/gpu"]
    stage.program([*words, f"--junitxml={report}"], limit=240, codes=(0, 1))
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for outcome, names in outcomes.items():
            if (found := case.find(outcome)) is not None:
                names.append(f"{case.get('name')}: {(found.get('message') or '')[:300]}")
    bad = outcomes["failure"] + outcomes["error"]
    skipped = len(outcomes["skipped"])
    return {"passed": len(cases) - skipped - len(bad), "skipped": skipped, "failed": len(bad), "failures": bad}


def compress(stage: Stage, compressor: Any) -> Mapping[str, Any]:
    """Compress and add three vectors, with the state that goes on between them, on the device and on the CPU."""
    from mpicomp.compression import Spec

    n = 1000 if stage.tiny else 272_474
    spec = Spec(("matrix", "vector"), ((n // 4, 2), (n - n // 4 * 2,)))
    outcomes = []
    for device in (torch.device("cpu"), torch.device(stage.place)):
        state, out, found = compressor.init(spec, device), torch.zeros(n, device=device), {}
        for step in range(3):
            x = torch.randn(n, generator=torch.Generator().manual_seed(step)).to(device)
            payload = compressor.compress(x, spec, state)
            compressor.accumulate(payload, spec, out, 0.5)
            found |= {f"{step}: {key}": value.cpu() for key, value in payload.items()}
        outcomes.append(found | {"sum": out.cpu()})
    on_cpu, on_device = outcomes
    differing = sorted(key for key in on_cpu if not same_bits(on_cpu[key], on_device[key]))
    return {
        "promised": True,
        "same_bits": not differing,
        "differing": differing,
        "difference": relative_difference(on_cpu["sum"], on_device["sum"]),
    }


def train(stage: Stage, algorithm: Any) -> Mapping[str, Any]:
    """Train a small network, twice on the device and once on the CPU."""
    from mpicomp.exchange import loopback

    on_cpu = loopback.run(RANKS, train_rank, algorithm)
    once, again = (loopback.run(RANKS, train_rank, algorithm, device=stage.place) for _ in range(2))
    return {
        "promised": False,
        "same_bits_again": all(same_bits(a[0], b[0]) for a, b in zip(once, again, strict=True)),
        "same_bits": all(same_bits(a[0], b[0]) for a, b in zip(on_cpu, once, strict=True)),
        "same_bytes_sent": [rank[1] for rank in on_cpu] == [rank[1] for rank in once],
        "difference": max(relative_difference(a[0], b[0]) for a, b in zip(on_cpu, once, strict=True)),
    }


def train_rank(world: Any, algorithm: Any) -> tuple[torch.Tensor, int]:
    """Return the parameters of a rank after some steps, and the bytes that it has sent."""
    from support import small

    from mpicomp.algorithms.sums.two_way import TwoWayAdam
    from mpicomp.replica.distribute import distribute
    from mpicomp.topology import ring

    model = small.network().to(world.device)
    has_own_momentum = getattr(algorithm, "quasi_global_momentum", 0) or getattr(algorithm, "momentum", 0)
    momentum = 0.0 if has_own_momentum or isinstance(algorithm, TwoWayAdam) else 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    gossip = distribute(model, optimizer, algorithm, ring, world=world)
    for step in range(STEPS):
        inputs, labels = (tensor.to(world.device) for tensor in small.batch(step, world.rank))
        gossip.step(lambda inputs=inputs, labels=labels: nn.functional.cross_entropy(model(inputs), labels))
    return gossip.local.x.cpu().clone(), gossip.bytes_sent


def simulate(stage: Stage, method: str) -> Mapping[str, Any]:
    """Train in simulated time, where asynchronous methods are the same each time, on the device and on the CPU."""
    import h5py

    models = []
    for device in ("cpu", stage.device):
        folder = Path(tempfile.mkdtemp(prefix=f"{method}-", dir=stage.folder)) / "run"
        words = ["-m", "mpicomp", "train", f"configs/methods/{method}.toml", "--run-dir", folder, "--simulate", RANKS]
        sets = [f"run.device={device}", "training.epochs=1", "schedule.warmup=0", "run.log_every=1000"]
        stage.program([*words, *(word for value in sets for word in ("--set", value))], limit=90)
        found: list[torch.Tensor] = []
        with h5py.File(folder / "model.h5") as file:
            file.visititems(
                lambda _, entry, found=found: found.append(flat(entry)) if hasattr(entry, "shape") else None
            )
        models.append(torch.cat(found))
    on_cpu, on_device = models
    return {
        "promised": False,
        "same_bits": same_bits(on_cpu, on_device),
        "difference": relative_difference(on_cpu, on_device),
    }


def flat(entry: Any) -> torch.Tensor:
    """Return a data set of a file as a vector."""
    return torch.from_numpy(entry[()].reshape(-1).astype("float64"))


def sanitize(stage: Stage, tool: str) -> Mapping[str, Any]:
    """Run the table of kernels under a tool of compute-sanitizer, if there is one."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return {"found": False}
    program = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    tests = [
        "-m",
        "pytest",
        "-q",
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_kernels.py",
    ]
    words = [sanitizer, "--tool", tool, shutil.which("python"), *tests, "-k", "definitions and float32"]
    output = stage.program(["-c", program, *words], limit=120, codes=range(256))
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    if not summary:
        raise RuntimeError(f"{sanitizer} printed no summary: {output[-800:]}")
    return {"found": True, "summary": summary[-1], "is_clean": re.search(r"SUMMARY: 0 ", summary[-1]) is not None}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest entry."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))


if __name__ == "__main__":
    main()
