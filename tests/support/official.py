"""A small problem on four ranks, and what records the trajectories of the authors' published code on it.

No code of theirs is in this repository. `tests/data/official.npz` was recorded on 2026-11-28 with torch 2.13.0 on the
CPU, gloo, four processes, by

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/support/official.py CODE tests/data/official.npz

where the folder CODE holds files of two repositories of GitHub:

    AdaG_SGD    aparna-aketi/AdaG_SGD, commit a715d2a: distributed.py and gossiper.py of gossip_choco
    DEF         anxuthu/DEF, optimizers/Def.py and all_reducer.py of commit 2769148, optimizers/ef.py of 213fd5d

Whole and unchanged are distributed.py, gossiper.py, Def.py and ef.py. Five files of gossip_choco could not be had at
that commit. What ran in their place is of related code with the same interface; whether the missing files are equal to
it is not known:

    graph_manager.py, mixing_manager.py     Sakshi09Ch/CoDeC, commit d83578a, gossip_choco
    utils/helpers.py, utils/__init__.py     aparna-aketi/Low_Precision_DL, commit de87969, gossip_choco
    compressor.py                           epfml/ChocoSGD, commit c7715b3, dl_code/pcode/utils/sparsification.py

Classes, functions and docstrings that are not used here were left out of graph_manager.py, helpers.py, compressor.py
(which imports ``bit2byte``) and all_reducer.py.

What is replaced from outside, because that code needs GPUs and 1.5 GB of random numbers a rank: what it takes from
`torch.cuda`, the pinning of memory, how an edge of the graph greets its two ranks, the scattering of a batch, and the
generator of DEF's blocks, which begin where those of `PerTensorBlock` do.

AdaG_SGD runs in float64. In float32 ours differed from it by up to 1.2e-6 (CHOCO-SGD), 2e-5 (AdaG-SGD) and 3e-2 (with
quasi-global momentum) in 60 steps. That is rounding: float32 and float64 of one code differ as much, by up to 9e-7,
6e-3 and 3e-2. The reducer of DEF is written for float32.

No tensor has 20, 30, 40, ... entries. There the authors' top-k, ``int(n * (1 - 0.9))``, is one less than n / 10.
"""

import contextlib
import importlib
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing, nn

from mpicomp.compression.random import mix64

SIZE = 4
STEPS = 60
EVERY = 10
LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
RATIO = 0.1  # what is kept
CHOCO_GAMMA = 0.2
ADAGOSSIP_GAMMA = 0.02
DETACHMENT = 0.3


def network(dtype: torch.dtype) -> nn.Module:
    """Return the model of 43 parameters, the same on all ranks."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    start = torch.as_tensor(0.5 * np.sin(1.7 * np.arange(43) + 0.3), dtype=dtype)
    nn.utils.vector_to_parameters(start, model.parameters())
    return model


def loss_of(model: nn.Module, rank: int):
    """Return a function for the squared error of `model` on all samples of `rank`, which differ from rank to rank."""
    sample, feature, dtype = np.arange(1, 17)[:, None], np.arange(1, 7), next(model.parameters()).dtype
    inputs = torch.as_tensor(np.sin(0.9 * sample * feature + rank), dtype=dtype)
    targets = torch.as_tensor(np.cos(0.4 * sample * feature[1:4] + 2 * rank), dtype=dtype)
    return lambda: (model(inputs) - targets).square().mean()


def flat(tensors) -> np.ndarray:
    """Return a copy of the values of `tensors`, (43,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy().copy()


def recorded(step: int) -> bool:
    """Return whether the models are recorded after so many steps."""
    return step % EVERY == 0


def _import_adag(code: Path):
    """Import the wrapper, graph and weights of AdaG_SGD, to run on the CPU."""
    package = types.ModuleType("gossip_choco")  # __init__.py names graphs that are not needed
    package.__path__ = [str(code / "AdaG_SGD/gossip_choco")]
    sys.modules["gossip_choco"] = package

    class Stream:
        def wait_stream(self, stream):
            pass

        def synchronize(self):
            pass

    torch.cuda.LongTensor = torch.LongTensor
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.pin_memory = lambda tensor: tensor
    wrapper = importlib.import_module("gossip_choco.distributed").GossipDataParallel
    wrapper.scatter = lambda self, inputs, kwargs, devices: ([inputs], [kwargs])
    graphs = importlib.import_module("gossip_choco.graph_manager")

    def connect(edge, local_master_rank, dest, src, local_rank, devices):
        edge.dest, edge.src, edge.process_group = dest, src, distributed.new_group([src, dest])

    graphs.Edge.__init__ = connect
    return wrapper, graphs.RingGraph, importlib.import_module("gossip_choco.mixing_manager").UniformMixing


def _adag(modules, rank: int, nesterov: bool, **options) -> np.ndarray:
    """Train in the order of trainer.py of AdaG_SGD; return the models of `rank` (STEPS / EVERY, 43)."""
    wrapper, ring, mixing = modules
    torch.set_default_dtype(torch.float64)  # of the weights of the graph
    graph, device, inner = ring(rank, SIZE, 1, peers_per_itr=2), torch.device("cpu"), network(torch.float64)
    model = wrapper(
        inner,
        device_ids=[0],
        rank=rank,
        world_size=SIZE,
        graph=graph,
        mixing=mixing(graph, device),
        comm_device=device,
        compress_ratio=1 - RATIO,
        compress_fn="sparsify",
        compress_op="top_k",
        **options,
    )
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, nesterov=nesterov, weight_decay=WEIGHT_DECAY)
    loss, models = loss_of(model, rank), []
    model.train()
    for step in range(1, STEPS + 1):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.transfer_params(optimizer, lr=LR)
        if recorded(step):
            model.state_dict()  # ends the exchange, as the next forward pass would
            models.append(flat(inner.parameters()))
    torch.set_default_dtype(torch.float32)
    return np.stack(models)


class _BlockStarts:
    """In the place of numpy's generator: where `PerTensorBlock` with seed 0 begins its blocks."""

    def __init__(self, seed: int) -> None:
        self.calls = 0

    def randn(self, n: int) -> np.ndarray:
        return np.zeros(1)

    def choice(self, n: int) -> int:
        step, part = divmod(self.calls, 4)
        self.calls += 1
        return mix64(mix64(0, step) >> 1, part) % n


def _import_def(code: Path):
    """Import the optimizers of DEF, and their reducer of random blocks."""
    sys.path.insert(0, str(code / "DEF"))
    package = types.ModuleType("optimizers")
    package.__path__ = [str(code / "DEF/optimizers")]
    sys.modules["optimizers"] = package
    np.random.RandomState = _BlockStarts
    modules = [importlib.import_module(name) for name in ("optimizers.Def", "optimizers.ef", "all_reducer")]
    return modules[0].DEF, modules[1].EF, modules[2].URSB


def _def(kind, reducer, rank: int, **options) -> np.ndarray:
    """Train as main.py of DEF, and return the models of `rank` (STEPS / EVERY, 43).

    Of DEF itself (STEPS / EVERY, 2, 43): where gradients are taken, and the model of all ranks.
    """
    model = network(torch.float32)
    optimizer = kind(
        model.parameters(),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        reducer=reducer(0, torch.device("cpu"), compression=RATIO),
        **options,
    )
    loss, models = loss_of(model, rank), []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if recorded(step):
            point = flat(model.parameters())
            shared = [optimizer.state[p]["old"] for p in model.parameters() if "old" in optimizer.state[p]]
            models.append(np.stack([point, flat(shared)]) if shared else point)
    return np.stack(models)


def _record(rank: int, code: Path, folder: str) -> None:
    """Record all trajectories of one rank to a file of `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=SIZE)
    adag = _import_adag(code)
    detached, feedback, blocks = _import_def(code)
    adaptive = {"gamma": ADAGOSSIP_GAMMA, "ada_gamma": True}
    trajectories = {
        "choco": _adag(adag, rank, True, gamma=CHOCO_GAMMA),
        "adagossip": _adag(adag, rank, True, **adaptive),
        "adagossip_qgm": _adag(adag, rank, False, qgm=True, **adaptive),
        "ef_sgd": _def(feedback, blocks, rank, momentum=MOMENTUM),
        "def": _def(detached, blocks, rank, momentum=0.0, coeff=DETACHMENT),
        "def_momentum": _def(detached, blocks, rank, momentum=MOMENTUM, coeff=DETACHMENT),
    }
    np.savez(f"{folder}/{rank}.npz", **trajectories)
    distributed.barrier()


def main(code: str, path: str) -> None:
    """Write the trajectories of all ranks to `path`: (STEPS / EVERY, rank, ...) each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_record, (Path(code).resolve(), folder), nprocs=SIZE)
        ranks = [np.load(f"{folder}/{rank}.npz") for rank in range(SIZE)]
        np.savez_compressed(path, **{name: np.stack([each[name] for each in ranks], axis=1) for name in ranks[0]})


if __name__ == "__main__":
    main(*sys.argv[1:])
