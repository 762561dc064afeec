"""The script for sbatch that trains a run to its end over several starts of the job. Pure text; no MPI, no Slurm.

The script starts ``mpicomp train --resume auto`` with srun. Before the time limit ends the job, after a signal, or if a
file named ``stop`` is in the run folder, all ranks store a checkpoint and exit with code 75. The script then requeues
its job, which keeps its number and its output file, and the run continues. The job ends with any other exit code, and
after a start that has stored no new checkpoint, so that it is not requeued endlessly.

Users are meant to read and edit the script; ``slurm/`` holds four examples.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mpicomp.errors import ConfigError

Launcher = Literal["pmi2", "pmix", "mpirun"]

LAUNCHERS: dict[Launcher, str] = {
    "pmi2": "MPICH, Intel MPI, MVAPICH",
    "pmix": "Open MPI",
    "mpirun": "any, where srun cannot start it: mpirun asks Slurm for the nodes",
}
"""The ways to start ranks, and the MPI that each is for."""

LEAD_S = 180
"""Seconds before the time limit at which Slurm asks for the last checkpoint, by default."""

WAIT_S = 30
"""Seconds after the exit of the first rank until srun ends the others."""

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][\w.]*")
_VALUE = re.compile(r"[\w.+-]+")
_OWN = {
    "job-name": "--name",
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "array": "--seeds, --vary and --at-once",
    "requeue": "--requeue",
    "no-requeue": "--no-requeue",
    "signal": "--signal",
}
"""Options of sbatch that `sbatch` must not set, and the option of this program to use instead."""


@dataclass(frozen=True)
class BatchScript:
    """A batch script, described by the options of its user.

    Attributes:
        config: the configuration file, as ``mpicomp train`` takes it.
        name: of the job.
        run_dir: the folder of the run, or of the runs of an array; on a file system that all nodes share.
        nodes: the number of nodes.
        ranks_per_node: the number of ranks on each node.
        gpus_per_node: one for each rank, or 0.
        cpus_per_rank: the number of cores for each rank.
        time: the time limit as Slurm writes it, or "" for that of the partition.
        partition: or "".
        account: or "".
        qos: or "".
        requeue: whether to requeue the job until the training is done.
        max_restarts: how often to requeue it at most.
        signal_lead_s: how many seconds before the time limit Slurm asks for the last checkpoint, to about half a
            minute. None for 3 minutes, but at most a quarter of the time limit.
        mpi: how the ranks are started.
        overrides: ``SECTION.KEY=VALUE`` for all runs.
        vary: values by ``SECTION.KEY``; the job becomes an array with a run for each combination.
        at_once: how many runs of an array may run at the same time; 0 for all.
        modules: the modules for ``module load``.
        venv: the virtual environment to activate, or "".
        sbatch: further options for sbatch, ``KEY=VALUE`` or ``KEY``.

    Raises:
        ConfigError: a value is not possible.

    """

    config: str
    name: str
    run_dir: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    requeue: bool = True
    max_restarts: int = 100
    signal_lead_s: int | None = None
    mpi: Launcher = "pmi2"
    overrides: Sequence[str] = ()
    vary: Mapping[str, Sequence[str]] = field(default_factory=dict)
    at_once: int = 0
    modules: Sequence[str] = ()
    venv: str = ""
    sbatch: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.gpus_per_node not in (0, self.ranks_per_node):
            raise ConfigError(
                f"--gpus-per-node {self.gpus_per_node} does not fit --ranks-per-node {self.ranks_per_node}: each rank "
                "takes one GPU; give one of the two"
            )
        if self.time and not _TIME.fullmatch(self.time):
            raise ConfigError(
                f"--time {self.time!r} is not a time limit: write MINUTES, HH:MM:SS or D-HH:MM:SS, as sbatch takes it"
            )
        if self.signal_lead_s is not None and self.signal_lead_s >= self._limit_s:
            raise ConfigError(f"--signal {self.signal_lead_s} must be less than the seconds of --time {self.time}")
        if self.at_once and not self.vary:
            raise ConfigError("--at-once limits the runs of an array: give --seeds or --vary, too")
        for option, value in {
            "--name": self.name,
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
        }.items():
            if re.search(r"\s", value):
                raise ConfigError(f"{option} {value!r} must not contain spaces")
        if "/" in self.name:
            raise ConfigError(f"--name {self.name!r} must not contain a slash; it becomes part of a file name")
        if '"' in self.run_dir or "\n" in self.run_dir:
            raise ConfigError(
                f"--run-dir {self.run_dir!r} must be a folder name without quotes; $VARIABLES may be in it"
            )
        given = {override.partition("=")[0].strip() for override in self.overrides}
        for key, values in self.vary.items():
            self._check_varied(key, values)
            if key in given:
                raise ConfigError(f"--set {key} gives all runs one value, and --vary or --seeds several: leave one out")
        for line in self.sbatch:
            key = line.lstrip("-").split("=")[0].strip()
            if key in _OWN:
                raise ConfigError(f"--sbatch {line}: use {_OWN[key]}")
            if not key or "\n" in line:
                raise ConfigError(f"--sbatch {line!r} must be KEY=VALUE or KEY, an option of sbatch without its dashes")

    def _check_varied(self, key: str, values: Sequence[str]) -> None:
        if not _NAME.fullmatch(key) or not values:
            raise ConfigError(f"--vary {key}={','.join(values)} must be SECTION.KEY=VALUE,VALUE,...")
        for value in values:
            if not _VALUE.fullmatch(value):
                raise ConfigError(
                    f"--vary {key}: {value!r} must be a word or a number; it becomes part of a folder name"
                )
        if len(set(values)) < len(values):
            raise ConfigError(f"--vary {key}={','.join(values)}: the same value twice would be two runs in one folder")

    @property
    def ranks(self) -> int:
        """The number of ranks of a run."""
        return self.nodes * self.ranks_per_node

    @property
    def _limit_s(self) -> float:
        """The time limit in seconds, rounded to full minutes as Slurm does; infinite if it is not given, or is 0."""
        if not self.time or not self.time[0].isdigit():
            return math.inf
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:
            hours, minutes, seconds = [0, *parts, 0][:3]
        limit_min = (int(days or 0) * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
        return 60 * limit_min or math.inf

    @property
    def runs(self) -> list[list[str]]:
        """The overrides of each run of an array; empty for a single run."""
        if not self.vary:
            return []
        varied = [[f"{key}={value}" for value in values] for key, values in self.vary.items()]
        return [list(settings) for settings in itertools.product(*varied)]

    def text(self) -> str:
        """Return the text of the script."""
        return "\n".join([*self._head(), *self._environment(), *self._run(), *self._training(), *self._end()]) + "\n"

    def _head(self) -> list[str]:
        runs = self.runs
        options = {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks_per_node),
            "gpus-per-node": str(self.gpus_per_node or ""),
            "cpus-per-task": str(self.cpus_per_rank),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "array": (f"0-{len(runs) - 1}" + (f"%{self.at_once}" if self.at_once else "")) if runs else "",
            "output": "%x-%A_%a.out" if runs else "%x-%j.out",
        }
        reasons = {
            "ntasks-per-node": "one rank per GPU" if self.gpus_per_node else "ranks on each node",
            "gpus-per-node": "all of them visible to all ranks of a node: mpicomp gives each rank its own",
            "array": "one run each, see below",
            "output": "one file for all starts of the job ...",
        }
        lines = [
            "#!/bin/bash",
            f"# Trains {self.config} on {self.ranks} ranks: edit it as you like, and send it with sbatch.",
        ]
        lines += [_directive(f"--{key}={value}", reasons.get(key, "")) for key, value in options.items() if value]
        lines.append(_directive("--open-mode=append", "... which a new start does not empty"))
        if self.requeue:
            lines.append(_directive("--requeue", "the job may be queued again, under the same number"))
        else:
            lines.append(_directive("--no-requeue", "nobody queues the job again"))
        lead_s = self.signal_lead_s or int(min(LEAD_S, self._limit_s / 4))
        lines.append(_directive(f"--signal=B:USR1@{lead_s}", "seconds before the limit; B: to this script alone"))
        lines += [_directive(f"--{line.lstrip('-')}") for line in self.sbatch]
        return lines

    def _environment(self) -> list[str]:
        lines = ["", "# The environment of your site: modules, virtual environment, network settings."]
        if self.modules:
            lines += ["module purge", f"module load {shlex.join(self.modules)}"]
        if self.venv:
            lines.append(f"source {shlex.quote(self.venv.rstrip('/') + '/bin/activate')}")
        lines += [
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # from Slurm 22.05 on srun does not inherit it",
            "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        ]
        return lines

    def _run(self) -> list[str]:
        settings = [f"--set={override}" for override in self.overrides]
        lines = [""]
        if self.vary:
            lines += [
                "# The runs of the array: task i trains with line i, in a folder named after it.",
                "runs=(",
                *(f'  "{" ".join(run)}"' for run in self.runs),
                ")",
                "run=${runs[$SLURM_ARRAY_TASK_ID]}",
                f'run_dir="{self.run_dir}/${{run// /,}}"',
                'read -ra settings <<<"$run"',
                "settings=(" + "".join(f"{shlex.quote(s)} " for s in settings) + '"${settings[@]/#/--set=}")',
            ]
        else:
            lines += [
                "# The folder of the run, seen by all nodes. The same folder is the same run: a job that finds a",
                "# checkpoint in it goes on from there. Two jobs must not train in it at once.",
                f'run_dir="{self.run_dir}"',
                f"settings=({' '.join(map(shlex.quote, settings))})",
            ]
        return lines

    def _training(self) -> list[str]:
        if self.mpi == "mpirun":
            start = 'mpirun -n "$SLURM_NTASKS"'
            about = ["# mpirun learns the nodes from Slurm, and ends all ranks when one fails."]
        else:
            start = f"srun --mpi={self.mpi} --kill-on-bad-exit=0 --wait={WAIT_S}"
            about = [
                f"# --mpi={self.mpi}: for {LAUNCHERS[self.mpi]}. A lost rank ends the others {WAIT_S} s later, not at",
                "# once (--kill-on-bad-exit=1), which would hide exit code 75 of ranks that leave a moment later.",
            ]
        return [
            "",
            "# A file that asked an earlier job to stop, and came too late for it, is not for this one.",
            'rm -f "$run_dir/stop"',
            "",
            "# Near the limit, or at `scancel --batch --signal=USR1 JOB`: a file asks for a checkpoint. It does",
            "# so under every launcher and at any time; a signal would end a rank that is still starting.",
            'trap \'interrupted=1; mkdir -p "$run_dir"; touch "$run_dir/stop"\' USR1',
            "",
            *about,
            'latest() { cat "$run_dir/checkpoints/latest" 2>/dev/null; }',
            "before=$(latest)",
            f"{start} \\",
            f'  mpicomp train {shlex.quote(self.config)} "${{settings[@]}}" --run-dir "$run_dir" --resume auto &',
            "training=$!",
            "interrupted=1",
            "while ((interrupted)); do # a signal ends `wait`, but not the training",
            "  interrupted=0",
            '  wait "$training"',
            "  code=$?",
            "done",
        ]

    def _end(self) -> list[str]:
        lines = [
            "",
            "# 75: stopped with a checkpoint, not done yet. Anything else is the end: done (0), or an error.",
            "((code == 75)) || exit $code",
        ]
        if not self.requeue:
            return [*lines, 'echo "not done yet: send this script again and it goes on from $(latest)"', "exit 75"]
        return [
            *lines,
            'if [[ $(latest) == "$before" ]]; then',
            '  echo "no new checkpoint since this start: not requeued; is --time too short?" >&2',
            "  exit 1",
            f"elif ((${{SLURM_RESTART_COUNT:-0}} >= {self.max_restarts})); then",
            f'  echo "requeued {self.max_restarts} times already: send this script again to go on" >&2',
            "  exit 75",
            "fi",
            "# Where requeueing is forbidden: RequeueExit=75 in slurm.conf does it, too; or send this script several",
            "# times with `sbatch --dependency=singleton`: each job begins when the one before has ended.",
            'scontrol requeue "$SLURM_JOB_ID" && exit 0',
            'echo "not requeued: send this script again and it goes on from $(latest)" >&2',
            "exit 75",
        ]


def _directive(option: str, reason: str = "") -> str:
    """Return a line for sbatch with the comment `reason`; sbatch ignores what follows a space and #."""
    return f"#SBATCH {option:<30}# {reason}" if reason else f"#SBATCH {option}"
