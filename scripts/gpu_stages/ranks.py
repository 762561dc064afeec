"""MPI ranks that share the GPU: training, a kill and a restart, and a timeline of what happens behind what."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stage import Stage, end
from torch.profiler import ProfilerActivity, profile

SYNCHRONOUS = ("choco", "adagossip", "dpsgd", "gmc")
ASYNCHRONOUS = ("dc_asgd", "ad_psgd", "dc_gossip")

STEPS = 60
CHECKPOINT = 20
"""Steps from one checkpoint to the next."""

Interval = tuple[float, float]


def main() -> None:
    """Run the stage."""
    stage = Stage("ranks")
    sizes = (2,) if stage.tiny else (2, 4, 8)
    methods = ("choco", "dc_gossip") if stage.tiny else (*SYNCHRONOUS, *ASYNCHRONOUS)
    restarted = methods[:1] if stage.tiny else methods
    stage.run(
        {
            **{f"{method}, {size} ranks": partial(train, stage, method, size) for size in sizes for method in methods},
            "timeline": partial(timeline, stage),
            "streams": partial(streams, stage),
            **{
                f"restart of {method}, {size} ranks": partial(restart, stage, method, size)
                for size in sizes
                for method in restarted
            },
        }
    )


def command(stage: Stage, method: str, folder: Path, *more: str) -> list[object]:
    """Return the command of a run into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    sets = [f"run.device={stage.device}", "run.allow_shared_gpu=true", f"training.steps={STEPS}", "schedule.warmup=0"]
    sets += [f"checkpoint.every_steps={CHECKPOINT}", "checkpoint.keep_last=0", "run.log_every=10", *more]
    words = ["-m", "mpicomp", "train", f"configs/methods/{method}.toml", "--run-dir", folder]
    return [*words, *(word for value in sets for word in ("--set", value))]


def train(stage: Stage, method: str, size: int) -> Mapping[str, Any]:
    """Train without a disturbance."""
    folder = stage.folder / f"{method}-{size}"
    stage.program(command(stage, method, folder), ranks=size, limit=90)
    result = json.loads((folder / "result.json").read_text())
    return {key: result[key] for key in ("ranks", "steps", "seconds", "test_accuracy", "train_loss", "bytes_sent")}


def restart(stage: Stage, method: str, size: int) -> Mapping[str, Any]:
    """Kill all ranks after the first checkpoint, and go on; compare with the run that nobody has disturbed."""
    from support.runs import assert_same_checkpoint, ranks_of

    from mpicomp.checkpoint.folder import Checkpoints

    undisturbed, folder = stage.folder / f"{method}-{size}", stage.folder / f"{method}-{size}-killed"
    slow = ("slow.ranks=[0,1]", "slow.seconds=0.02")  # so that the kill comes before the end; values are the same
    run = stage.start(command(stage, method, folder, *slow), ranks=size)
    try:
        deadline = time.monotonic() + min(90, stage.seconds_left)
        while Checkpoints(folder / "checkpoints").latest() is None:
            if run.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no checkpoint to go on from: {run.communicate(timeout=5)[0][-1500:]}")
            time.sleep(0.05)
        ranks = ranks_of(folder)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        run.communicate(timeout=30)
    finally:
        end(run)
    if (folder / "result.json").exists():
        raise RuntimeError("the run had ended before the kill")
    left = Checkpoints(folder / "checkpoints").latest()
    assert left is not None
    stage.program(["-m", "mpicomp", "train", "--resume", folder], ranks=size, limit=90)
    found: dict[str, Any] = {"killed": len(ranks), "went_on_after": left.manifest.step}
    if method in ASYNCHRONOUS:  # the order of messages is another one in every run
        return found | {"test_accuracy": json.loads((folder / "result.json").read_text())["test_accuracy"]}
    assert_same_checkpoint(*(Checkpoints(of / "checkpoints").latest() for of in (folder, undisturbed)))
    return found | {"same_bits": True}


def timeline(stage: Stage) -> Mapping[str, Any]:
    """Trace overlapped CHOCO-SGD: how much of the exchange lies behind gradients, by the host's clock."""
    folder, size, width = stage.folder / "timeline", *((2, 64) if stage.tiny else (4, 1024))
    words = command(stage, "choco", folder, "algorithm.overlap=true", f"model.hidden=[{width},{width}]")
    stage.program([*words, "--trace", "--trace-steps", 30], ranks=size, limit=90)
    events = json.loads((folder / "trace" / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    gradients = [interval(event) for event in spans if event["name"] == "gradient"]
    exchanges = [interval(event) for event in spans if event["name"] in ("send", "wait")]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = {part: sum(record["seconds"].get(part, 0.0) for record in records) for part in records[0]["seconds"]}
    return {
        "steps": sum(event["name"] == "step" for event in spans),
        "exchange_ms": length(exchanges) / 1e3,
        "exchange_within_gradients_ms": overlap(exchanges, gradients) / 1e3,
        "seconds": seconds,
        "trace": str(folder / "trace" / "trace.json"),
    }


def streams(stage: Stage) -> Mapping[str, Any]:
    """Record the device: for how long copies between host and device ran while kernels did, on another stream."""
    from mpicomp.algorithms import Choco
    from mpicomp.compression import TopK
    from mpicomp.exchange import loopback
    from mpicomp.replica.distribute import distribute
    from mpicomp.topology import ring

    width = 64 if stage.tiny else 4096

    def serve(world: Any) -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))).to(world.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        gossip = distribute(model, optimizer, Choco(0.2, TopK(0.1), overlap=True), ring, world=world)
        inputs = torch.randn(32, width, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
        for _ in range(5):
            gossip.step(lambda: model(inputs).square().mean())

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if stage.device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        loopback.run(2, serve, device=stage.place)
    path = stage.folder / "device_trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    return device_overlap(json.loads(path.read_text())["traceEvents"]) | {"trace": str(path)}


def device_overlap(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the milliseconds of copies over the bus, and of those beside a kernel of another stream."""
    copies: dict[Any, list[Interval]] = {}
    kernels: dict[Any, list[Interval]] = {}
    for event in events:
        stream = event.get("args", {}).get("stream")
        if event.get("cat") == "kernel":
            kernels.setdefault(stream, []).append(interval(event))
        elif event.get("cat") == "gpu_memcpy" and ("DtoH" in event["name"] or "HtoD" in event["name"]):
            copies.setdefault(stream, []).append(interval(event))
    beside = sum(
        overlap(of_stream, [span for other, spans in kernels.items() if other != stream for span in spans])
        for stream, of_stream in copies.items()
    )
    return {
        "kernel_streams": sorted(map(str, kernels)),
        "copy_streams": sorted(map(str, copies)),
        "copies_ms": sum(map(length, copies.values())) / 1e3,
        "copies_beside_kernels_ms": beside / 1e3,
    }


def interval(event: Mapping[str, Any]) -> Interval:
    """Return begin and end of an event in microseconds."""
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals, in order."""
    joined: list[Interval] = []
    for begin, stop in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((begin, stop))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Return what the intervals cover."""
    return sum(stop - begin for begin, stop in union(intervals))


def overlap(some: Iterable[Interval], others: Iterable[Interval]) -> float:
    """Return what both cover."""
    some, others = union(some), union(others)
    return length(some) + length(others) - length([*some, *others])


if __name__ == "__main__":
    main()
