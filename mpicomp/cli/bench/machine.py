"""The description of the machine in every benchmark, and functions for timing and printing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from mpicomp import kernels
from mpicomp.run.progress import stdout

WIDTH = 140
"""Columns of a table, which must not depend on where it is printed."""

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures there, too."
)


CPU = torch.device("cpu")


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """Return processor, cores, load and versions, and the name of the device if it is a GPU."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "kernels": "reference" if kernels.compiled(device.type) is None else "compiled",
        **gpu,
    }


def console() -> Console:
    """Return the console on which to print tables."""
    return stdout(WIDTH)


def print_machine(on: Console, facts: dict[str, Any]) -> None:
    """Print the description of the machine as one line."""
    on.print(", ".join(f"{key} {value}" for key, value in facts.items()), soft_wrap=True, markup=False)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write `report` to the file `path`."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def seconds(run: Callable[[], object], calls: int, device: torch.device = CPU) -> float:
    """Return the mean seconds of so many calls, from an idle `device` to an idle one."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / calls


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was given; at once for the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    """Return the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
