"""A timeline: what each rank did when, in the first steps of a start, for ui.perfetto.dev or chrome://tracing.

Every rank writes ``trace/rank-0000.json`` into the run folder as soon as it has taken down its steps, or when it ends
before; rank 0 puts all of them into ``trace/trace.json`` when the run ends or is stopped. The format is Chrome's "trace
events": a process is a rank, an event of the type X has begin and duration in microseconds, and inner events lie within
outer ones. A category is a part of `Record.seconds`:

    gradient    gradient, update (the optimizer)
    compress    compress, compress_difference, accumulate, ...; in them select, encode
    exchange    send, wait, all_reduce, meet (at records and decisions); put, receive (mailboxes); in them pack, unpack
    mix         what the others leave of a step
    wait        idle (asynchronous methods)
    none        step, record, evaluation, checkpoint

An event that lies in one of another category takes its time from it. Durations are those of the host: on a GPU,
kernels run behind; the same names are NVTX ranges there.

The clocks of ranks are compared once, at the start: by barriers, which no rank leaves before all have come. That bounds
the offset of a clock to the rank 0's from both sides; the middle is taken, and half of the width is in
``otherData.accuracy_s``. Ranks of one machine share a clock, where the bounds allow it (accuracy 0). Clocks drift by
some microseconds a second from there.

At most `LIMIT` events of a rank are kept, in memory and in the file, about 110 bytes each there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mpicomp.exchange.base import World
from mpicomp.timing import Event, Recorder, record

LIMIT = 100_000
"""Events of a rank."""

ROUNDS = 16
"""Barriers to compare the clocks by."""

MERGED = "trace.json"


class Timeline:
    """Records the ranks while a block runs; entering and leaving it without an error are collective on all ranks.

    Args:
        world: the ranks.
        folder: where to write, on a file system that all ranks share; None for no timeline.
        steps: of each rank (gradients, where ranks go at their own pace); 0 for no timeline.

    """

    def __init__(self, world: World, folder: Path | None, steps: int) -> None:
        self._world = world
        self._folder = folder if steps else None
        self._rank = world.rank  # survivors are numbered anew
        on_gpu = world.device.type == "cuda"
        self._recorder = Recorder(
            steps,
            LIMIT,
            push=torch.cuda.nvtx.range_push if on_gpu else None,
            pop=torch.cuda.nvtx.range_pop if on_gpu else None,
            on_full=self._write,
        )
        self._is_written = False

    def __enter__(self) -> None:
        if self._folder is None:
            return
        if self._world.rank == 0:
            with _forgiven("the timeline of an earlier start could not be removed"):
                for file in [*self._folder.glob("rank-*.json"), self._folder / MERGED]:
                    file.unlink(missing_ok=True)
        self._offset, self._accuracy = compare_clocks(self._world)
        self._origin = self._world.broadcast(self._world.now())
        record(self._recorder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is None:
            return
        self._write()
        if error is None:
            self._world.barrier()
            if self._world.rank == 0:
                with _forgiven("the timelines of the ranks could not be put together"):
                    merge(self._folder)

    def _write(self) -> None:
        """Write what this rank has taken down, and take down no more."""
        assert self._folder is not None
        record(None)
        if self._is_written:
            return
        self._is_written = True
        name = f"rank {self._rank}" + ("" if self._world.is_simulated else f" on {self._world.host}")
        begun = self._origin + self._offset
        document = {
            "traceEvents": [*_names(self._rank, name), *(_json(event, self._rank, begun) for event in self._events())],
            "displayTimeUnit": "ms",
            "otherData": {"rank": self._rank, "offset_s": self._offset, "accuracy_s": self._accuracy},
        }
        with _forgiven(f"the timeline of rank {self._rank} could not be written"):
            self._folder.mkdir(exist_ok=True)
            (self._folder / f"rank-{self._rank:04}.json").write_text(json.dumps(document), encoding="utf-8")

    def _events(self) -> Sequence[Event]:
        return sorted(self._recorder.events, key=lambda event: (event.begin, -event.end))


def compare_clocks(world: World) -> tuple[float, float]:
    """Return by how much the clock of this rank is ahead of rank 0's, and how far off that may be; in seconds.

    Collective on all ranks.
    """
    rounds = []
    for _ in range(ROUNDS):
        entered = world.now()
        world.barrier()
        rounds.append((entered, world.now()))
    first_host, first = world.all_gather((world.host, rounds))[0]
    # Nobody has left before the other one has come.
    least = max(entered - left for (entered, _), (_, left) in zip(rounds, first, strict=True))
    most = min(left - entered for (_, left), (entered, _) in zip(rounds, first, strict=True))
    if world.host == first_host and least <= 0 <= most:
        return 0.0, 0.0
    return (least + most) / 2, (most - least) / 2


def merge(folder: Path) -> None:
    """Put the files of the ranks in `folder` into one; they stay."""
    accuracy: dict[str, float] = {}
    with (folder / MERGED).open("w", encoding="utf-8") as out:
        out.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for file in sorted(folder.glob("rank-*.json")):
            document = json.loads(file.read_text(encoding="utf-8"))  # one rank in memory at a time
            accuracy[str(document["otherData"]["rank"])] = document["otherData"]["accuracy_s"]
            for event in document["traceEvents"]:
                out.write(separator + json.dumps(event))
                separator = ",\n"
        out.write(f'\n], "otherData": {json.dumps({"accuracy_s": accuracy})}}}\n')


@contextmanager
def _forgiven(what: str) -> Iterator[None]:
    """Report a full disk, or what it has made of a file, and go on: training is worth more than its timeline."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"mpicomp: warning: {what}: {error}", file=sys.stderr, flush=True)


def _names(rank: int, name: str) -> list[dict[str, Any]]:
    common = {"ph": "M", "pid": rank, "tid": 0}
    return [
        {**common, "name": "process_name", "args": {"name": name}},
        {**common, "name": "process_sort_index", "args": {"sort_index": rank}},
    ]


def _json(event: Event, rank: int, origin: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.category or "none",
        "pid": rank,
        "tid": 0,
        "ts": round(1e6 * (event.begin - origin), 3),
        "dur": round(1e6 * (event.end - event.begin), 3),
    }
