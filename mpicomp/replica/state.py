"""The state of one rank, complete for a restart, as ``{path: tensor, number or text}``, and back.

model/parameters                     (n,) the trainable parameters, flat
model/tensors                        JSON: name, shape and type of each tensor that it holds, in order
model/aliases                        JSON: by each further name of a tied tensor, the name under which it is stored
model/buffers/<name>                 persistent buffers, e.g. batch-norm statistics and counters
model/frozen/<name>                  parameters that the optimizer does not hold
extra_state/...                      what `get_extra_state` of modules returns, by module (`mpicomp.checkpoint.nested`)
optimizer/groups                     JSON: the hyper-parameters of each group
optimizer/state/<key>/<name>         what the optimizer keeps for the parameter <name>
algorithm/<field>                    public copies, residuals, moments, positions in random streams
exchange/steps, exchange/bytes_sent  the steps and the bytes of the exchange
exchange/weight                      what the rank counts in the sums of the method, if not as much as each other
random/python, random/numpy, ...     the states of the random generators of the process

Batches, random compressors and the graph of a step depend only on (seed, step, rank), so they have no state.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.checkpoint import nested
from mpicomp.compression.random import mix64
from mpicomp.errors import CheckpointError
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.model_checks import named_parameters, plain_name
from mpicomp.state import TORCH_GENERATOR, Leaf, flatten, restore_

EXTRA_STATE = "extra_state/"
OPTIMIZER_STATE = "optimizer/state/"
WEIGHT = "exchange/weight"


def model_leaves(local: FlatModel) -> dict[str, Leaf]:
    """Return the leaves of the model; tensors are not copied."""
    named = zip(local.spec.names, local.spec.shapes, local.dtypes, strict=True)
    tensors = [[name, list(shape), str(dtype).removeprefix("torch.")] for name, shape, dtype in named]
    return {
        "model/parameters": local.x,
        "model/tensors": json.dumps(tensors),
        "model/aliases": json.dumps(aliases(local.model)),
        **{f"model/{path}": tensor for path, tensor in _others(local)},
    }


def aliases(model: nn.Module) -> dict[str, str]:
    """Return for each further name, in its `state_dict`, of a tied tensor the first one; names as without compile."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    stored = model.state_dict()
    first: dict[Tensor, str] = {}
    named = [(plain_name(name), tensor) for name, tensor in chain(parameters, buffers) if name in stored]
    firsts = {name: first.setdefault(tensor, name) for name, tensor in named}
    return {name: other for name, other in firsts.items() if name != other}


def load_model_(local: FlatModel, stored: Mapping[str, Leaf]) -> None:
    """Overwrite the model with leaves from `model_leaves`; raise CheckpointError if they are of another model."""
    own, theirs = _shapes(str(model_leaves(local)["model/tensors"])), _shapes(str(stored["model/tensors"]))
    if own != theirs:
        wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        differences = "; ".join(
            f"{name}: {_shown(theirs.get(name))} instead of {_shown(own.get(name))}" for name in wrong[:4]
        )
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {differences or 'the tensors are in another order'}{more}"
        )
    others = {f"model/{path}": tensor for path, tensor in _others(local)}
    _overwrite_({"model/parameters": local.x, **others}, stored, "model")


def extra_state_leaves(model: nn.Module) -> dict[str, Leaf]:
    """Return the leaves of what modules store beside parameters and buffers (`get_extra_state`); none without such.

    Raises:
        CheckpointError: a value cannot be stored; names it.

    """
    states = {name: module.get_extra_state() for name, module in _modules_with_extra_state(model)}
    leaves = nested.pack(states, "the extra state of ") if states else {}
    return {f"{EXTRA_STATE}{name}": leaf for name, leaf in leaves.items()}


def load_extra_state_(model: nn.Module, stored: Mapping[str, Leaf]) -> None:
    """Give modules the extra state from `extra_state_leaves`; a checkpoint may have none."""
    states = nested.unpack(
        {path.removeprefix(EXTRA_STATE): leaf for path, leaf in stored.items() if path.startswith(EXTRA_STATE)}
    )
    for name, module in _modules_with_extra_state(model):
        if name in states:
            module.set_extra_state(states[name])


def optimizer_leaves(local: FlatModel) -> dict[str, Leaf]:
    """Return the leaves of the optimizer's state; tensors are not copied.

    Raises:
        CheckpointError: a value is neither tensor, number nor text, or belongs to no parameter.

    """
    if odd := [key for key in local.optimizer.state if not isinstance(key, Tensor)]:
        raise CheckpointError(
            f"the optimizer keeps state[{odd[0]!r}], which belongs to no parameter and cannot be stored: keep it in "
            "its param_groups"
        )
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        for group in local.optimizer.param_groups
    ]
    try:
        leaves: dict[str, Leaf] = {"optimizer/groups": json.dumps(groups)}
    except TypeError as error:
        raise CheckpointError(f"a hyper-parameter of the optimizer cannot be stored: {error}") from error
    for name, parameter in _optimized(local):
        for key, value in local.optimizer.state.get(parameter, {}).items():
            path = f"{OPTIMIZER_STATE}{key}/{name}"
            if value is not None and not isinstance(value, Leaf):
                raise CheckpointError(f"{path} is a {type(value).__name__}, which cannot be stored")
            if value is not None:
                leaves[path] = value
    return leaves


def load_optimizer_(local: FlatModel, stored: Mapping[str, Leaf]) -> None:
    """Overwrite the optimizer's state with leaves from `optimizer_leaves`; raise CheckpointError if they do not fit."""
    current = local.optimizer.state_dict()["param_groups"]
    groups = [
        {key: _tuple(value) for key, value in group.items()} for group in json.loads(str(stored["optimizer/groups"]))
    ]
    own, theirs = ([sorted(group.keys() - {"params"}) for group in some] for some in (current, groups))
    if own != theirs:
        raise CheckpointError(
            f"the checkpoint is of another optimizer: hyper-parameters {theirs} instead of {own}; if some are those of "
            "a scheduler, make it before resume"
        )
    index = {name: i for i, (name, _) in enumerate(_optimized(local))}
    state: dict[int, dict[str, Leaf]] = {}
    for path, value in stored.items():
        if path.startswith(OPTIMIZER_STATE):
            key, name = path.removeprefix(OPTIMIZER_STATE).split("/", 1)
            if name not in index:
                raise CheckpointError(f"the checkpoint holds {path}, but the optimizer has no parameter {name}")
            state.setdefault(index[name], {})[key] = value.clone() if isinstance(value, Tensor) else value
    merged = [
        {**group, **{key: _like(group[key], value) for key, value in hyper.items()}}
        for group, hyper in zip(current, groups, strict=True)
    ]
    local.optimizer.load_state_dict({"state": state, "param_groups": merged})
    states = local.optimizer.state
    for i, (_, parameter) in enumerate(_optimized(local)):
        kept = states.get(parameter, {})
        for key, value in state.get(i, {}).items():
            loaded = kept.get(key)
            if key == "step" or not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                continue
            if value.dtype != loaded.dtype:  # torch gives it the parameter's: bfloat16 to float32 momentum, say
                kept[key] = value.to(loaded.device)


def algorithm_leaves(state: Any) -> dict[str, Leaf]:
    """Return the leaves of an algorithm's state; tensors are not copied."""
    return {f"algorithm/{path}": value for path, value in flatten(state).items()}


def load_algorithm_(state: Any, stored: Mapping[str, Leaf]) -> None:
    """Overwrite an algorithm's state with leaves from `algorithm_leaves`; raise CheckpointError if they do not fit."""
    prefix = "algorithm/"
    restore_(state, {path.removeprefix(prefix): value for path, value in stored.items() if path.startswith(prefix)})


def random_leaves(device: torch.device) -> dict[str, Leaf]:
    """Return the states of the random generators of Python, NumPy (the global one) and torch (CPU, and `device`)."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    with TORCH_GENERATOR:
        torch_state = torch.get_rng_state()
    leaves: dict[str, Leaf] = {
        "random/python": torch.tensor(words, dtype=torch.int64),
        "random/python_version": version,
        "random/python_gauss": math.nan if gauss is None else gauss,
        "random/numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "random/numpy_position": int(numpy["state"]["pos"]),
        "random/numpy_has_gauss": int(numpy["has_gauss"]),
        "random/numpy_gauss": float(numpy["gauss"]),
        "random/torch_cpu": torch_state,
    }
    if device.type == "cuda":
        leaves["random/torch_cuda"] = torch.cuda.get_rng_state(device)
    return leaves


def load_random(device: torch.device, stored: Mapping[str, Leaf]) -> None:
    """Set the random generators of the process to the states from `random_leaves`.

    If a run moves between CPU and GPU, the generator of the new device is not changed.
    """
    words, gauss, key = stored["random/python"], stored["random/python_gauss"], stored["random/numpy"]
    cpu, cuda = stored["random/torch_cpu"], stored.get("random/torch_cuda")
    assert isinstance(words, Tensor) and isinstance(key, Tensor) and isinstance(cpu, Tensor)
    assert isinstance(gauss, float)
    state = (stored["random/python_version"], tuple(words.tolist()), None if math.isnan(gauss) else gauss)
    random.setstate(state)
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key.numpy().astype(np.uint32), "pos": stored["random/numpy_position"]},
            "has_gauss": stored["random/numpy_has_gauss"],
            "gauss": stored["random/numpy_gauss"],
        }
    )
    with TORCH_GENERATOR:
        torch.set_rng_state(cpu)
    if device.type == "cuda" and isinstance(cuda, Tensor):
        torch.cuda.set_rng_state(cuda, device)


def seed_random(*key: int) -> None:
    """Seed the random generators of the process from the integers `key` only."""
    seed = mix64(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with TORCH_GENERATOR:
        torch.manual_seed(seed % 2**63)


def _others(local: FlatModel) -> Iterator[tuple[str, Tensor]]:
    """Yield ``buffers/<name>`` and ``frozen/<name>``: the tensors of `state_dict` that are not in `x`."""
    stored, trained = local.model.state_dict(), set(local.spec.names)
    buffers = [(plain_name(name), buffer) for name, buffer in local.model.named_buffers() if name in stored]
    yield from ((f"buffers/{name}", buffer) for name, buffer in buffers)
    yield from ((f"frozen/{name}", p.detach()) for name, p in named_parameters(local.model) if name not in trained)


def _optimized(local: FlatModel) -> list[tuple[str, nn.Parameter]]:
    """Return the optimizer's parameters with their names, in the order of its `state_dict`."""
    names = {p: name for name, p in named_parameters(local.model)}
    parameters = [p for group in local.optimizer.param_groups for p in group["params"]]
    if unknown := [tuple(p.shape) for p in parameters if p not in names]:
        raise CheckpointError(f"the optimizer has parameters that are not the model's, of shapes {unknown}")
    return [(names[p], p) for p in parameters]


def _overwrite_(tensors: Mapping[str, Tensor], stored: Mapping[str, Leaf], part: str) -> None:
    theirs = {path for path in stored if path.startswith(f"{part}/")} - {f"{part}/tensors", f"{part}/aliases"}
    if theirs != tensors.keys():
        missing, surplus = sorted(tensors.keys() - theirs), sorted(theirs - tensors.keys())
        raise CheckpointError(f"the checkpoint is of another {part}: it lacks {missing}, it has {surplus} too much")
    for path, tensor in tensors.items():
        value = stored[path]
        if not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"the stored {path} does not fit: {found} instead of {tensor.dtype} {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for path, tensor in tensors.items():
            tensor.copy_(stored[path])  # type: ignore[arg-type]


def _shapes(tensors: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape, *_ in json.loads(tensors)}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"shape {shape}"


def _modules_with_extra_state(model: nn.Module) -> list[tuple[str, nn.Module]]:
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    return [(name, m) for name, m in modules if type(m).get_extra_state is not nn.Module.get_extra_state]


def _plain(value: Any) -> Any:
    """Return a hyper-parameter with numbers in the place of tensors and NumPy's, as in ``lr=torch.tensor(0.1)``."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0) else value


def _like(current: Any, value: Any) -> Any:
    """Return a stored hyper-parameter as the optimizer has it: a tensor where the `current` one is a tensor."""
    if isinstance(current, tuple | list) and isinstance(value, tuple) and len(current) == len(value):
        return tuple(map(_like, current, value))
    if isinstance(current, np.generic):
        converted = type(current)(value)
        return converted if converted.item() == value else value  # a scheduler may have put a longer number there
    return torch.as_tensor(value, dtype=current.dtype, device=current.device) if isinstance(current, Tensor) else value


def _tuple(value: Any) -> Any:
    """Turn lists back into tuples, such as ``betas``, which JSON has stored as lists."""
    return tuple(value) if isinstance(value, list) else value
