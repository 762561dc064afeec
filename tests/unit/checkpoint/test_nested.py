"""What goes into a checkpoint as `extra` comes back with the same structure, types and bits, or is refused at once."""

import math
import sys
import tempfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers

from mpicomp.checkpoint import hdf5, nested
from mpicomp.errors import CheckpointError

INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")


def through_a_file(tree):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank.h5"
        hdf5.write(path, {f"extra/{name}": leaf for name, leaf in nested.pack(tree, "extra").items()}, {})
        return nested.unpack({name.removeprefix("extra/"): leaf for name, leaf in hdf5.read(path).items()})


def assert_same(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert [(type(key), key) for key in one] == [(type(key), key) for key in other], path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(ours, theirs, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.tolist().__repr__()) == (other.dtype, other.shape, other.tolist().__repr__())
    elif isinstance(one, np.ndarray | np.generic):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), path
    else:
        assert repr(one) == repr(other), path  # as NaN and -0.0 are to be told apart


def tensors():
    def draw(dtype, shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 50).abs().to(getattr(torch, dtype))

    dtypes = st.sampled_from(("bool", *INTEGERS, *FLOATS, *COMPLEX))
    return st.builds(draw, dtypes, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99))


def arrays():
    dtypes = st.sampled_from(("bool", *INTEGERS, "float16", "float32", "float64", *COMPLEX))
    return st.builds(lambda dtype, n: np.arange(n).astype(dtype), dtypes, st.integers(0, 4))


numpy_scalars = st.builds(
    lambda dtype, value: np.dtype(dtype).type(value),
    st.sampled_from(("bool", *INTEGERS, "float16", "float32", "float64")),
    st.integers(0, 100),
)
keys = st.recursive(
    st.one_of(st.text(max_size=6), st.sampled_from("/%.")) | st.integers() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=2,
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=8),
    tensors(),
    arrays(),
    numpy_scalars,
)


def containers(inner):
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, st.integers(0, 9), max_size=3).map(Counter),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    )


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys, st.recursive(leaves, containers, max_leaves=12), max_size=4))
def test_every_tree_comes_back_the_same(tree):
    assert_same(tree, through_a_file(tree))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 2**200, "\0 \n ü 名 /%", ""])
def test_numbers_and_texts_are_exact(value):
    assert_same({"value": [value]}, through_a_file({"value": [value]}))
    ((key, under_it),) = through_a_file({value: torch.ones(1)}).items()
    assert repr(key) == repr(value) and torch.equal(under_it, torch.ones(1))


def test_the_keys_1_and_text_1_and_those_with_slashes_stay_apart():
    tree = {
        1: torch.tensor(1),
        "1": torch.tensor(2),
        "a/b": torch.tensor(3),
        "a": {"b": torch.tensor(4)},
        "a%2Fb": torch.tensor(5),
    }
    assert_same(tree, through_a_file(tree))


def test_a_long_list_and_a_tree_of_many_levels():
    deep = []
    for _ in range(50):
        deep = [deep]
    tree = {"order": list(range(100_000)), "deep": deep}
    assert through_a_file(tree) == tree


def test_a_tensor_with_a_graph_a_parameter_and_a_strided_one_come_back_as_plain_tensors():
    leaf = torch.arange(6.0).reshape(2, 3).requires_grad_()
    back = through_a_file({"graph": leaf * 2, "parameter": torch.nn.Parameter(leaf.detach()), "strided": leaf.t()})
    for name, expected in {"graph": leaf * 2, "parameter": leaf, "strided": leaf.t()}.items():
        assert type(back[name]) is torch.Tensor and not back[name].requires_grad
        assert torch.equal(back[name], expected)


def test_arrays_that_are_read_only_come_back():
    array = np.arange(3)
    array.flags.writeable = False
    assert_same({"a": array}, through_a_file({"a": array}))


def test_the_state_of_random_generators_comes_back():
    generator = np.random.default_rng(0)
    back = through_a_file({"numpy": generator.bit_generator.state, "torch": torch.get_rng_state()})
    other = np.random.default_rng(1)
    other.bit_generator.state = back["numpy"]
    assert other.integers(2**60) == generator.integers(2**60)
    torch.set_rng_state(back["torch"])


def scheduler_table():
    return {
        "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
        "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
        "StepLR": lambda o: schedulers.StepLR(o, 2),
        "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5, 5]),
        "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
        "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=6),
        "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
        "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
        "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
        "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
        "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, 12),
        "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.5, 3),
        "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
        "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
            [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
        ),
        "SequentialLR": lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.5, total_iters=4), schedulers.MultiStepLR(o, [2, 3])], [5]
        ),
    }


def rates(optimizer, scheduler, first, last):
    found = []
    for step in range(first, last):
        optimizer.step()
        # ReduceLROnPlateau takes a loss, here one that stays the same for a while.
        arguments = (1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()
        scheduler.step(*arguments)
        found.append((step, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    return found


def test_the_table_has_every_scheduler_of_torch():
    assert scheduler_table().keys() == set(schedulers.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("kind", scheduler_table())
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_every_scheduler_of_torch_goes_on_exactly(kind):
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
        return optimizer, scheduler_table()[kind](optimizer)

    optimizer, scheduler = make()
    rates(optimizer, scheduler, 0, 4)
    state = {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}
    back = through_a_file(state)
    assert_same(state, back)
    other_optimizer, other = make()
    other.load_state_dict(back["scheduler"])
    other_optimizer.load_state_dict(back["optimizer"])
    assert rates(other_optimizer, other, 4, 10) == rates(optimizer, scheduler, 4, 10)


def test_the_state_of_a_gradient_scaler_comes_back():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert through_a_file({"scaler": scaler.state_dict()}) == {"scaler": scaler.state_dict()}


Point = namedtuple("Point", "x y")

REFUSED = [
    ({"scheduler": {"lr_lambdas": [lambda epoch: 1.0]}}, "extra['scheduler']['lr_lambdas'][0] is of type function", ""),
    ({"log": sys.stderr}, "extra['log'] is of type ", "leave it out and make it anew at the start"),
    ({"a": ({"b": Fraction(1, 2)},)}, "extra['a'][0]['b'] is of type fractions.Fraction", "make it anew"),
    ({"s": torch.nn.Linear(1, 1)}, "extra['s'] is of type torch.nn.modules.linear.Linear", "store its state_dict()"),
    ({"s": {1, 2}}, "extra['s'] is of type set", "store a list, such as sorted(...)"),
    ({"s": defaultdict(int)}, "extra['s'] is of type collections.defaultdict", "store dict(...) of it"),
    ({"s": Point(1, 2)}, "Point, which cannot be stored", "store tuple(...) of it"),
    ({1: {2: object()}}, "extra[1][2] is of type object", "make it anew"),
    (
        {"x": torch.eye(2).to_sparse()},
        "extra['x'] is of type torch.Tensor (torch.float32, torch.sparse_coo",
        "to_dense",
    ),
    ({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, "(torch.float8_e4m3fn, ", "tensor.float()"),
    ({"x": torch.zeros(2, device="meta")}, "on meta), which cannot be stored", "dense tensor"),
    ({"x": np.array([object()])}, "extra['x'] is of type numpy.ndarray (object)", "an array of booleans or numbers"),
    ({"x": np.array(["a"])}, "extra['x'] is of type numpy.ndarray (<U1)", "or a list"),
    ({"x": np.arange(2).astype(">i4")}, "extra['x'] is of type numpy.ndarray (>i4)", "byte order of this machine"),
    ({"x": {frozenset(): 1}}, "extra['x'] has the key frozenset() of type frozenset", "take a text or a number"),
    ({"x": 10**5000}, "extra cannot be stored: Exceeds the limit", ""),
    ([1], "extra must be a dict, not of type list", "store it under a name"),
]


@pytest.mark.parametrize(("tree", "where", "remedy"), REFUSED)
def test_what_cannot_be_stored_is_refused_with_way_type_and_remedy(tree, where, remedy):
    with pytest.raises(CheckpointError) as caught:
        nested.pack(tree, "extra")
    assert where in str(caught.value)
    assert remedy in str(caught.value)


def test_a_tree_that_contains_itself_is_refused():
    tree = {}
    tree["me"] = tree
    with pytest.raises(CheckpointError, match=r"extra\['me'\]\['me'\].* contains itself"):
        nested.pack(tree, "extra")


def test_what_a_newer_program_has_stored_is_refused():
    with pytest.raises(CheckpointError, match="holds a quaternion, which this program does not know: update mpicomp"):
        nested.unpack({"structure": '{"dict": [["a", {"quaternion": 1}]]}'})


def test_a_checkpoint_may_have_no_tree():
    assert nested.unpack({}) == {}
