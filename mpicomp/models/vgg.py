"""VGG-11 for small images: eight convolutions and one fully connected layer.

Simonyan and Zisserman 2015, arXiv 1409.1556, configuration A. The three wide fully connected layers of the paper, made
for 224x224, become one, as is usual for 32x32; no dropout.
"""

from __future__ import annotations

from torch import nn

from mpicomp.models.base import Problem
from mpicomp.models.normalization import Norm, activate, normalize, require_norm

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""The widths of the convolutions; a 2x2 max pooling ends each stage."""

SIDES = (28, 32)


def vgg11(problem: Problem, norm: Norm = "batch", groups: int = 2) -> nn.Module:
    """Build VGG-11 for images of 28x28 (padded to 32x32) or 32x32.

    Args:
        problem: the images.
        norm: ``"batch"``, ``"group"``, ``"evonorm"`` or ``"none"`` (then the convolutions have biases).
        groups: of the channels, for ``"group"`` and ``"evonorm"``.

    Raises:
        ConfigError: other data, or groups that do not divide the 64 channels of the first stage.

    """
    inputs, height, width = problem.require_images("vgg11")
    if height != width or height not in SIDES:
        raise problem.refuse("vgg11", "images of 28x28 or 32x32")
    require_norm(norm, groups, STAGES[0][0])
    layers: list[nn.Module] = [nn.ZeroPad2d((32 - height) // 2)]
    for stage in STAGES:
        for outputs in stage:
            layers += [_convolution(inputs, outputs, norm), normalize(norm, outputs, groups), activate(norm)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, problem.classes))


def _convolution(inputs: int, outputs: int, norm: Norm) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
