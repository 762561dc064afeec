"""Which device and how many cores a rank gets. No MPI; without a GPU, a table takes the place of the driver.

A GPU is known by its UUID, and never by its number: under ``CUDA_VISIBLE_DEVICES``, ``srun --gpus-per-task`` or
``--gpu-bind``, the number 0 is another GPU on every rank, and two ranks may see the same GPUs in another order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mpicomp import kernels
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together

DeviceKind = Literal["auto", "cpu", "cuda"]

NO_GPU = "no GPU: running on the CPU"

LEAST_FREE = 256 * 2**20
"""Bytes of a GPU's memory without which no training is begun; one that needs more ends with torch's own error."""

TRITON_CAPABILITY = (8, 0)
"""The oldest GPUs that Triton compiles for (github.com/triton-lang/triton, "Compatibility")."""

_ON_CPU = "or train on the CPU (run.device=cpu, in a script device='cpu')"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this rank sees, or a part of one (MIG).

    Attributes:
        index: its number for torch, on this rank only.
        uuid: as ``nvidia-smi -L`` shows it; no two GPUs of a cluster have the same.
        name: its model.
        capability: what it can, (major, minor).
        cores: those on its side of the machine; None if that is not known.

    """

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]
    cores: frozenset[int] | None = None

    @property
    def device(self) -> torch.device:
        """Torch's name for it."""
        return torch.device("cuda", self.index)


class Driver:
    """The GPUs of this machine by torch and the operating system."""

    environ: Mapping[str, str] = os.environ
    root = Path("/")

    def has_cuda(self) -> bool:
        """Return whether torch was built for CUDA."""
        return torch.version.cuda is not None

    def properties(self) -> list[Any]:
        """Return torch's properties of the GPUs that this rank sees, by number. No memory is taken on any.

        Raises:
            RuntimeError: CUDA does not start.

        """
        return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]

    def architectures(self) -> list[str]:
        """Return what torch was compiled for, such as ``sm_90`` and ``compute_90``."""
        return torch.cuda.get_arch_list()

    def start(self, gpu: Gpu) -> tuple[int, int]:
        """Make `gpu` torch's device, and return the free and all bytes of its memory.

        Raises:
            RuntimeError: it cannot be used.

        """
        torch.cuda.set_device(gpu.device)
        return torch.cuda.mem_get_info(gpu.device)


def visible_gpus(driver: Driver) -> list[Gpu]:
    """Return the GPUs that this rank sees, by number.

    Raises:
        RuntimeError: CUDA does not start.

    """
    gpus = []
    for index, properties in enumerate(driver.properties()):
        uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
        capability = (properties.major, properties.minor)
        name = mig_uuid(index, driver.environ) or uuid
        gpus.append(Gpu(index, name, properties.name, capability, cores_near(uuid, driver.root)))
    return gpus


def claim_gpu(world: World, kind: DeviceKind, allow_shared: bool = False, driver: Driver | None = None) -> Gpu | None:
    """Return the GPU of this rank, which torch uses from now on, or None for the CPU; collective on all ranks.

    Raises:
        ConfigError: on every rank, for the ranks that it names: a GPU that is demanded but missing, or missing here
            and not on other ranks, unless it is hidden on purpose; full; too old; or shared without `allow_shared`.

    """
    driver = driver or Driver()
    with together(world):
        seen = _visible(kind, driver)
    everywhere = world.all_gather([gpu.uuid for gpu in seen])
    with together(world):
        return _claim(world.rank, kind, everywhere, seen, allow_shared, driver)


def only_gpu(kind: DeviceKind, driver: Driver | None = None) -> Gpu | None:
    """Return the GPU of a program of one process, or None for the CPU.

    Raises:
        ConfigError: a GPU that is demanded but missing, full, or too old.

    """
    driver = driver or Driver()
    seen = _visible(kind, driver)
    return _claim(0, kind, [[gpu.uuid for gpu in seen]], seen, False, driver)


def device_of(gpu: Gpu | None) -> torch.device:
    """Return torch's device for what `claim_gpu` has returned."""
    return gpu.device if gpu else torch.device("cpu")


def _visible(kind: DeviceKind, driver: Driver) -> list[Gpu]:
    if kind == "cpu":
        return []
    try:
        seen = visible_gpus(driver)
    except RuntimeError as error:
        raise ConfigError(
            f"CUDA does not start: {_first_line(error)}. Make nvidia-smi run on this node, {_ON_CPU}"
        ) from error
    if kind == "cuda" and not seen:
        raise ConfigError(
            f"device = 'cuda', but this rank sees no GPU: {why_no_gpu(driver.environ, driver.has_cuda())}, {_ON_CPU}"
        )
    return seen


def _claim(
    rank: int,
    kind: DeviceKind,
    everywhere: Sequence[Sequence[str]],
    seen: Sequence[Gpu],
    allow_shared: bool,
    driver: Driver,
) -> Gpu | None:
    """Return the GPU of `rank`, when the ranks see the UUIDs `everywhere`."""
    chosen = assign(everywhere)
    uuid = chosen[rank]
    if uuid is None:
        others = sum(other is not None for other in chosen)
        if kind == "auto" and others and not hides_gpus(driver.environ):
            raise ConfigError(
                f"this rank sees no GPU, but {others} other(s) do and would wait for it in every step: "
                f"{why_no_gpu(driver.environ, driver.has_cuda())}, {_ON_CPU}. If it alone is to use the CPU, as a hub "
                "may, start it with CUDA_VISIBLE_DEVICES=''"
            )
        return None
    users = shared_gpus(chosen).get(uuid, [])
    if users and not allow_shared:
        raise ConfigError(
            f"ranks {', '.join(map(str, users))} would share the GPU {uuid}: start one rank per GPU, let the launcher "
            f"show each its own (srun --gpus-per-task=1), or allow it (run.allow_shared_gpu, in a script "
            f"allow_shared_gpu=True), {_ON_CPU}"
        )
    gpu = next(gpu for gpu in seen if gpu.uuid == uuid)
    check_age(gpu, driver.architectures(), has_triton=kernels.compiled("cuda") is not None)
    try:
        free, total = driver.start(gpu)
    except RuntimeError as error:
        raise ConfigError(
            f"the GPU {gpu.uuid} ({gpu.name}) cannot be used: {_first_line(error)}. nvidia-smi shows whether another "
            f"program has filled it, or has it for itself (compute mode): choose another one, {_ON_CPU}"
        ) from error
    if free < LEAST_FREE:
        raise ConfigError(
            f"the GPU {gpu.uuid} ({gpu.name}) is full: {free / 1e6:.0f} MB of {total / 1e6:.0f} MB are free. "
            f"nvidia-smi shows which program has the rest: end it, choose another GPU, {_ON_CPU}"
        )
    return gpu


def assign(seen: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the GPU of each rank, by UUID, when rank r sees the GPUs ``seen[r]``; None where it sees none.

    As few ranks as possible on the fullest GPU: a matching of ranks and GPUs by augmenting paths (Kuhn), where a GPU
    takes one more rank only if a rank finds no place. Ranks that all see the same GPUs in the same order get them in
    turn. Ranks of all nodes are assigned at once: which of them share a node is in the UUIDs, also where each rank has
    a container of its own and MPI takes it for a node.
    """
    users: dict[str, list[int]] = {uuid: [] for uuids in seen for uuid in uuids}

    def has_placed(rank: int, capacity: int, tried: set[str]) -> bool:
        for uuid in sorted(seen[rank], key=lambda uuid: len(users[uuid])):  # the emptiest; else the first it sees
            if uuid in tried:
                continue
            tried.add(uuid)
            if len(users[uuid]) < capacity:
                users[uuid].append(rank)
                return True
            for other in users[uuid]:
                if has_placed(other, capacity, tried):
                    users[uuid].remove(other)
                    users[uuid].append(rank)
                    return True
        return False

    for rank, uuids in enumerate(seen):
        if uuids:
            next(capacity for capacity in itertools.count(1) if has_placed(rank, capacity, set()))
    place = {rank: uuid for uuid, ranks in users.items() for rank in ranks}
    return [place.get(rank) for rank in range(len(seen))]


def shared_gpus(uuids: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the GPUs that more than one rank uses, with these ranks; `uuids` holds one a rank, None without a GPU."""
    users: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids):
        if uuid is not None:
            users.setdefault(uuid, []).append(rank)
    return {uuid: ranks for uuid, ranks in users.items() if len(ranks) > 1}


def mig_uuid(index: int, environ: Mapping[str, str]) -> str | None:
    """Return the UUID of the MIG instance that this rank sees as number `index`, None if it is not chosen by UUID.

    CUDA may show the UUID of the whole GPU for each of its instances, so that two of them would look like one.
    """
    mask = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return mask[index] if index < len(mask) and mask[index].startswith("MIG-") else None


def hides_gpus(environ: Mapping[str, str]) -> bool:
    """Return whether all GPUs are hidden from this rank on purpose, by a person or by Slurm."""
    return environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1", "NoDevFiles")


def why_no_gpu(environ: Mapping[str, str], has_cuda: bool = True) -> str:
    """Return why a rank may see no GPU, and what to do."""
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if not has_cuda:
        return "this torch was built without CUDA: install one built for it"
    if hides_gpus(environ):
        remedy = "ask Slurm for GPUs (--gpus-per-task=1)" if "SLURM_JOB_ID" in environ else "unset it"
        return f"CUDA_VISIBLE_DEVICES={mask!r} hides all of them: {remedy}"
    if mask is not None:
        return f"CUDA_VISIBLE_DEVICES={mask!r} begins with one that is not there: compare with nvidia-smi -L"
    if "SLURM_JOB_ID" in environ:
        return "Slurm gave this step none, or the driver does not run: ask for them (--gpus-per-task=1), try nvidia-smi"
    return "there is none, or the driver does not run: try nvidia-smi"


def check_age(gpu: Gpu, architectures: Sequence[str], has_triton: bool) -> None:
    """Raise ConfigError if `gpu` is too old for a torch compiled for `architectures`, or for the kernels in Triton.

    A binary ``sm_XY`` runs on GPUs of the same major version and at least the same minor one; ``compute_XY`` is
    compiled for newer ones as it is loaded (CUDA C++ Programming Guide, "Application Compatibility").
    """
    shown = ".".join(map(str, gpu.capability))

    def runs(architecture: str) -> bool:
        kind, _, number = architecture.partition("_")
        if not number.isdigit():  # sm_90a, sm_100f: for that GPU, or its family, alone
            return kind == "sm" and _capability(number[:-1]) == gpu.capability
        version = _capability(number)
        return version <= gpu.capability and (kind == "compute" or version[0] == gpu.capability[0])

    if architectures and not any(map(runs, architectures)):
        raise ConfigError(
            f"the GPU {gpu.uuid} ({gpu.name}) has compute capability {shown}, and this torch was compiled for "
            f"{', '.join(architectures)}: install a torch for it, {_ON_CPU}"
        )
    if has_triton and gpu.capability < TRITON_CAPABILITY:
        raise ConfigError(
            f"the GPU {gpu.uuid} ({gpu.name}) has compute capability {shown}, and kernels in Triton need "
            f"{'.'.join(map(str, TRITON_CAPABILITY))}: set MPICOMP_KERNELS=reference, which does without, {_ON_CPU}"
        )


def cores_near(uuid: str, root: Path) -> frozenset[int] | None:
    """Return the cores on the side of the machine where the GPU is plugged in; None if that is not known.

    Read from what NVIDIA's driver and the kernel show under `root`, because torch does not tell where a GPU is.
    """
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError, ValueError):
            if uuid in information.read_text():
                return parse_cores(
                    (root / "sys/bus/pci/devices" / information.parent.name / "local_cpulist").read_text()
                )
    return None


@contextlib.contextmanager
def running_on(cores: AbstractSet[int] | None) -> Iterator[None]:
    """Let this thread run on `cores` only: what memory it allocates meanwhile lies near them.

    None, and cores that the operating system refuses (those of another Slurm job, say), change nothing.
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_cores(text: str) -> frozenset[int]:
    """Return the cores of a list of the kernel's, such as ``0-15,64-79``."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(core for first, _, last in ranges for core in range(int(first), int(last or first) + 1))


def core_share(mine: AbstractSet[int], local: Sequence[AbstractSet[int]]) -> float:
    """Return the cores that fall to a rank allowed on `mine`, when each rank of the node may run on one of `local`.

    A core is split evenly between the ranks allowed on it. Below 1, ranks outnumber their cores.
    """
    return sum(1 / sum(core in cores for cores in local) for core in mine)


def thread_count(share: float, environ: Mapping[str, str] = os.environ) -> int:
    """Return how many threads a rank with that share of the cores should use: at least one.

    ``OMP_NUM_THREADS``, where the user has set it, is obeyed.
    """
    wish = environ.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() and int(wish) > 0 else max(1, int(share + 1e-9))


def _capability(number: str) -> tuple[int, int]:
    return int(number[:-1]), int(number[-1])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
