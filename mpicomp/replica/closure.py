"""What the closure of a step may return, and whether it has run the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpicomp.errors import ConfigError


def finish_backward(loss: object, has_backward: bool, has_gradients: bool) -> Tensor:
    """Run the backward pass of `loss` unless the closure has run it; return the loss, NaN if the closure has none.

    Args:
        loss: what the closure returned.
        has_backward: whether a backward pass reached a parameter within the closure.
        has_gradients: whether the closure left gradients, by a backward pass or by writing them.

    Raises:
        ConfigError: the closure returned no loss, or ran another backward pass than that of its loss.

    """
    if has_backward and isinstance(loss, Tensor) and _awaits_backward(loss):
        raise ConfigError(
            "the closure has run a backward pass, but not that of the loss that it returned (or that one with "
            "retain_graph=True, which looks the same): run all backward passes of the step in the closure, "
            "and return loss.detach(); or none, and return the sum of the losses. After a backward pass for "
            "another purpose, as for adversarial inputs, call gossip.optimizer.zero_grad()"
        )
    if not isinstance(loss, Tensor) and not (has_gradients and isinstance(loss, float | int | None)):
        raise ConfigError(
            f"the closure returned {type(loss).__name__}: return the loss, a scalar tensor. One that calls "
            "loss.backward() itself may return a number or None as well"
        )
    if isinstance(loss, Tensor) and not has_gradients:
        torch.autograd.backward(loss)
    return torch.as_tensor(torch.nan if loss is None else loss).detach()


def _awaits_backward(loss: Tensor) -> bool:
    """Return whether the graph of `loss` is still there: a backward pass frees what its nodes have saved.

    A graph that has saved nothing tells nothing, and counts as one whose backward pass has run.
    """
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    is_there = False
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        try:
            saved = [getattr(node, name) for name in names]
        except RuntimeError:  # has been freed
            return False
        is_there = is_there or any(isinstance(s, Tensor) or (isinstance(s, tuple) and s) for s in saved)
        nodes.extend(following for following, _ in node.next_functions)
    return is_there
