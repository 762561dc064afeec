"""A timeline of the first steps of a start: what each rank did when, for ui.perfetto.dev or chrome://tracing.

Every rank writes ``trace/rank-0000.json`` (with its number) into the run folder when it has recorded its steps, or when
it ends earlier. Rank 0 merges the files into ``trace/trace.json`` when the run ends or is stopped. The format is
Chrome's "trace events": a process is a rank, an event of type X has begin and duration in microseconds, and inner
events lie within outer ones. A category is a part of `Record.seconds`:

    gradient    gradient, update (the optimizer)
    compress    compress, compress_difference, accumulate, ...; in them select, encode
    exchange    send, wait, all_reduce, meet (at records and decisions); put, receive (mailboxes); in them pack, unpack
    mix         the rest of a step
    wait        idle (asynchronous methods)
    none        step, record, evaluation, checkpoint

Time in an inner event of another category counts for the inner category only. Durations are those of the host: on a
GPU, kernels run asynchronously; there, the same names are NVTX ranges.

The clocks of ranks are compared once, at the start, by barriers, which no rank leaves before all have entered. This
bounds the offset of a clock from that of rank 0 on both sides. The middle of the bounds is used, and half of their
distance is in ``otherData.accuracy_s``. Ranks of one machine share a clock if the bounds allow it (accuracy 0).
Afterwards clocks drift by some microseconds a second.

At most `LIMIT` events of a rank are kept, in memory and in the file; in the file each takes about 110 bytes.
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
"""The largest number of events kept of a rank."""

ROUNDS = 16
"""The number of barriers for comparing the clocks."""

MERGED = "trace.json"


class Timeline:
    """Records the ranks while a block runs; entering and leaving it without an error are collective on all ranks.

    Args:
        world: the ranks.
        folder: where to write, on a file system that all ranks share; None for no timeline.
        steps: how many steps of each rank to record (gradients, in asynchronous runs); 0 for no timeline.

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
        """Write the recorded events of this rank, and stop recording."""
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
    """Return by how much the clock of this rank is ahead of rank 0's, and the largest error of this; in seconds.

    Collective on all ranks.
    """
    rounds = []
    for _ in range(ROUNDS):
        entered = world.now()
        world.barrier()
        rounds.append((entered, world.now()))
    first_host, first = world.all_gather((world.host, rounds))[0]
    # Neither rank has left the barrier before the other one has entered.
    least = max(entered - left for (entered, _), (_, left) in zip(rounds, first, strict=True))
    most = min(left - entered for (_, left), (entered, _) in zip(rounds, first, strict=True))
    if world.host == first_host and least <= 0 <= most:
        return 0.0, 0.0
    return (least + most) / 2, (most - least) / 2


def merge(folder: Path) -> None:
    """Merge the files of the ranks in `folder` into one, without removing them."""
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
    """Report errors of writing, such as a full disk, and continue: a failed timeline must not end the training."""
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
