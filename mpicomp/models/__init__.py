"""The models that a run can train; each family in a file of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mpicomp.data.dataset import Task
from mpicomp.models.base import Problem
from mpicomp.models.gpt import gpt
from mpicomp.models.lenet import lenet5
from mpicomp.models.linear import logistic, mlp
from mpicomp.models.lstm import lstm
from mpicomp.models.resnet import resnet20
from mpicomp.models.vgg import vgg11
from mpicomp.plugins import make
from mpicomp.state import TORCH_GENERATOR

__all__ = ["MODELS", "Problem", "build"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "mlp": mlp,
    "lenet5": lenet5,
    "resnet20": resnet20,
    "vgg11": vgg11,
    "lstm": lstm,
    "gpt": gpt,
}


def build(
    kind: str,
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    *,
    task: Task = "classification",
    data_kind: str | None = None,
    **params: object,
) -> nn.Module:
    """Build a model on the CPU whose initial parameters depend on the arguments alone.

    The state of torch's global generator is the same afterwards as before; safe to call from several threads.

    Args:
        kind: a name in `MODELS`, an import path, or a name that a package offers (see `mpicomp.plugins`).
        input_shape: of one input, see `Problem`.
        classes: how many numbers a prediction has.
        seed: of the initialization, in ``[0, 2**64)``.
        task: see `Problem`.
        data_kind: the name of the data set, for messages.
        params: the further arguments of that model, e.g. ``hidden``.

    Raises:
        ConfigError: an unknown `kind` or parameter, a value out of its range, or data that the model cannot read.

    """
    problem = Problem(tuple(input_shape), classes, task, data_kind)
    # The ranks of one process share the generator that initialization draws from.
    with TORCH_GENERATOR, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the generators of all GPUs too.
        torch.default_generator.manual_seed(seed)
        model: nn.Module = make("model.kind", kind, MODELS, nn.Module, problem, **params)
        return model
