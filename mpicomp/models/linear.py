"""Logistic regression and the multilayer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from mpicomp.data.arguments import require_positive
from mpicomp.errors import ConfigError
from mpicomp.models.base import Problem


def logistic(problem: Problem) -> nn.Module:
    """Multinomial logistic regression: ``logits = W x + b``, convex; starts at zero."""
    problem.require_numbers("logistic")
    layer = nn.Linear(math.prod(problem.input_shape), problem.classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def mlp(problem: Problem, hidden: Sequence[int] = (128,)) -> nn.Module:
    """Fully connected layers of the widths `hidden`, with ReLU between them.

    Raises:
        ConfigError: no hidden layer, or an empty one.

    """
    problem.require_numbers("mlp")
    if not hidden:
        raise ConfigError("model.hidden = []: must name at least one width. For none use model.kind = 'logistic'.")
    require_positive("model", hidden=min(hidden))
    widths = [math.prod(problem.input_shape), *hidden, problem.classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
