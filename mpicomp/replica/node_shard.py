"""The shard of a rank whose node holds one model: what an algorithm sees instead of the whole flat vectors.

A step of the ranks of one node, with the algorithm running between the nodes, on each shard by itself:

    g = the rank's own gradient                      (n,)
    shard of g = its mean over the node              reduce-scatter
    the algorithm, on the shards of x and g          messages to the same shard of the neighbor nodes
        where it takes the optimizer's step:         all-gather of g; every rank of the node takes the same step
    x = the shards of all                            all-gather

So a node is to the others what a rank with a larger batch would be. All ranks of a node hold the same model, and each
holds the public copies and error memories of its shard only. A shard is compressed by itself. A norm by which a method
clips is that of the whole vector, summed over the node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpicomp.compression.message import Spec
from mpicomp.exchange.base import Node
from mpicomp.replica.flat import FlatModel

ROUNDED = 8
"""A cut is moved to the end of a row of its tensor if a shard has more than so many of these rows."""


class NodeShard:
    """The `Local` of an algorithm that runs between nodes.

    Attributes:
        x: the shard of the parameters, a view.
        g: the shard of the gradient, a view.
        spec: of the tensors in it; a tensor that is cut becomes a piece of whole rows, or a vector.

    """

    def __init__(self, whole: FlatModel, node: Node) -> None:
        self._whole = whole
        self._node = node
        self._shards = cut(whole.spec, node.size)
        self._own = self._shards[node.place]
        self.x = whole.x[self._own]
        self.g = whole.g[self._own]
        self.spec = part_of(whole.spec, self._own)

    @property
    def groups(self) -> Sequence[tuple[slice, Mapping[str, Any]]]:
        """The parts of the shard, each with the optimizer's group of its parameters."""
        parts = [(self._in_shard(part), group) for part, group in self._whole.groups]
        return [(part, group) for part, group in parts if part.start < part.stop]

    def frozen_parts(self) -> list[slice]:
        """Return the parts of the shard that belong to frozen parameters, in order."""
        parts = map(self._in_shard, self._whole.frozen_parts())
        return [part for part in parts if part.start < part.stop]

    @property
    def momentum(self) -> float:
        """The momentum of the optimizer, 0 if it has none."""
        return self._whole.momentum

    @property
    def optimizer_classes(self) -> list[type[Optimizer]]:
        """The class of the optimizer."""
        return self._whole.optimizer_classes

    @property
    def skips_update(self) -> bool:
        """Whether `update` does nothing."""
        return self._whole.skips_update

    def norm(self, x: Tensor) -> Tensor:
        """Return the Euclidean norm of a vector (n,) whose shard is `x`, the same on all ranks of the node."""
        squares = torch.zeros(self._node.size, dtype=torch.float64, device=x.device)
        squares[self._node.place] = x.norm().double().square()
        self._node.gather_shards_(squares, [slice(place, place + 1) for place in range(self._node.size)])
        return squares.sum().sqrt().to(x.dtype)

    def share_gradient(self) -> None:
        """Average the shard of the gradient over the node."""
        self._node.mean_shard_(self._whole.g, self._shards)

    def share_model(self) -> None:
        """Take over the shards of the model from the other ranks of the node."""
        self._node.gather_shards_(self._whole.x, self._shards)

    def update(self, part: slice | None = None) -> None:
        """Take the optimizer's step on the whole model with the gradients of all shards.

        `part` may be an empty slice only, with which the optimizer counts a step and changes nothing.
        """
        if part is None:
            self._node.gather_shards_(self._whole.g, self._shards)
        elif part.start != part.stop:
            raise ValueError(f"part = {part}: a shard is updated as a whole")
        self._whole.update(part)

    def _in_shard(self, part: slice) -> slice:
        """Return the place in the shard of what it has of `part` of the whole vector."""
        first, end = self._own.start, self._own.stop
        return slice(max(part.start, first) - first, min(part.stop, end) - first)


def cut(spec: Spec, count: int) -> list[slice]:
    """Cut a flat vector into `count` shards of about equal size, if possible between rows of its tensors."""
    cuts = [0]
    for number in range(1, count):
        exact, begin = spec.numel * number // count, 0
        for shape in spec.shapes:
            numel = math.prod(shape)
            if exact < begin + numel:
                row = numel // shape[0] if shape else 1
                if row * ROUNDED * count <= spec.numel:
                    exact = begin + row * round((exact - begin) / row)
                break
            begin += numel
        cuts.append(exact)
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], spec.numel], strict=True)]


def part_of(spec: Spec, part: slice) -> Spec:
    """Return the spec of a part of a flat vector."""
    names, shapes, begin = [], [], 0
    for name, shape in zip(spec.names, spec.shapes, strict=True):
        numel = math.prod(shape)
        start, stop = max(part.start, begin), min(part.stop, begin + numel)
        if start < stop:
            row = numel // shape[0] if shape else 1
            is_rows = (start - begin) % row == 0 and (stop - begin) % row == 0
            names.append(name)
            if stop - start == numel:
                shapes.append(shape)
            else:
                shapes.append(((stop - start) // row, *shape[1:]) if is_rows else (stop - start,))
        begin += numel
    return Spec(tuple(names), tuple(shapes), spec.dtype)
