"""Finds what is damaged in a file whose SHA-256 is wrong.

HDF5 reads the file in a process of its own, because a damaged header can make it crash or hang.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.hdf5 import Digest
from mpicomp.errors import CheckpointError

_START_S = 60
_NBYTES_PER_S = 20e6
"""Seconds that HDF5 may take, to start on a busy machine and to read from a slow disk."""

_ELSEWHERE = "the damage is outside of all tensors: in a header, a name, a number or a text"


def damaged(path: Path, digest: Digest) -> list[str]:
    """Return one sentence for each damage in a file; an empty list if it is intact."""
    problem = hdf5.difference(path, digest)
    if problem is None:
        return []
    if "SHA-256" not in problem:
        return [f"{path}: {problem}"]
    return [f"{path}: {problem}: {where}" for where in _places(path)]


def _places(path: Path) -> list[str]:
    timeout_s = _START_S + path.stat().st_size / _NBYTES_PER_S
    command = [sys.executable, "-m", "mpicomp.checkpoint.damage", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=True)
    except subprocess.CalledProcessError as error:
        return [f"{_ELSEWHERE}; HDF5 crashes on it (exit code {error.returncode})"]
    except subprocess.TimeoutExpired:
        return [f"{_ELSEWHERE}; HDF5 does not come to an end with it"]
    places: list[str] = json.loads(done.stdout)
    return places or [_ELSEWHERE]


def _main(path: Path) -> None:
    """Print, as JSON, a sentence for each dataset that is damaged."""
    try:
        places = [f"the dataset /{name}" for name in hdf5.unreadable(path)]
    except CheckpointError as error:
        places = [f"{_ELSEWHERE}; {str(error).removeprefix(f'{path}: ')}"]
    json.dump(places, sys.stdout)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
