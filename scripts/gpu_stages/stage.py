"""What the stages share: items, each in OUT/STAGE.json as soon as it is done, and programs with a time limit."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # support: the tables that the tests run over

DONE, FAILED, UNFINISHED = 0, 1, 75
POISONED = 70
"""The exit code after an error of the device, which no later call of this process survives."""

OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
"""More ranks than cores, also as root."""

Item = Callable[[], Mapping[str, Any]]


class NotYet(Exception):
    """An item has done what the time allowed, and goes on in a later start; its argument is what it has so far."""


class Stage:
    """The command line of a stage, and its file.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        place: the same, of a tensor: with the number of the GPU.
        tiny: whether this is the dress rehearsal.
        folder: for whatever its items write.

    """

    def __init__(self, name: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--seconds", type=float, required=True, help="no item begins after them")
        parser.add_argument("--start", type=int, required=True, help="what has failed in this start is not tried again")
        args = parser.parse_args()
        self.device, self.tiny = args.device, args.tiny
        self.place = "cuda:0" if self.device == "cuda" else "cpu"
        self.folder = args.out.resolve() / name
        self._path, self._start = args.out.resolve() / f"{name}.json", args.start
        self._end = time.monotonic() + args.seconds
        self._known: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            self._known = json.loads(self._path.read_text())["items"]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what `program` has started

    @property
    def seconds_left(self) -> float:
        """Seconds until this start of the stage ends."""
        return self._end - time.monotonic()

    def result(self, item: str) -> Mapping[str, Any]:
        """Return the result of an earlier item; nothing if it has none."""
        found: Mapping[str, Any] = self._known.get(item, {}).get("result", {})
        return found

    def run(self, items: Mapping[str, Item]) -> None:
        """Do the items that are not done, those that have failed before last; end the process with an exit code."""
        self._write(False)
        pending = [name for name in items if not self._is_over(name)]
        for name in sorted(pending, key=lambda name: name in self._known and self._known[name]["state"] != "waits"):
            if self.seconds_left <= 0:
                break
            self._do(name, items[name])
        states = [self._known.get(name, {}).get("state") for name in items]
        is_complete = all(state == "done" for state in states)
        self._write(is_complete)
        bad = any(state in ("failed", "running") for state in states)
        sys.exit(DONE if is_complete else FAILED if bad else UNFINISHED)

    def _is_over(self, name: str) -> bool:
        """Whether an item is done, or was tried in this start: one that is still running has taken the process down."""
        known = self._known.get(name)
        return known is not None and (known["state"] == "done" or known["start"] == self._start)

    def _do(self, name: str, item: Item) -> None:
        entry = self._known[name] = self._known.get(name, {}) | {"state": "running", "start": self._start}
        entry.pop("error", None)
        self._write(False)
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        try:
            entry["result"] = item()
            entry["state"] = "done"
        except NotYet as so_far:
            entry |= {"state": "waits", "result": so_far.args[0]}
        except Exception as error:
            traceback.print_exc()
            entry |= {"state": "failed", "error": f"{type(error).__name__}: {error}"[-2000:]}
        entry["seconds"] = round(time.monotonic() - begin, 2)
        self._write(False)
        if entry["state"] == "failed" and self.device == "cuda":
            _require_working_device()

    def _write(self, is_complete: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": self.device, "tiny": self.tiny, "is_complete": is_complete, "items": self._known}
        scratch = self._path.with_name(f".{self._path.name}")
        scratch.write_text(json.dumps(report, indent=2) + "\n")
        scratch.replace(self._path)

    def program(
        self, words: Sequence[object], limit: float = 300, ranks: int | None = None, codes: Sequence[int] = (0,)
    ) -> str:
        """Run a Python program to its end, on MPI ranks if their number is given; return what it has printed.

        Raises:
            RuntimeError: another exit code than `codes`, or the time limit.

        """
        limit = max(1.0, min(limit, self.seconds_left))
        process = self.start(words, ranks)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not finished after {limit:.0f} s: {' '.join(map(str, words))}") from None
        finally:
            end(process)
        print(output, flush=True)
        if process.returncode not in codes:
            raise RuntimeError(f"exit code {process.returncode}: {' '.join(map(str, words))}\n{output[-1500:]}")
        return output

    def start(self, words: Sequence[object], ranks: int | None = None) -> subprocess.Popen[str]:
        """Start a Python program in a process group of its own; it dies with this one."""
        launcher: list[str] = []
        if ranks is not None:
            mpiexec = shutil.which("mpiexec")
            if mpiexec is None:
                raise RuntimeError("mpiexec is not found: unpack installs one, in the folder of its Python")
            launcher = [mpiexec, "-n", str(ranks)]
        return subprocess.Popen(
            [*launcher, sys.executable, *map(str, words)],
            cwd=ROOT,
            env=OPEN_MPI | os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def end(process: subprocess.Popen[str]) -> None:
    """End a process, if it has not ended; a launcher ends its ranks."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, how)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _require_working_device() -> None:
    import torch

    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:
        print(f"the device is lost to this process: {error}", flush=True)
        sys.exit(POISONED)
