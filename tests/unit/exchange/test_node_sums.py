"""What adds up inside nodes, from what ranks ask for and what they have."""

import pytest

from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.node_sums import Facts, agree_on_node_sums, backends, choose, describe

BOTH = frozenset({"nccl", "gloo"})


def ranks(wish, uuids, local_size=2, has=BOTH):
    return [Facts(wish, uuid, local_size, has) for uuid in uuids]


CPUS, GPUS = [None, None], ["GPU-a", "GPU-b"]


@pytest.mark.parametrize(
    ("everywhere", "expected"),
    [
        (ranks("auto", GPUS), "nccl"),
        (ranks("auto", GPUS, local_size=1), None),  # one rank a node
        (ranks("auto", CPUS), None),
        (ranks("auto", ["GPU-a", None]), None),  # a hub on the CPU
        (ranks("auto", ["GPU-a", "GPU-a"]), None),
        (ranks("auto", GPUS, has=frozenset({"gloo"})), None),
        (ranks("auto", GPUS)[:1] + ranks("auto", GPUS, has=frozenset())[1:], None),
        (ranks("auto", GPUS, local_size=1) + ranks("auto", ["GPU-c", "GPU-d"]), "nccl"),  # nodes of unequal size
        (ranks("mpi", GPUS), None),
        (ranks("nccl", GPUS), "nccl"),
        (ranks("nccl", GPUS, local_size=1), None),
        (ranks("gloo", CPUS), "gloo"),
        (ranks("gloo", CPUS, local_size=1), None),
    ],
)
def test_the_choice(everywhere, expected):
    assert choose(everywhere) == expected


@pytest.mark.parametrize(
    ("everywhere", "what"),
    [
        (
            ranks("nccl", CPUS),
            r"'nccl': NCCL needs a GPU on each rank, .* none on ranks 0, 1: .*node_sums=mpi",
        ),
        (ranks("nccl", ["GPU-a", None]), "none on rank 1: start"),
        (ranks("nccl", ["GPU-a", "GPU-b", "GPU-a"]), "ranks 0, 2 share GPU-a: start"),
        (ranks("nccl", GPUS, has=frozenset({"gloo"})), "torch has no NCCL on ranks 0, 1: install"),
        (ranks("gloo", CPUS, has=frozenset()), "torch has no gloo on ranks 0, 1: install"),
        (ranks("gloo", [None, "GPU-b"]), "gloo is for the CPU, and rank 1 on a GPU: take 'nccl'"),
        (ranks("mpi", CPUS)[:1] + ranks("gloo", CPUS)[1:], "node_sums = 'gloo' on rank 1, and 'mpi' on rank 0"),
        (ranks("ncll", GPUS), "'ncll' must be one of 'auto', 'mpi', 'nccl', 'gloo'"),
    ],
)
def test_what_ranks_cannot_have_is_refused(everywhere, what):
    with pytest.raises(ConfigError, match=what):
        choose(everywhere)


def test_ranks_agree():
    assert run(3, lambda world: agree_on_node_sums(world, "gloo", None)) == ["gloo"] * 3
    with pytest.raises(ConfigError, match=r"'mpi' on rank 1, and 'gloo' on rank 0.*\(on all ranks\)"):
        run(3, lambda world: agree_on_node_sums(world, "mpi" if world.rank else "gloo", None))


def test_a_torch_without_distributed_has_no_backends(monkeypatch):
    assert "gloo" in backends()
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    assert backends() == frozenset()


def test_reports_name_the_library():
    assert describe(None) == "MPI"
    assert describe("nccl") == "NCCL inside nodes, MPI between them"
