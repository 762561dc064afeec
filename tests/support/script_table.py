"""What people do in training scripts, one row each, with its outcome: right, or refused with a message.

A row that is right gives the same parameters as its reference, bit for bit where the arithmetic is the same. Most rows
are written once, by the calls of `Form`, and come in three forms: the loop of a script of one's own, the same script
with a closure, and plain torch in one process on the batches of all ranks. The loop must equal the closure to the bit,
with a method of gossip and with one that adds up gradients; and `SSGD` in the loop must equal plain torch, up to
rounding, so that a fault of both forms shows as well.

`tests/unit/replica/test_scripts.py` runs the table over the loopback, `tests/mpi/test_scripts.py` over MPI. What ends
a job, such as ranks that wait for one that does not come, is in `tests/end_to_end/test_scripts.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.methods import graph_for
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mpicomp.algorithms import (
    DEFATC,
    DPSGD,
    EFSGD,
    GMC,
    SSGD,
    Choco,
    DeMo,
    DiLoCo,
    EfficientAdam,
    FedAdamSSM,
    LocalSGD,
    NoLoCo,
    OneBitAdam,
    SketchedAMSGrad,
    SparseLoCo,
    StreamingDiLoCo,
)
from mpicomp.compression import RandomBlock, SignNorm, TopK, allocate
from mpicomp.errors import ConfigError, DivergenceError, MpicompError
from mpicomp.replica.clipping import Clip
from mpicomp.replica.consistency import require_same_model
from mpicomp.replica.distribute import distribute
from mpicomp.replica.several_optimizers import SeveralOptimizers
from mpicomp.state import TORCH_GENERATOR
from mpicomp.topology import RandomMatching, complete, ring

STEPS = 4
GOSSIP = Choco(0.2, TopK(0.3), overlap=True)
SUM = EFSGD(TopK(0.3))
METHODS = {"gossip": GOSSIP, "sum": SUM}
ANCHORED = {
    "diloco": DiLoCo(2),
    "streaming_diloco": StreamingDiLoCo(2, fragments=2),
    "noloco": NoLoCo(2),
    "sparse_loco": SparseLoCo(TopK(0.3), period=2),
    "fedadam_ssm": FedAdamSSM(TopK(0.3), period=2),
    "def_atc": DEFATC(0.2, TopK(0.3)),
    "local_def_atc": LocalSGD(2, DEFATC(0.2, TopK(0.3))),
    "gmc": GMC(TopK(0.3)),
    "gmc_plus": GMC(TopK(0.3), detachment=0.3),
}


@dataclass(frozen=True)
class Row:
    """One script.

    Attributes:
        name: what is done.
        script: does it; gets the world, and returns tensors to be compared.
        equals: the script that must give the same.
        tolerance: how far entries may be apart, relative and absolute; None for equal bits.
        refused: the expression that the message of the error must match, if it is to be refused.
        error: the class of that error.
        ranks: how many ranks it needs.
        origin: where people were seen to do it: repository and number of the thread.

    """

    name: str
    script: Callable[[Any], Any]
    equals: Callable[[Any], Any] | None = None
    tolerance: float | None = None
    refused: str | None = None
    error: type[Exception] = MpicompError
    ranks: int = 1
    origin: str = ""

    def check(self, world) -> None:
        """Run the script, and its reference, on this rank."""
        if self.refused is not None:
            with pytest.raises(self.error, match=self.refused):
                self.script(world)
            return
        ours, theirs = self.script(world), self.equals(world)
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        if self.tolerance is None:
            assert torch.equal(ours, theirs), float((ours - theirs).abs().max())
        else:
            torch.testing.assert_close(ours, theirs, rtol=self.tolerance, atol=self.tolerance)


TABLE: list[Row] = []


@dataclass
class Form:
    """The calls by which a script trains.

    Attributes:
        kind: "loop", "closure" or "torch".

    """

    world: Any
    algorithm: Any
    kind: str
    gossip: Any = None
    optimizer: Any = None
    losses: list[float] = field(default_factory=list)

    def begin(self, model, optimizer) -> None:
        """Distribute."""
        self.optimizer = optimizer
        if self.kind != "torch":
            self.gossip = distribute(model, optimizer, self.algorithm, ring, world=self.world)
            self.optimizer = self.gossip.optimizer

    def step(self, loss) -> None:
        """Train by one batch; `loss` is a function."""
        if self.kind == "closure":
            self.losses.append(float(self.gossip.step(loss)))
            return
        value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(value.detach()))

    def batches(self, steps=STEPS):
        """Those of this rank, or of all ranks in plain torch."""
        ranks = range(self.world.size) if self.kind == "torch" else [self.world.rank]
        for step in range(steps):
            parts = [batch(rank, step) for rank in ranks]
            yield tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def in_all_forms(origin="", torch_too=True, methods=METHODS, ranks=1):
    """Put a script that takes a `Form` into the table."""

    def add(script):
        def of(kind, algorithm):
            return lambda world: script(Form(world, algorithm, kind))

        name = script.__name__
        for method, algorithm in methods.items():
            row = Row(f"{name}-{method}", of("loop", algorithm), of("closure", algorithm))
            TABLE.append(_completed(row, origin, ranks))
        if torch_too:  # summed by MPI in an order of its own, and by torch over one large batch
            row = Row(f"{name}-torch", of("loop", SSGD()), of("torch", None), tolerance=2e-5)
            TABLE.append(_completed(row, origin, ranks))
        return script

    return add


def right(equals, origin="", tolerance=None, methods=METHODS, ranks=1):
    """Put a script that takes a world and an algorithm into the table, with one that it must equal."""

    def add(script):
        for method, algorithm in methods.items():
            row = Row(
                f"{script.__name__}-{method}",
                lambda world, a=algorithm: script(world, a),
                lambda world, a=algorithm: equals(world, a),
                tolerance,
            )
            TABLE.append(_completed(row, origin, ranks))
        return script

    return add


def refused(message, origin="", error=ConfigError, methods=None, ranks=1):
    """Put a script that takes a world and an algorithm into the table, to be refused with `message` on all ranks."""

    def add(script):
        for method, algorithm in (methods or {"gossip": GOSSIP}).items():
            row = Row(
                f"{script.__name__}-{method}",
                lambda world, a=algorithm: script(world, a),
                refused=message,
                error=error,
            )
            TABLE.append(_completed(row, origin, ranks))
        return script

    return add


def _completed(row, origin, ranks):
    return Row(**{**vars(row), "origin": origin, "ranks": ranks})


def params():
    """Return the table for `pytest.mark.parametrize`."""
    return [pytest.param(row, id=row.name) for row in TABLE]


# ---- what the scripts are made of


def seeded(model, seed=0):
    """Give the parameters values that no thread draws from a common generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def small(*between):
    """Return a model of two layers."""
    return seeded(nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 3)))


def batch(rank, step):
    """Return 8 inputs and labels."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(3, (8,), generator=generator)
    centers = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    return centers[labels] + 0.3 * torch.randn(8, 6, generator=generator), labels


def loss_of(model, pair):
    """Return the loss of a batch."""
    inputs, labels = pair
    return nn.functional.cross_entropy(model(inputs).float(), labels)


def flat(model):
    """Return all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def plain(world, algorithm, steps=STEPS):
    """The reference of rows that end up where the closure does."""
    form = Form(world, algorithm, "closure")
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches(steps):
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


def begun(world, algorithm, model=None, optimizer=None):
    """Return a model, its optimizer, and both distributed."""
    model = model or small()
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    return model, optimizer, distribute(model, optimizer, algorithm, graph_for(algorithm), world=world)


def own_batches(world, steps=STEPS):
    """Return the batches of this rank."""
    return [batch(world.rank, step) for step in range(steps)]


# ---- zero_grad, backward, closures


@right(plain)
def zero_grad_before_the_forward_pass(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.optimizer.zero_grad()
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain, origin="pytorch/pytorch#175024")
def zero_grad_between_forward_and_backward(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss = loss_of(model, pair)
        gossip.optimizer.zero_grad()
        loss.backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain)
def zero_grad_of_the_own_optimizer(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        optimizer.zero_grad()
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain)
def zero_grad_in_place(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain)
def zero_grad_of_the_model(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        model.zero_grad()
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain)
def gradients_set_to_none_by_hand(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        for p in model.parameters():
            p.grad = None
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


def never_zeroed_in_torch(world, _):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.02)
    for pair in Form(world, None, "torch").batches():
        loss_of(model, pair).backward()
        optimizer.step()
    return flat(model)


@right(never_zeroed_in_torch, tolerance=2e-5, methods={"torch": SSGD()})  # rounding of the sum over ranks
def zero_grad_never(world, algorithm):
    model = small()
    _, _, gossip = begun(world, algorithm, model, SGD(model.parameters(), lr=0.02))
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


@right(plain)
def a_closure_that_zeroes_and_goes_backward(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    for pair in own_batches(world):

        def closure(pair=pair):
            optimizer.zero_grad()
            loss = loss_of(model, pair)
            loss.backward()
            return loss

        gossip.optimizer.step(closure)
    return flat(model)


@right(plain)
def a_closure_that_returns_none(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair).backward())
    return flat(model)


@right(plain)
def a_closure_that_returns_a_number(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):

        def closure(pair=pair):
            loss = loss_of(model, pair)
            loss.backward()
            return loss.item()

        gossip.step(closure)
    return flat(model)


@refused("the closure returned NoneType")
def a_closure_that_forgets_the_loss(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)) and None)


@refused("the closure returned tuple")
def a_closure_that_returns_loss_and_outputs(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: (loss_of(model, batch(world.rank, 0)), "outputs"))


@right(plain)
def gradients_from_autograd_grad(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gradients = torch.autograd.grad(loss_of(model, pair), list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        gossip.optimizer.step()
    return flat(model)


@right(plain, origin="pytorch/pytorch#65907")
def gradients_from_autograd_grad_in_a_closure(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):

        def closure(pair=pair):
            loss = loss_of(model, pair)
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g
            return loss

        gossip.step(closure)
    return flat(model)


def adversarial_inputs(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for inputs, labels in own_batches(world):
        moved = inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model, (moved, labels)), moved)
        pair = inputs + 0.1 * gradient.sign(), labels
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


def _adversarial_row(name, clear):
    def script(world, algorithm):
        model, optimizer, gossip = begun(world, algorithm)
        for inputs, labels in own_batches(world):

            def closure(inputs=inputs, labels=labels):
                moved = inputs.clone().requires_grad_()
                loss_of(model, (moved, labels)).backward()
                clear(model, optimizer, gossip)
                return loss_of(model, (inputs + 0.1 * moved.grad.sign(), labels))

            gossip.step(closure)
        return flat(model)

    script.__name__ = f"adversarial_inputs_in_a_closure_and_zero_grad_of_{name}"
    right(adversarial_inputs)(script)


_adversarial_row("the_model", lambda model, *_: model.zero_grad())
_adversarial_row("the_own_optimizer", lambda _, optimizer, __: optimizer.zero_grad())
_adversarial_row("the_distributed_optimizer", lambda _, __, gossip: gossip.optimizer.zero_grad())


def two_losses_of(model, pair):
    return loss_of(model, pair), 0.1 * model(2 * pair[0]).square().mean()


@refused("has run a backward pass, but not that of the loss that it returned", methods=METHODS)
def a_closure_that_goes_backward_from_another_loss(world, algorithm):
    model, _, gossip = begun(world, algorithm)

    def closure():
        loss, other = two_losses_of(model, batch(world.rank, 0))
        other.backward()
        return loss

    gossip.step(closure)


def the_sum_of_two_losses(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: sum(two_losses_of(model, pair)))
    return flat(model)


@right(the_sum_of_two_losses, tolerance=1e-5)  # gradients are added in another order
def a_closure_that_goes_backward_twice(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):

        def closure(pair=pair):
            losses = two_losses_of(model, pair)
            for loss in losses:
                loss.backward()
            return sum(losses)

        gossip.step(closure)
    return flat(model)


@refused("would train this rank alone: call gossip.optimizer.step", methods=METHODS)
def step_of_the_own_optimizer(world, algorithm):
    model, optimizer, _ = begun(world, algorithm)
    loss_of(model, batch(world.rank, 0)).backward()
    optimizer.step()


@refused("would train this rank alone", origin="huggingface/accelerate#690")
def step_of_the_own_optimizer_by_a_scaler(world, algorithm):
    model, optimizer, _ = begun(world, algorithm)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(world.rank, 0))).backward()
    scaler.step(optimizer)


@in_all_forms(origin="pytorch/pytorch#22095")
def two_forward_passes_before_a_backward(form):
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair) + 0.1 * model(2 * pair[0]).square().mean())
    return flat(model)


@right(plain)
def two_backward_passes_before_a_step(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss = loss_of(model, pair)
        (0.5 * loss).backward(retain_graph=True)
        (0.5 * loss).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
    return flat(model)


@refused("modified by an inplace operation", error=RuntimeError, methods={**METHODS, "adam": EfficientAdam(TopK(0.3))})
def backward_through_a_graph_from_before_the_step(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    loss = loss_of(model, batch(world.rank, 0))
    loss.backward(retain_graph=True)
    gossip.optimizer.step()
    loss.backward()


@right(plain)
def calling_forward_itself(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss_of(model.forward, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
    return flat(model)


# ---- accumulation and clipping


def by_micro_batches(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    batches = iter(own_batches(world, 6))
    for _ in range(2):
        gossip.step(lambda: loss_of(model, next(batches)), micro_batches=3)
    return flat(model)


# Sums of thirds, and a third of the sum.
@right(by_micro_batches, tolerance=1e-5, origin="huggingface/accelerate#1170")
def accumulation_by_the_loop(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for step, pair in enumerate(own_batches(world, 6)):
        (loss_of(model, pair) / 3).backward()
        if step % 3 == 2:
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
    return flat(model)


@right(by_micro_batches, origin="meituan-longcat/LongCat-Image#46")
def zero_grad_in_each_micro_batch(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    batches = iter(own_batches(world, 6))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        loss.backward()
        return loss

    for _ in range(2):
        gossip.step(closure, micro_batches=3)
    return flat(model)


@refused("micro_batches = 0 must be at least 1")
def no_micro_batch(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)), micro_batches=0)


def clipped_in_the_closure(clip):
    def script(world, algorithm):
        model, _, gossip = begun(world, algorithm)
        for pair in own_batches(world):

            def closure(pair=pair):
                loss = loss_of(model, pair)
                loss.backward()
                clip(model.parameters())
                return loss

            gossip.step(closure)
        return flat(model)

    return script


def by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.05)


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)


@right(clipped_in_the_closure(by_norm), origin="huggingface/accelerate#641, horovod/horovod#1346")
def clip_grad_norm_before_the_step(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.optimizer.zero_grad()
        loss_of(model, pair).backward()
        by_norm(model.parameters())
        gossip.optimizer.step()
    return flat(model)


@right(clipped_in_the_closure(by_value), origin="horovod/horovod#1099")
def clip_grad_value_before_the_step(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.optimizer.zero_grad()
        loss_of(model, pair).backward()
        by_value(model.parameters())
        gossip.optimizer.step()
    return flat(model)


@right(clipped_in_the_closure(by_value))
def gradients_given_other_memory_in_the_loop(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.optimizer.zero_grad()
        loss_of(model, pair).backward()
        for p in model.parameters():
            p.grad.data = p.grad.data.clamp(-0.01, 0.01)
        gossip.optimizer.step()
    return flat(model)


def by_value_in_other_memory(parameters):
    for p in parameters:
        p.grad.data = p.grad.data.clamp(-0.01, 0.01)


@right(clipped_in_the_closure(by_value))
def gradients_given_other_memory_in_a_closure(world, algorithm):
    return clipped_in_the_closure(by_value_in_other_memory)(world, algorithm)


@in_all_forms(torch_too=False)  # clamped on each rank, or once: not the same
def a_hook_on_a_gradient(form):
    model = small()
    model[0].weight.register_hook(lambda g: 0.5 * g)
    form.begin(model, SGD(model.parameters(), lr=0.1))
    model[2].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


# ---- parameter groups and optimizers


@in_all_forms()
def muon_for_matrices_and_adamw_for_the_rest(form):
    model = small()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    muon = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02, weight_decay=0.01)
    pair = [muon, AdamW(vectors, lr=0.01)]
    form.begin(model, SeveralOptimizers(pair) if form.kind == "torch" else pair)
    for batch_pair in form.batches():
        form.step(lambda pair=batch_pair: loss_of(model, pair))
    return flat(model)


@in_all_forms(torch_too=True)
def groups_with_their_own_rates(form):
    model = small()
    groups = [{"params": model[2].parameters(), "lr": 0.3}, {"params": model[0].parameters()}]
    form.begin(model, SGD(groups, lr=0.03, momentum=0.9))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms(methods={"sum": SUM, "adam": EfficientAdam(TopK(0.3))})
def a_group_with_rate_zero_stays(form):
    model = small()
    groups = [{"params": model[2].parameters(), "lr": 0.0}, {"params": model[0].parameters()}]
    form.begin(model, SGD(groups, lr=0.03))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert torch.equal(flat(model[2]), flat(small()[2])) and not torch.equal(flat(model[0]), flat(small()[0]))
    return flat(model)


@in_all_forms(methods={**METHODS, "adam": EfficientAdam(TopK(0.3))})
def no_weight_decay_for_biases(form):
    model = small()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    form.begin(model, SGD(groups, lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms()
def named_parameters_for_the_optimizer(form):
    model = small()
    form.begin(model, SGD(model.named_parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


def _optimizer_row(name, make):
    def script(form):
        model = small()
        form.begin(model, make(model.parameters()))
        for pair in form.batches():
            form.step(lambda pair=pair: loss_of(model, pair))
        return flat(model)

    script.__name__ = f"optimizer_{name}"
    in_all_forms()(script)


for _name, _make in {
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adam_fused": lambda p: Adam(p, lr=1e-2, eps=1e-3, fused=True),
    "adam_foreach": lambda p: Adam(p, lr=1e-2, eps=1e-3, foreach=True),
    "sgd_nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd_fused": lambda p: SGD(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "maximize": lambda p: SGD(p, lr=0.01, maximize=True),
    "rate_as_a_tensor": lambda p: SGD(p, lr=torch.tensor(0.1)),
}.items():
    _optimizer_row(_name, _make)


@refused("maximize = True: EfficientAdam makes a part of its steps by itself, or all of them")
def adam_of_the_method_is_to_maximize(world, _):
    model = small()
    _, _, gossip = begun(world, EfficientAdam(TopK(0.3)), model, SGD(model.parameters(), lr=0.1, maximize=True))
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused("LBFGS computes several gradients a step")
def lbfgs(world, algorithm):
    model = small()
    begun(world, algorithm, model, torch.optim.LBFGS(model.parameters()))


@refused("SparseAdam takes sparse gradients only", origin="pytorch/pytorch#101370")
def sparse_adam(world, algorithm):
    model = nn.Embedding(5, 3, sparse=True)
    begun(world, algorithm, model, torch.optim.SparseAdam(model.parameters()))


@refused("optimizer.momentum = 0.9")
def momentum_for_a_method_with_its_own(world, _):
    model = small()
    begun(world, EfficientAdam(TopK(0.3)), model, SGD(model.parameters(), lr=0.1, momentum=0.9))


OWN_STEPS = {
    method.name: method for method in (DeMo(), FedAdamSSM(), SketchedAMSGrad(8, 4), EfficientAdam(), OneBitAdam())
}
NEEDS_SGD = r" makes the direction of its steps by itself, .* Use optimizer.kind = 'sgd' \(torch.optim.SGD\)"


@refused("optimizer.kind = 'RMSprop': [A-Za-z-]+" + NEEDS_SGD, methods=OWN_STEPS)
def rmsprop_for_a_method_with_steps_of_its_own(world, algorithm):
    model = small()
    begun(world, algorithm, model, torch.optim.RMSprop(model.parameters(), lr=0.1))


@refused("optimizer.kind = 'Adagrad': [A-Za-z-]+" + NEEDS_SGD, methods=OWN_STEPS)
def adagrad_for_a_method_with_steps_of_its_own(world, algorithm):
    model = small()
    begun(world, algorithm, model, torch.optim.Adagrad(model.parameters(), lr=0.1))


@refused("parameters that are not the model's")
def the_optimizer_of_another_model(world, algorithm):
    begun(world, algorithm, small(), SGD(small().parameters(), lr=0.1))


@refused("the optimizer does not hold: 0.weight, 0.bias")
def the_optimizer_of_a_part_of_the_model(world, algorithm):
    model = small()
    begun(world, algorithm, model, SGD(model[2].parameters(), lr=0.1))


@refused("parameters that are not the model's: number 4 of group 0")
def a_loss_with_parameters_of_its_own(world, algorithm):
    model, temperature = small(), nn.Parameter(torch.ones(()))
    begun(world, algorithm, model, SGD([*model.parameters(), temperature], lr=0.1))


@in_all_forms(origin="horovod/horovod#1417")
def one_optimizer_for_two_models(form):
    encoder, decoder = small(), seeded(nn.Linear(3, 3), 1)
    both = nn.ModuleList([encoder, decoder])
    form.begin(both, SGD(both.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(lambda inputs: decoder(encoder(inputs)), pair))
    return flat(both)


# ---- schedulers


def _scheduler_rows(name, make, after_step=lambda scheduler, _: scheduler.step()):
    for where in ("before", "own", "distributed"):

        def script(form, where=where):
            model = small()
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
            if where == "before":
                scheduler = make(optimizer)
            form.begin(model, optimizer)
            if where != "before":
                scheduler = make(form.optimizer if where == "distributed" else optimizer)
            for pair in form.batches():
                form.step(lambda pair=pair: loss_of(model, pair))
                after_step(scheduler, form)
            return flat(model)

        script.__name__ = f"{name}_{where}"
        in_all_forms(origin="huggingface/accelerate#690, ThilinaRajapakse/simpletransformers#107")(script)


_scheduler_rows("step_lr", lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.1))
_scheduler_rows("one_cycle", lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS + 1))
_scheduler_rows("warmup_from_zero", lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / 2)))


def _mean_loss(scheduler, form):
    losses = form.world.all_gather(form.losses[-1])
    scheduler.step(sum(losses) / len(losses))


_scheduler_rows(
    "plateau",
    lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0),
    _mean_loss,
)


# ---- state dicts


@in_all_forms(origin="pytorch/vision#2142")
def the_model_is_loaded_after_distribute(form):
    model, stored = small(), seeded(small(), 7).state_dict()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    model.load_state_dict(stored)
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@refused("the model was loaded .* Load pretrained weights before mpicomp.distribute", methods=ANCHORED)
def the_model_is_loaded_after_distribute_with_an_anchor(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))
    model[0].load_state_dict(seeded(small(), 7)[0].state_dict())
    gossip.step(lambda: loss_of(model, batch(world.rank, 1)))


def clamped(world, algorithm, evaluate=lambda model, gossip: None):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
        evaluate(model, gossip)
    return flat(model)


@right(clamped, methods={**METHODS, **ANCHORED})
def other_weights_are_loaded_for_an_evaluation(world, algorithm):
    def evaluate(model, gossip):
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(seeded(small(), 7).state_dict())
        with gossip.averaged() as averaged:
            assert torch.equal(averaged[0].weight, seeded(small(), 7)[0].weight) or world.size > 2  # rounding
            model.load_state_dict(own)
        model.load_state_dict(own)

    return clamped(world, algorithm, evaluate)


@right(clamped, methods={**METHODS, **ANCHORED}, origin="lucidrains/ema-pytorch#9")
def other_weights_are_swapped_in_for_an_evaluation(world, algorithm):
    other = seeded(small(), 7)

    def evaluate(model, gossip):
        own = [p.data for p in model.parameters()]
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = q.data
        with gossip.averaged():
            torch.testing.assert_close(flat(model), flat(seeded(small(), 7)))
        assert torch.equal(flat(model), flat(seeded(small(), 7)))
        for p, values in zip(model.parameters(), own, strict=True):
            p.data = values

    return clamped(world, algorithm, evaluate)


@in_all_forms(origin="megvii-research/video_analyst#85")
def the_optimizer_is_loaded_after_distribute(form):
    model = small()
    form.begin(model, Adam(model.parameters(), lr=1e-2, eps=1e-3))
    for pair in form.batches(2):
        form.step(lambda pair=pair: loss_of(model, pair))
    stored = copy.deepcopy(form.optimizer.state_dict())
    stored["param_groups"][0]["lr"] = 3e-2
    form.optimizer.load_state_dict(stored)
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms()
def a_stop_and_a_restart_by_state_dicts(form):
    file = io.BytesIO()
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    for pair in form.batches(2):
        form.step(lambda pair=pair: loss_of(model, pair))
    torch.save({"model": model.state_dict(), "optimizer": form.optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file)
    model = small()
    model.load_state_dict(stored["model"])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(stored["optimizer"])
    form.begin(model, optimizer)
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@refused("trainable parameters since mpicomp.distribute.*: 0.weight")
def the_model_is_loaded_by_assigning(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    model.load_state_dict(small().state_dict(), assign=True)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused("in the middle of a step")
def saving_in_the_middle_of_a_step(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    loss_of(model, batch(world.rank, 0)).backward()
    with tempfile.TemporaryDirectory() as folder:
        gossip.save(world.broadcast(folder))


# ---- frozen layers


@in_all_forms(methods={**METHODS, "adam": EfficientAdam(TopK(0.3)), "momentum": EFSGD(TopK(0.3), momentum=0.9)})
def a_layer_frozen_from_the_start(form):
    model = small()
    model[0].requires_grad_(False)
    form.begin(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert torch.equal(flat(model[0]), flat(small()[0]))
    return flat(model)


@in_all_forms()
def a_frozen_layer_that_the_optimizer_does_not_hold(form):
    model = small()
    model[0].requires_grad_(False)
    form.begin(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert torch.equal(flat(model[0]), flat(small()[0]))
    return flat(model)


@in_all_forms(
    origin="NVIDIA/apex#46, JDAI-CV/fast-reid#178",
    methods={**METHODS, "adam": EfficientAdam(TopK(0.3)), "momentum": EFSGD(TopK(0.3), momentum=0.9)},
)
def a_layer_frozen_in_the_middle(form):
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    model[0].requires_grad_(False)
    before = flat(model[0])
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert torch.equal(flat(model[0]), before)
    return flat(model)


@in_all_forms(origin="NVIDIA/apex#46")
def a_layer_thawed_later(form):
    model = small()
    model[0].requires_grad_(False)
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    model[0].requires_grad_(True)
    before = flat(model[0])
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert not torch.equal(flat(model[0]), before)
    return flat(model)


@refused("trainable parameters that the optimizer does not hold|trainable parameters since mpicomp.distribute")
def a_layer_thawed_that_the_optimizer_does_not_hold(world, algorithm):
    model = small()
    model[0].requires_grad_(False)
    _, _, gossip = begun(world, algorithm, model, SGD(model[2].parameters(), lr=0.1))
    model[0].requires_grad_(True)
    for step in range(51):
        gossip.step(lambda step=step: loss_of(model, batch(world.rank, step)))


@refused("trainable parameters since mpicomp.distribute.*: 3.weight, 3.bias")
def a_layer_added_later(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))
    model.append(nn.Linear(3, 3))
    for step in range(51):
        gossip.step(lambda step=step: loss_of(model, batch(world.rank, step)))


@refused("parameter group cannot be added after mpicomp.distribute")
def a_layer_added_later_with_its_group(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    model.append(nn.Linear(3, 3))
    gossip.optimizer.add_param_group({"params": model[3].parameters()})


@refused(r"the optimizer has got parameters of shapes \[\(3, 3\), \(3,\)\]")
def a_layer_added_later_with_a_group_of_the_own_optimizer(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[3].parameters()})
    loss_of(model, batch(world.rank, 0)).backward()
    gossip.optimizer.step()


# ---- types, memory, places


def _conversion_row(name, convert, dtype):
    def script(world, algorithm):
        model, _, gossip = begun(world, algorithm)
        convert(model)
        gossip.step(lambda: model(torch.ones(2, 6, dtype=dtype)).sum())

    script.__name__ = f"the_model_is_made_{name}_after_distribute"
    refused(rf"parameter '0.weight' is {dtype} .* and was torch.float32")(script)


_conversion_row("half", lambda model: model.half(), torch.float16)
_conversion_row("double", lambda model: model.double(), torch.float64)
_conversion_row("bfloat16", lambda model: model.to(torch.bfloat16), torch.bfloat16)


@refused("trainable parameters since mpicomp.distribute.*: 0.weight", methods=METHODS)
def the_model_is_moved_after_distribute(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    model.to("meta")
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused("meta.*(to_empty|materialize)", origin="pytorch/pytorch#123424")
def a_model_on_the_meta_device(world, algorithm):
    with torch.device("meta"):
        model = nn.Linear(6, 3)
    begun(world, algorithm, model)


@refused("parameters have no shape yet: weight, bias", origin="meta-pytorch/torchrec#740")
def a_lazy_module(world, algorithm):
    begun(world, algorithm, nn.LazyLinear(3))


@in_all_forms()
def new_memory_by_assigning_data(form):
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for step, pair in enumerate(form.batches()):
        if step == 2:
            model[2].weight.data = 0.5 * model[2].weight.data
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms(torch_too=False)
def weights_are_normalized_in_place(form):
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
        with torch.no_grad():
            model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))
    return flat(model)


@in_all_forms()
def convolutions_in_channels_last(form):
    model = seeded(
        nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    )
    model.to(memory_format=torch.channels_last)
    form.begin(model, SGD(model.parameters(), lr=0.1))
    model.to(memory_format=torch.channels_last)
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


def mixed_types():
    """Return bfloat16 layers with a norm in float32 between, and casts."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 8).bfloat16()
            self.norm = nn.LayerNorm(8)
            self.last = nn.Linear(8, 3).bfloat16()

        def forward(self, x):
            return self.last(self.norm(self.first(x.bfloat16()).float()).bfloat16())

    return seeded(Mixed())


@in_all_forms(torch_too=False)
def norms_in_float32_of_a_bfloat16_model(form):
    model = mixed_types()
    form.begin(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])


@in_all_forms(torch_too=False)
def a_model_in_bfloat16(form):
    model = small().bfloat16()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for inputs, labels in form.batches():
        pair = inputs.bfloat16(), labels
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


# ---- mixed precision


def _autocast_row(dtype):
    def script(form):
        model = small()
        form.begin(model, SGD(model.parameters(), lr=0.1))

        def loss(pair):
            with torch.autocast("cpu", dtype):
                return loss_of(model, pair)

        for pair in form.batches():
            form.step(lambda pair=pair: loss(pair))
        return flat(model)

    script.__name__ = f"autocast_{str(dtype).removeprefix('torch.')}"
    in_all_forms(torch_too=False)(script)


_autocast_row(torch.bfloat16)
_autocast_row(torch.float16)


def scaled_by_hand(clip=lambda parameters: None, skipped=lambda rank, step: False):
    """Reference for a scaler: the loss times 1024, and the gradients divided by it."""

    def script(world, algorithm):
        model, _, gossip = begun(world, algorithm)
        for step, pair in enumerate(own_batches(world)):

            def closure(step=step, pair=pair):
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(model, pair)
                (1024 * loss).backward()
                for p in model.parameters():
                    p.grad.div_(1024)
                    if skipped(world.rank, step):
                        p.grad.zero_()
                clip(model.parameters())
                return loss

            gossip.step(closure)
        return flat(model)

    return script


def scaled(world, algorithm, clip=None, overflow=lambda rank, step: False):
    """Train with a scaler."""
    model, _, gossip = begun(world, algorithm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=1 - 2**-50)
    for step, pair in enumerate(own_batches(world)):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, pair)
        scaler.scale(loss * (float("inf") if overflow(world.rank, step) else 1.0)).backward()
        if clip is not None:
            scaler.unscale_(gossip.optimizer)
            clip(model.parameters())
        scaler.step(gossip.optimizer)
        scaler.update()
        gossip.optimizer.zero_grad()
    assert gossip.steps == STEPS
    return flat(model)


@right(scaled_by_hand())
def a_grad_scaler(world, algorithm):
    return scaled(world, algorithm)


@right(scaled_by_hand(by_norm), origin="huggingface/accelerate#88")
def unscale_then_clip_then_step(world, algorithm):
    return scaled(world, algorithm, by_norm)


def on_rank_1(rank, step):
    return (rank, step) == (1, 2)


# A gradient of zero is no step for SGD without momentum and weight decay.
@right(
    scaled_by_hand(skipped=on_rank_1),
    origin="facebookresearch/fairscale#179, dylanyunlon/Neuron_SP#2, learning-at-home/hivemind#389",
)
def an_overflow_on_one_rank(world, algorithm):
    return scaled(world, algorithm, overflow=on_rank_1)


@right(scaled_by_hand(skipped=on_rank_1, clip=by_norm))
def an_overflow_on_one_rank_with_clipping(world, algorithm):
    return scaled(world, algorithm, by_norm, on_rank_1)


@right(scaled_by_hand(skipped=lambda rank, step: step == 2))
def an_overflow_on_all_ranks(world, algorithm):
    return scaled(world, algorithm, overflow=lambda rank, step: step == 2)


def scaled_by_powers(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@right(scaled_by_powers, origin="pytorch/pytorch#136009")
def another_scale_on_each_rank(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + 3 * world.rank))
    for pair in own_batches(world):
        scaler.scale(loss_of(model, pair)).backward()
        scaler.step(gossip.optimizer)
        scaler.update()
        gossip.optimizer.zero_grad()
    return flat(model)


# ---- kinds of models


class Tied(nn.Module):
    """An embedding that is the last layer too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(x + self.embedding.weight.mean(0)))


@in_all_forms(origin="huggingface/accelerate#138")
def weights_that_are_tied(form):
    model = seeded(Tied())
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    assert model.head.weight is model.embedding.weight
    return flat(model)


@refused("lost parameters since mpicomp.distribute.*: 2.weight")
def weights_tied_after_distribute(world, algorithm):
    model = seeded(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    _, _, gossip = begun(world, algorithm, model)
    model[2].weight = model[0].weight
    gossip.step(lambda: model(torch.ones(2, 6)).sum())


@refused("0.weight and 2.weight", origin="huggingface/accelerate#1000")
def weights_tied_by_their_memory(world, algorithm):
    model = seeded(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    model[2].weight.data = model[0].weight.data.T
    begun(world, algorithm, model)


@in_all_forms(torch_too=False, origin="open-mmlab/mmdetection#2539")
def batch_norm(form):
    model = small(nn.BatchNorm1d(8))
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return torch.cat([flat(model), model[1].running_mean, model[1].running_var])


@in_all_forms()
def batch_norm_in_evaluation_mode(form):
    model = small(nn.BatchNorm1d(8)).eval()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms(torch_too=False)
def dropout(form):
    model = small(nn.Dropout(0.5))
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for step, pair in enumerate(form.batches()):

        def loss(step=step, pair=pair):
            torch.manual_seed(10 * step + form.world.rank)
            return loss_of(model, pair)

        form.step(loss)
    return flat(model)


@in_all_forms(origin="pytorch/pytorch#43259, Lightning-AI/pytorch-lightning#20866")
def a_branch_that_not_every_step_uses(form):
    model = nn.ModuleList([small(), seeded(nn.Linear(6, 3), 1)])
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for step, pair in enumerate(form.batches()):
        form.step(lambda step=step, pair=pair: loss_of(model[step % 2], pair))
    return flat(model)


@right(lambda world, algorithm: branch_per_rank(Form(world, algorithm, "closure")), origin="pytorch/pytorch#89716")
def a_branch_that_not_every_rank_uses(world, algorithm):
    return branch_per_rank(Form(world, algorithm, "loop"))


def branch_per_rank(form):
    model = nn.ModuleList([small(), seeded(nn.Linear(6, 3), 1)])
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for step, pair in enumerate(form.batches()):
        form.step(lambda step=step, pair=pair: loss_of(model[(step + form.world.rank) % 2], pair))
    return flat(model)


@in_all_forms(origin="pytorch/pytorch#22037")
def an_embedding_with_sparse_gradients(form):
    model = seeded(nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 3)))
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for _, labels in form.batches():
        form.step(lambda labels=labels: loss_of(model, (labels, labels)))
    return flat(model)


@in_all_forms()
def a_recurrent_network(form):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.lstm(x.view(-1, 3, 2))[0][:, -1])

    model = seeded(Recurrent())
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@in_all_forms(origin="pytorch/pytorch#61470")
def weight_norm_before_distribute(form):
    model = small()
    nn.utils.parametrizations.weight_norm(model[0])
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@refused("parameters since mpicomp.distribute", origin="Lightning-AI/pytorch-lightning#1289")
def weight_norm_after_distribute(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    nn.utils.parametrizations.weight_norm(model[0])
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@in_all_forms(torch_too=False, origin="pytorch/pytorch#62293")
def spectral_norm_before_distribute(form):
    model = small()
    with TORCH_GENERATOR, torch.random.fork_rng():
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(model[0])
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for pair in form.batches():
        form.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@refused("SyncBatchNorm.*BatchNorm", origin="pytorch/pytorch#110363")
def synchronized_batch_norm(world, algorithm):
    begun(world, algorithm, nn.SyncBatchNorm.convert_sync_batchnorm(small(nn.BatchNorm1d(8))))


@refused("wrapped in DataParallel")
def data_parallel(world, algorithm):
    begun(world, algorithm, nn.DataParallel(small()))


@refused(r"real floating-point numbers, not: weight \(torch.complex64\)")
def complex_parameters(world, algorithm):
    begun(world, algorithm, nn.Linear(6, 3, dtype=torch.complex64))


# ---- torch.compile, checkpointing, copies


def _compile_rows(name, prepare):
    def script(form):
        model = small()
        trained, called = prepare(model)
        form.begin(trained, SGD(trained.parameters(), lr=0.1))
        if called is None:
            called = torch.compile(model, backend="eager")
        for pair in form.batches():
            form.step(lambda pair=pair: loss_of(called, pair))
        return flat(model)

    script.__name__ = f"compile_{name}"
    in_all_forms(origin="pytorch/pytorch#113423, pytorch/pytorch#101107")(script)


def _compiled(model):
    compiled = torch.compile(model, backend="eager")
    return compiled, compiled


def _compiled_beside(model):
    return model, torch.compile(model, backend="eager")


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model, model


_compile_rows("before_distribute", _compiled)
_compile_rows("beside_the_distributed_model", _compiled_beside)
_compile_rows("in_place", _compiled_in_place)
_compile_rows("after_distribute", lambda model: (model, None))


def _checkpointing_row(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small()

        def forward(self, x):
            return self.layers[1:](checkpoint(self.layers[0], x.requires_grad_(), use_reentrant=reentrant))

    def script(form):
        model = Checkpointed()
        form.begin(model, SGD(model.parameters(), lr=0.1))
        for pair in form.batches():
            form.step(lambda pair=pair: loss_of(model, pair))
        return flat(model)

    script.__name__ = f"gradient_checkpointing_{'reentrant' if reentrant else 'by_hooks'}"
    in_all_forms(origin="pytorch/pytorch#65537, huggingface/accelerate#389")(script)


_checkpointing_row(True)
_checkpointing_row(False)


@refused(
    "call the model itself",
    methods={"gmc_plus": GMC(TopK(0.3), detachment=0.3, momentum=0.5)},
)
def the_whole_model_is_checkpointed(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    inputs, labels = batch(world.rank, 0)
    outputs = checkpoint(model, inputs.requires_grad_(), use_reentrant=True)
    nn.functional.cross_entropy(outputs, labels).backward()
    gossip.optimizer.step()


@in_all_forms(origin="lucidrains/ema-pytorch#9, pytorch/vision#5469")
def a_moving_average_of_the_model(form):
    model = small()
    form.begin(model, SGD(model.parameters(), lr=0.1))
    for step, pair in enumerate(form.batches()):
        form.step(lambda pair=pair: loss_of(model, pair))
        if step == 0:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        average.update_parameters(model)
    return torch.cat([flat(model), flat(average.module)])


def trained_on(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    copied = small()
    copied.load_state_dict(model.state_dict())
    optimizer = SGD(copied.parameters(), lr=0.1)
    loss_of(copied, batch(world.rank, 9)).backward()
    optimizer.step()
    return torch.cat([flat(model), flat(copied)])


@right(trained_on, origin="lucidrains/ema-pytorch#6")
def a_deep_copy_is_a_model_of_its_own(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    copied = copy.deepcopy(model)
    optimizer = SGD(copied.parameters(), lr=0.1)
    loss_of(copied, batch(world.rank, 9)).backward()
    optimizer.step()
    gossip.require_between_steps("a row")
    return torch.cat([flat(model), flat(copied)])


@right(plain)
def saving_the_whole_module(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return flat(torch.load(file, weights_only=False))


# ---- evaluation


@right(plain)
def evaluation_between_steps(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            loss_of(model, batch(0, 77))
        model.train()
    return flat(model)


@right(plain)
def evaluation_without_eval(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
        with torch.no_grad():
            loss_of(model, batch(0, 77))
    return flat(model)


@right(plain)
def evaluation_with_gradients_on(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
        loss_of(model, batch(0, 77))
    return flat(model)


@right(plain, origin="pytorch/pytorch#54059, huggingface/transformers#1081")
def evaluation_of_the_own_model_on_rank_0_alone(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
        if world.rank == 0:
            loss_of(model, batch(0, 77))
    return flat(model)


@right(plain, origin="pytorch/pytorch#54059, pytorch/pytorch#134920")
def evaluation_of_the_averaged_model_on_rank_0_alone(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
        with gossip.averaged() as averaged:
            if world.rank == 0:
                loss_of(averaged, batch(0, 77))
    return flat(model)


# ---- several models, several times


def form_of(form, model):
    """A form of its own for one of several models, with an optimizer and messages of its own."""
    own = Form(form.world, form.algorithm, form.kind)
    own.begin(model, SGD(model.parameters(), lr=0.1))
    return own


def adversarial(form):
    """Two models that train each other, each with an optimizer and messages of its own."""
    generator, judge = seeded(nn.Linear(3, 6), 1), seeded(nn.Linear(6, 1), 2)
    of_generator, of_judge = (form_of(form, model) for model in (generator, judge))
    softplus = nn.functional.softplus
    for real, _ in form.batches():
        noise = real[:, :3]
        fake = generator(noise)
        of_judge.step(lambda real=real, fake=fake: (softplus(-judge(real)) + softplus(judge(fake.detach()))).mean())
        of_generator.step(lambda noise=noise: softplus(-judge(generator(noise))).mean())
        of_judge.optimizer.zero_grad()
    return torch.cat([flat(generator), flat(judge)])


in_all_forms(origin="Lightning-AI/pytorch-lightning#20866, pytorch/pytorch#175024")(adversarial)


def adversarial_with_a_frozen_judge(form, freeze, has_kept=True):
    """Train two models by turns, and freeze `freeze(judge)` while the generator is trained."""
    generator, judge = seeded(nn.Linear(3, 6), 1), seeded(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)), 2)
    of_generator, of_judge = (form_of(form, model) for model in (generator, judge))
    softplus = nn.functional.softplus
    for real, _ in form.batches():
        noise = real[:, :3]
        fake = generator(noise).detach()
        freeze(judge).requires_grad_(True)
        before = flat(judge[0])
        of_judge.step(lambda real=real, fake=fake: (softplus(-judge(real)) + softplus(judge(fake))).mean())
        assert not torch.equal(flat(judge[0]), before)
        freeze(judge).requires_grad_(False)
        before = flat(judge[0])
        of_generator.step(lambda noise=noise: softplus(-judge(generator(noise))).mean())
        of_judge.optimizer.zero_grad()
        assert torch.equal(flat(judge[0]), before) or not has_kept
    return torch.cat([flat(generator), flat(judge)]), of_judge


@in_all_forms(origin="junyanz/pytorch-CycleGAN-and-pix2pix")
def a_judge_frozen_while_the_generator_is_trained(form):
    result, of_judge = adversarial_with_a_frozen_judge(form, lambda judge: judge)
    if form.kind != "torch":
        with of_judge.gossip.averaged():
            pass
    return result


@in_all_forms()
def a_layer_of_the_judge_frozen_while_the_generator_is_trained(form):
    # the generator's step begins that of the judge, which may mix what is frozen until its end
    return adversarial_with_a_frozen_judge(form, lambda judge: judge[0], has_kept=False)[0]


@in_all_forms(origin="horovod/horovod#1417")
def an_optimizer_for_each_part_of_a_model(form):
    model = small()
    forms = [Form(form.world, form.algorithm, "loop" if form.kind == "closure" else form.kind) for _ in range(2)]
    for part, own in zip((model[0], model[2]), forms, strict=True):
        own.begin(part, SGD(part.parameters(), lr=0.1))
    for pair in form.batches():
        if form.kind == "closure":
            forms[0].gossip.step(lambda pair=pair: loss_of(model, pair))
            forms[1].optimizer.step()
            forms[1].optimizer.zero_grad()
        else:
            loss_of(model, pair).backward()
            for own in forms:
                own.optimizer.step()
                own.optimizer.zero_grad()
    return flat(model)


@refused("this optimizer is distributed already")
def distributing_twice(world, algorithm):
    model, optimizer, _ = begun(world, algorithm)
    begun(world, algorithm, model, optimizer)


@refused("the model is distributed already: 0.weight")
def distributing_twice_with_a_new_optimizer(world, algorithm):
    model, _, _gossip = begun(world, algorithm)
    begun(world, algorithm, model)


@refused("this optimizer is distributed already")
def distributing_the_distributed_optimizer(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    begun(world, algorithm, model, gossip.optimizer)


@right(plain)
def the_gossip_is_not_kept(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    optimizer = gossip.optimizer
    reference = weakref.ref(gossip)
    del gossip
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert reference() is not None
    return flat(model)


# ---- hooks


@right(plain)
def hooks_on_the_optimizer(world, algorithm):
    model, optimizer, gossip = begun(world, algorithm)
    seen = []
    gossip.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    gossip.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own"))
    for pair in own_batches(world):
        loss_of(model, pair).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()
    assert seen == ["before", "own", "after"] * STEPS
    return flat(model)


@right(plain)
def a_closure_through_the_step_that_a_scheduler_has_wrapped(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    scheduler = schedulers.ConstantLR(gossip.optimizer, factor=1.0)
    for pair in own_batches(world):
        loss = gossip.optimizer.step(lambda pair=pair: loss_of(model, pair))
        assert not loss.requires_grad
        scheduler.step()
    return flat(model)


# ---- ranks that differ


@right(plain)
def ranks_that_start_from_other_weights(world, algorithm):
    model = seeded(small(), world.rank)
    _, _, gossip = begun(world, algorithm, model)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


def frozen_like_rank_0(world, algorithm, rank=0):
    model = small(nn.Linear(8, 8))
    seeded(model[1], rank).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _, _, gossip = begun(world, algorithm, model, SGD(parameters, lr=0.1))
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@right(frozen_like_rank_0)
def frozen_layers_that_start_from_other_weights(world, algorithm):
    return frozen_like_rank_0(world, algorithm, world.rank)


def permuted_like_rank_0(world, algorithm, rank=0):
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small()
            self.register_buffer("order", torch.randperm(6, generator=torch.Generator().manual_seed(rank)))

        def forward(self, x):
            return self.layers(x[:, self.order])

    model = Permuted()
    _, _, gossip = begun(world, algorithm, model)
    for pair in own_batches(world):
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@right(permuted_like_rank_0)
def a_buffer_of_whole_numbers_that_differs(world, algorithm):
    return permuted_like_rank_0(world, algorithm, world.rank)


@refused(r"rank 1 has another model than rank 0: 0.weight is torch.float32 \(9, 6\)", ranks=2)
def another_model_on_one_rank(world, algorithm):
    width = 9 if world.rank == 1 else 8
    begun(world, algorithm, nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3)))


@refused("lost parameters|on rank 0", ranks=2)
def an_optimizer_that_lacks_a_parameter_on_rank_0(world, algorithm):
    model = small()
    part = model[2] if world.rank == 0 else model
    begun(world, algorithm, model, SGD(part.parameters(), lr=0.1))


@refused("the loss is nan .*at step 0", error=DivergenceError)
def a_loss_that_is_not_a_number(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)) * float("nan"))


@refused(
    "not finite .*at step 50 on rank",
    error=DivergenceError,
    methods={"dpsgd": DPSGD(), "ssgd": SSGD(), "diloco": DiLoCo(2)},
)
def a_gradient_that_is_not_a_number_on_rank_0(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for step in range(51):
        loss = loss_of(model, batch(world.rank, step))
        (loss * float("nan") if (world.rank, step) == (0, 3) else loss).backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()


@refused("rank 1 has another model than rank 0: 1.running_mean is missing", ranks=2)
def a_norm_without_statistics_on_one_rank(world, algorithm):
    begun(world, algorithm, small(nn.BatchNorm1d(8, track_running_stats=world.rank != 1)))


@refused(r"algorithm.compressor.ratio differs between ranks: 0.5 on rank 0, and 0.1 on rank 1; .*allocate", ranks=2)
def another_ratio_on_one_rank(world, _):
    begun(world, Choco(0.2, TopK(0.1 if world.rank == 1 else 0.5)))


@refused("algorithm.compressor differs between ranks: TopK on rank 0, and SignNorm on rank 1", ranks=2)
def another_compressor_on_one_rank(world, _):
    begun(world, EFSGD(SignNorm() if world.rank == 1 else TopK(0.5)))


@refused("algorithm.period differs between ranks: 2 on rank 0, and 3 on rank 1", ranks=2)
def another_period_on_one_rank(world, _):
    begun(world, LocalSGD(3 if world.rank == 1 else 2, DPSGD()))


@refused("algorithm.compressor.seed differs between ranks: 0 on rank 0, and 1 on rank.* seeds too", ranks=2)
def the_seed_of_a_compressor_by_rank(world, _):
    begun(world, EFSGD(RandomBlock(0.2, seed=int(world.rank > 0))))


@refused("topology differs between ranks: ring on rank 0, and complete on rank 1", ranks=2)
def another_graph_on_one_rank(world, _):
    model = small()
    graph = complete if world.rank == 1 else ring
    distribute(model, SGD(model.parameters(), lr=0.1), DPSGD(), graph, world=world)


@refused("topology.seed differs between ranks: 0 on rank 0, and 1 on rank 1", ranks=2)
def another_seed_of_the_graphs_on_one_rank(world, _):
    model = small()
    graph = RandomMatching(world.size, seed=int(world.rank == 1))
    distribute(model, SGD(model.parameters(), lr=0.1), DPSGD(), graph, world=world)


@refused("buffers differs between ranks: 2 on rank 0, and 3 on rank 1", ranks=2)
def another_period_of_statistics_on_one_rank(world, _):
    model = small()
    buffers = 3 if world.rank == 1 else 2
    distribute(model, SGD(model.parameters(), lr=0.1), DPSGD(), ring, world=world, buffers=buffers)


def clipped_at(norm):
    def script(world, algorithm):
        model = small()
        volumes = tuple(range(1, world.size + 1))
        algorithm = dataclasses.replace(algorithm, compressor=allocate(TopK(0.3), volumes))
        if isinstance(algorithm, EFSGD):
            algorithm = dataclasses.replace(algorithm, weights="volume", volumes=volumes)
        clip = Clip(norm=norm(world.rank))
        gossip = distribute(model, SGD(model.parameters(), lr=0.1), algorithm, ring, world=world, clip=clip)
        for pair in own_batches(world):
            gossip.step(lambda pair=pair: loss_of(model, pair))
        return flat(model)

    return script


@right(clipped_at(lambda _: 1e6))
def a_ratio_a_weight_and_a_limit_of_its_own_on_each_rank(world, algorithm):
    return clipped_at(lambda rank: 1e6 + rank)(world, algorithm)


# ---- what methods that add up gradients need to be the same on all ranks


@refused("rank 1 has the learning rates", methods={"sum": SUM}, ranks=2, origin="dylanyunlon/Neuron_SP#2")
def a_schedule_that_follows_the_loss_of_each_rank(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    scheduler = schedulers.ReduceLROnPlateau(gossip.optimizer, factor=0.5, patience=0)
    for step in range(51):
        gossip.step(lambda step=step: loss_of(model, batch(world.rank, step)))
        scheduler.step(1.0 - 0.01 * step * world.rank)


@refused("rank 1 holds another model than rank 0", methods={"sum": SUM}, ranks=2, origin="vllm-project/speculators#926")
def weights_are_loaded_on_rank_0_alone(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    if world.rank == 0:
        model.load_state_dict(seeded(small(), 7).state_dict())
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused(r"frozen different parameters \(0.bias, 0.weight\)", methods={"sum": SUM}, ranks=2)
def a_layer_frozen_on_one_rank(world, algorithm):
    model = small()
    model[0].requires_grad_(world.rank != 1)
    _, _, gossip = begun(world, algorithm, model)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused(
    "the optimizer of rank 1 has another state than that of rank 0.*'momentum_buffer'",
    methods={"sum": SSGD()},
    ranks=2,
)
def a_momentum_from_before_on_rank_0_alone(world, algorithm):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    if world.rank == 0:
        loss_of(model, batch(0, 0)).backward()
        optimizer.step()
    _, _, gossip = begun(world, algorithm, model, optimizer)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


@refused("the optimizer of rank 1 has another state than that of rank 0", methods={"sum": SSGD()}, ranks=2)
def the_state_of_adam_loaded_on_rank_0_alone(world, algorithm):
    model = small()
    _, optimizer, gossip = begun(world, algorithm, model, AdamW(model.parameters(), lr=0.1))
    for step in range(2):
        gossip.step(lambda step=step: loss_of(model, batch(world.rank, step)))
    stored = copy.deepcopy(optimizer.state_dict())
    for each in stored["state"].values():
        each["exp_avg_sq"] *= 2
    if world.rank == 0:
        optimizer.load_state_dict(stored)
    model.load_state_dict(small().state_dict())
    require_same_model(world, gossip.local)


@refused("the optimizer of rank 1 has weight_decay of group 0 = 0.1, that of rank 0 0.0", methods={"sum": SUM}, ranks=2)
def another_weight_decay_on_one_rank(world, algorithm):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1 if world.rank == 1 else 0.0)
    _, _, gossip = begun(world, algorithm, model, optimizer)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))


# ---- ranks with unequal numbers of batches


def padded_with_empty_steps(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair, is_mine in [(pair, step < STEPS - world.rank) for step, pair in enumerate(own_batches(world))]:
        gossip.step(lambda pair=pair, is_mine=is_mine: is_mine * loss_of(model, pair))
    return flat(model)


@right(padded_with_empty_steps, origin="pytorch/pytorch#38174, microsoft/PyMarlin#80, lifeiteng/vall-e#95")
def loaders_of_unequal_length(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    with gossip.join():
        for pair in own_batches(world, STEPS - world.rank):
            loss_of(model, pair).backward()
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
    return flat(model)


@right(padded_with_empty_steps, origin="Lightning-AI/pytorch-lightning#20404")
def loaders_of_unequal_length_with_closures(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    with gossip.join():
        for pair in own_batches(world, STEPS - world.rank):
            gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@right(padded_with_empty_steps, origin="NVIDIA-NeMo/Automodel#2468, pytorch/audio#3749")
def a_rank_without_a_batch_steps_with_gradients_of_zero(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for step, pair in enumerate(own_batches(world)):
        gossip.optimizer.zero_grad()
        if step < STEPS - world.rank:
            loss_of(model, pair).backward()
        gossip.optimizer.step()
    return flat(model)


def _call_in_join(name, call):
    def script(world, algorithm):
        model, _, gossip = begun(world, algorithm)
        with gossip.join():
            gossip.step(lambda: loss_of(model, batch(world.rank, 0)))
            call(gossip)

    script.__name__ = f"{name}_within_join"
    refused(rf"{name}\(\) within gossip.join\(\): ranks that have no more batches", methods=METHODS)(script)


_call_in_join("averaged", lambda gossip: gossip.averaged().__enter__())
_call_in_join("metrics", lambda gossip: gossip.metrics())
_call_in_join("save", lambda gossip: gossip.save("nowhere"))
_call_in_join("consensus_distance", lambda gossip: gossip.consensus_distance())


# ---- interrupted steps


@refused("save.. in the middle of step 1: an exception, such as Ctrl-C, has ended the step", methods=METHODS)
def saving_after_an_interrupt(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    gossip.step(lambda: loss_of(model, batch(world.rank, 0)))

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gossip.step(interrupted)
    gossip.save("nowhere")


@refused("different numbers of steps: rank 0 0, rank 1 1", ranks=2)
def saving_after_unequal_numbers_of_steps(world, algorithm):
    _, _, gossip = begun(world, algorithm)
    gossip.steps += world.rank > 0  # as after signals that came to the ranks in different steps
    gossip.save("nowhere")


@right(plain)
def a_bad_batch_in_a_closure_is_replaced(world, algorithm):
    model, _, gossip = begun(world, algorithm)
    for pair in own_batches(world):
        with pytest.raises(IndexError):
            gossip.step(lambda: loss_of(model, [][world.rank]))
        gossip.step(lambda pair=pair: loss_of(model, pair))
    return flat(model)


@refused("gossip.optimizer cannot be copied or pickled")
def a_copy_of_the_distributed_optimizer(world, algorithm):
    copy.deepcopy(begun(world, algorithm)[2].optimizer)


@refused("gossip.optimizer cannot be copied or pickled")
def the_distributed_optimizer_is_stored_as_a_whole(world, algorithm):
    torch.save(begun(world, algorithm)[2].optimizer, io.BytesIO())
