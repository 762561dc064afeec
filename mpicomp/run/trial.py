"""A run that is judged and thrown away, to choose settings by: a process of its own, whose ranks are its threads.

So a trial that diverges, or that the system kills, leaves nothing behind in the next one. It is the run that
``mpicomp train`` makes of the same configuration.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpicomp.errors import DivergenceError, MpicompError
from mpicomp.run.folder import RunFolder


@dataclass(frozen=True)
class Trial:
    """What came out of a trial.

    Attributes:
        result: the fields of its `Result`, as in ``result.json``.
        records: the lines of its ``metrics.jsonl``.

    """

    result: dict[str, Any]
    records: list[dict[str, Any]]


def run_trial(config: str, size: int, simulate: bool, environ: Mapping[str, str] | None = None) -> Trial | None:
    """Train, and return what came out, None if the run diverged.

    Args:
        config: the text of a complete configuration.
        size: how many ranks there are.
        simulate: whether time is simulated.
        environ: the environment of the process; None for that of this one.

    Raises:
        MpicompError: the run failed otherwise than by diverging; with its last words and its exit code.

    """
    with tempfile.TemporaryDirectory(prefix="mpicomp-trial-") as temporary:
        path, folder = Path(temporary) / "config.toml", RunFolder(Path(temporary) / "run")
        path.write_text(config)
        how = "--simulate" if simulate else "--loopback"
        command = [sys.executable, "-m", "mpicomp", "train", path, how, size, "--run-dir", folder.path]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environ)
        if done.returncode == DivergenceError.exit_code:
            return None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).removeprefix("mpicomp: error: ")
            error = MpicompError(f"a trial ended with exit code {done.returncode}: {said}")
            error.exit_code = max(done.returncode, 1)  # below 0: killed by a signal
            raise error
        return Trial(json.loads(folder.result_path.read_text()), folder.records())
