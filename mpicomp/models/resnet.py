"""ResNet-20 for small images: three stages of three residual blocks with 16, 32 and 64 channels.

He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2, with the parameter-free
shortcuts of its option A. 269,722 parameters with batch normalization on 3x32x32 and ten classes. With EvoNorm-S0,
which activates too, nothing is applied after the sum of a block.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mpicomp.models.base import Problem
from mpicomp.models.normalization import Norm, activate, normalize, require_norm

WIDTHS = (16, 32, 64)
BLOCKS = 3


class Block(nn.Module):
    """``y = act(F(x) + shortcut(x))`` with two 3x3 convolutions in F.

    Shape:
        (b, inputs, H, W) -> (b, outputs, H / stride, W / stride), rounded up

    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.widen = outputs - inputs
        self.residual = nn.Sequential(
            _convolution(inputs, outputs, stride),
            normalize(norm, outputs, groups),
            activate(norm),
            _convolution(outputs, outputs, 1),
            normalize(norm, outputs, groups),
        )
        self.activation = activate(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations (b, outputs, H / stride, W / stride)."""
        # Option A: drop pixels, and let the new channels start at zero.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.widen))
        activated: Tensor = self.activation(self.residual(x) + shortcut)
        return activated


def resnet20(problem: Problem, norm: Norm = "batch", groups: int = 2) -> nn.Module:
    """Build ResNet-20.

    Args:
        problem: images of any size; 3x32x32 in the paper.
        norm: ``"batch"``, ``"group"``, ``"evonorm"`` or ``"none"``.
        groups: of the channels, for ``"group"`` and ``"evonorm"``.

    Raises:
        ConfigError: the data are no images, or the groups do not divide the 16 channels of the first stage.

    """
    channels, _, _ = problem.require_images("resnet20")
    require_norm(norm, groups, WIDTHS[0])
    layers = [_convolution(channels, WIDTHS[0], 1), normalize(norm, WIDTHS[0], groups), activate(norm)]
    inputs = WIDTHS[0]
    for stage, outputs in enumerate(WIDTHS):
        for block in range(BLOCKS):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(inputs, outputs, stride, norm, groups))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, problem.classes))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
