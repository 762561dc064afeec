"""LeNet-5: two convolutions and three fully connected layers.

LeCun et al. 1998, "Gradient-based learning applied to document recognition", with ReLU and max pooling in place of
scaled tanh and trainable subsampling, and all maps connected, as is usual today. 61,706 parameters on 1x28x28 and ten
classes.
"""

from __future__ import annotations

from torch import nn

from mpicomp.models.base import Problem

SIDES = (28, 32)


def lenet5(problem: Problem) -> nn.Module:
    """Build LeNet-5 for images of 28x28 (padded to 32x32, as in the paper) or 32x32."""
    channels, height, width = problem.require_images("lenet5")
    if height != width or height not in SIDES:
        raise problem.refuse("lenet5", "images of 28x28 or 32x32")
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=(32 - height) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, problem.classes),
    )
