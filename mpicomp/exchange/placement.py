"""Which device and how many cores a rank gets. Pure functions of what each rank sees; no MPI, no GPU needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

import torch

from mpicomp.errors import ConfigError

DeviceKind = Literal["auto", "cpu", "cuda"]

NO_GPU = "no GPU: running on the CPU"


def choose_device(kind: DeviceKind, local_rank: int, visible: int) -> torch.device:
    """Return the device of the rank `local_rank` of its node, which sees `visible` GPUs.

    A launcher may show every rank all GPUs of the node (take the one of the local rank) or bind one to each rank (it is
    number 0 for each of them). More ranks than GPUs share them in turn; whether they may is `shared_gpus`' business.

    Raises:
        ConfigError: a GPU is demanded where torch sees none.

    """
    if kind == "cpu" or (kind == "auto" and visible == 0):
        return torch.device("cpu")
    if visible == 0:
        raise ConfigError(
            "device = 'cuda', but torch sees no GPU on this rank: check the driver, CUDA_VISIBLE_DEVICES and that "
            "torch was built with CUDA, or use device = 'auto'"
        )
    return torch.device("cuda", local_rank % visible)


def shared_gpus(uuids: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the GPUs that more than one rank uses, with these ranks; `uuids` holds one a rank, None without a GPU."""
    users: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids):
        if uuid is not None:
            users.setdefault(uuid, []).append(rank)
    return {uuid: ranks for uuid, ranks in users.items() if len(ranks) > 1}


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
