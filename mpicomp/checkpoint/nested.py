"""Trees of Python values, such as the `state_dict` of a scheduler, as ``{name: leaf}``, and back.

    structure             JSON: the whole tree except the entries of its tensors and arrays
    ['scaler']['scale']   one leaf for each of those, named by its path; ``%25`` for ``%``, ``%2F`` for ``/``

None, booleans, integers, floats (NaN and infinities as Python writes them), texts and lists are the same in the JSON.
Every other value is an object with one entry, whose key is the type:

    {"dict": [[key, value], ...]}    likewise "OrderedDict" and "Counter"
    {"tuple": [...]}                 likewise "Size", of torch
    {"bytes": "hexadecimal"}
    {"numpy": [dtype, value]}        a scalar of numpy
    {"tensor": name}                 likewise "array", of numpy

Values come back with the same types, except that parameters come back as tensors. Tensors come back on the CPU and
without an autograd graph.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.errors import CheckpointError
from mpicomp.state import Leaf

STRUCTURE = "structure"

_SCALARS = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, type] = {"tuple": tuple, "Size": torch.Size}
_DICTS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}

_DTYPES = {
    "bool",
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}
_COMPLEX = {"complex64", "complex128"}

_DEPTH = 64
"""The largest depth of a tree: refuses a tree that contains itself, and is far below what the JSON module can read."""


def pack(tree: Mapping[Any, Any], root: str) -> dict[str, Leaf]:
    """Return the leaves that stand for `tree`; tensors are not copied.

    Args:
        tree: a dict of None, booleans, numbers, texts, bytes, tensors, arrays, and lists, tuples and dicts of such.
        root: the name of the tree in error messages.

    Raises:
        CheckpointError: the tree contains something else; names its path, its type and the remedy.

    """
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{root} must be a dict, not of type {_name(type(tree))}: store it under a name")
    leaves: dict[str, Leaf] = {}
    structure = _encode(dict(tree), root, "", leaves, _DEPTH)
    try:
        return {STRUCTURE: json.dumps(structure), **leaves}
    except ValueError as error:  # an integer of more than 4300 digits
        raise CheckpointError(f"{root} cannot be stored: {error}") from error


def unpack(leaves: Mapping[str, Leaf]) -> dict[Any, Any]:
    """Return the tree that `pack` has turned into `leaves`.

    Raises:
        CheckpointError: the leaves contain a type that this version does not know.

    """
    if STRUCTURE not in leaves:  # a checkpoint without a tree
        return {}
    tree: dict[Any, Any] = _decode(json.loads(str(leaves[STRUCTURE])), leaves)
    return tree


def _encode(value: Any, root: str, path: str, leaves: dict[str, Leaf], depth: int) -> Any:
    """Return the JSON for `value`, and add its tensors to `leaves`."""
    kind = type(value)
    if depth == 0:
        raise CheckpointError(f"{root}{path[:80]}... is deeper than {_DEPTH} levels, or contains itself: flatten it")
    if kind in _SCALARS:
        return value
    if kind is list or kind in _SEQUENCES.values():
        items = [_encode(item, root, f"{path}[{i}]", leaves, depth - 1) for i, item in enumerate(value)]
        return items if kind is list else {kind.__name__: items}
    if kind in _DICTS.values():
        if wrong := [key for key in value if not _is_key(key)]:
            raise CheckpointError(
                f"{root}{path} has the key {wrong[0]!r} of type {_name(type(wrong[0]))}, which cannot be stored: "
                "take a text or a number for a key"
            )
        pairs = [
            [_encode(key, root, path, leaves, depth - 1), _encode(item, root, f"{path}[{key!r}]", leaves, depth - 1)]
            for key, item in value.items()
        ]
        return {kind.__name__: pairs}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, np.generic) and value.dtype.name in _DTYPES - _COMPLEX:
        return {"numpy": [value.dtype.name, value.item()]}
    if (tensor := _tensor(value)) is None:
        raise CheckpointError(f"{root}{path} is of type {_described(value)}, which cannot be stored: {_remedy(value)}")
    name = path.replace("%", "%25").replace("/", "%2F")
    leaves[name] = tensor
    return {"array" if kind is np.ndarray else "tensor": name}


def _decode(node: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Return the value of a `node` of the JSON."""
    if isinstance(node, list):
        return [_decode(item, leaves) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_decode(content, leaves))
    if kind in _DICTS:
        return _DICTS[kind]({_decode(key, leaves): _decode(item, leaves) for key, item in content})
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "numpy":
        return np.dtype(content[0]).type(content[1])
    if kind in ("tensor", "array"):
        tensor = leaves[content]
        assert isinstance(tensor, Tensor)
        return tensor if kind == "tensor" else tensor.numpy()
    raise CheckpointError(f"the checkpoint holds a {kind}, which this program does not know: update mpicomp")


def _is_key(key: Any) -> bool:
    """Return whether `key` can be stored as the key of a dict: it must be hashable when it is read again."""
    return type(key) in _SCALARS or isinstance(key, np.generic) or (type(key) is tuple and all(map(_is_key, key)))


def _tensor(value: Any) -> Tensor | None:
    """Return a tensor or an array as a plain tensor; None for other values, and for kinds that cannot be stored."""
    if type(value) is np.ndarray and value.dtype.name in _DTYPES and value.dtype.isnative:
        return torch.from_numpy(np.array(value))  # a copy, because torch warns of arrays that are read-only
    is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
    return value.detach() if is_plain and str(value.dtype).removeprefix("torch.") in _DTYPES else None


def _described(value: Any) -> str:
    """Return the type of a value; for a tensor or an array also the type of its entries."""
    if isinstance(value, Tensor):
        return f"{_name(type(value))} ({value.dtype}, {value.layout}, on {value.device})"
    return _name(type(value)) + (f" ({value.dtype})" if isinstance(value, np.ndarray | np.generic) else "")


def _remedy(value: Any) -> str:
    """Return the advice what to store instead of `value`."""
    if isinstance(value, Tensor):
        return "store a dense tensor of a common type, such as tensor.to_dense() or tensor.float()"
    if isinstance(value, np.ndarray | np.generic):
        return "store an array of booleans or numbers in the byte order of this machine, or a list"
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    if isinstance(value, set | frozenset):
        return "store a list, such as sorted(...)"
    for plain in (dict, list, tuple, str, int, float):
        if isinstance(value, plain):
            return f"store {plain.__name__}(...) of it"
    return "leave it out and make it anew at the start, from numbers, texts and tensors that you store"


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
