from dataclasses import dataclass, field

import pytest
import torch

from mpicomp.errors import CheckpointError
from mpicomp.state import SCRATCH, flatten, restore_


@dataclass
class Inner:
    residual: torch.Tensor
    step: int = 0


@dataclass
class Outer:
    x: torch.Tensor
    inner: Inner | None
    parts: list
    rate: float = 0.5
    scratch: torch.Tensor = field(default_factory=lambda: torch.zeros(3), metadata=SCRATCH)


def state(seed):
    torch.manual_seed(seed)
    inner = Inner(torch.randn(2).bfloat16(), seed)
    return Outer(torch.randn(3), inner, [Inner(torch.randn(1), 7), None, Inner(torch.randn(0), 8)], seed / 2)


def test_paths_name_the_leaves_and_leave_out_scratch():
    assert list(flatten(state(1))) == [
        "x",
        "inner/residual",
        "inner/step",
        "parts/0/residual",
        "parts/0/step",
        "parts/2/residual",
        "parts/2/step",
        "rate",
    ]


def test_restores_bit_for_bit_in_place():
    source, target = state(1), state(2)
    buffer = target.x
    restore_(target, {path: leaf.clone() if hasattr(leaf, "clone") else leaf for path, leaf in flatten(source).items()})
    assert target.x is buffer
    for path, leaf in flatten(source).items():
        other = flatten(target)[path]
        assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other


def test_a_value_that_cannot_be_stored_is_refused_at_once():
    broken = state(1)
    broken.rate = {"a": 1}
    with pytest.raises(CheckpointError, match=r"'rate' is a dict"):
        flatten(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x"), r"missing \['x'\]"),
        (lambda s: s.update(extra=1), r"not expected \['extra'\]"),
        (
            lambda s: s.update(x=torch.zeros(4)),
            r"'x' does not fit: torch.float32 \(4,\) instead of torch.float32 \(3,\)",
        ),
        (lambda s: s.update(rate=1), "'rate' does not fit: int instead of float"),
    ],
)
def test_what_does_not_fit_names_the_path(change, message):
    stored = flatten(state(1))
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        restore_(state(1), stored)
