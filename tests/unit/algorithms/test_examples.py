"""The head of each method's file: what it must say, and its example, which runs as it stands."""

import inspect
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import small

import mpicomp
from mpicomp import algorithms, compression, topology
from mpicomp.algorithms import ALGORITHMS, AsynchronousAlgorithm
from mpicomp.exchange import loopback

EXAMPLE = re.compile(r"^In a script(?: \(.*\))?:\n\n((?:    .*\n){2}    .*)\Z", re.MULTILINE)


def head(kind):
    return inspect.getdoc(inspect.getmodule(ALGORITHMS[kind]))


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_example_trains(kind):
    found = EXAMPLE.search(head(kind))
    assert found, f"the docstring of {ALGORITHMS[kind].__module__} is to end by 'In a script:' and three lines"
    code = inspect.cleandoc("\n" + found[1])

    def run(world):
        model = small.network()
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        def train(gossip):
            for step in range(3):
                gossip.step(lambda step=step: loss_fn(model, small.batch(step, world.rank)))

        def loss_fn(model, batch):
            inputs, labels = batch
            return torch.nn.functional.cross_entropy(model(inputs), labels)

        names = {
            **vars(algorithms),
            **vars(compression),
            **vars(topology),
            "torch": torch,
            "mpicomp": SimpleNamespace(distribute=partial(mpicomp.distribute, world=world)),  # not that of mpiexec
            "model": model,
            "loss_fn": loss_fn,
            "batch": small.batch(0, world.rank),
            "train": train,
        }
        exec(code, names)
        gossip = names["gossip"]
        if isinstance(gossip.algorithm, AsynchronousAlgorithm) and not gossip.is_hub:
            gossip.finish()
        assert type(gossip.algorithm) is ALGORITHMS[kind]
        x = gossip.local.x
        assert x.isfinite().all()
        assert not torch.equal(x, before)

    loopback.run(1 if kind == "sgd" else 2, run)


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_head_has_equations_before_prose(kind):
    summary, *rest = head(kind).split("\n\n")
    assert re.match(r"[\w/ ,.+-]+: .*\.\Z", " ".join(summary.split())), summary
    assert any(block.startswith("    ") for block in rest[:2]), "the pseudo-code is to follow the summary"
    assert kind == "sgd" or "Wire: " in head(kind)
