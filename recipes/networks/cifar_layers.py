"""What MobileNetV1 and MobileNetV2 for CIFAR have in common: blocks, norms, initial values.

Both come from TensorFlow: batch norms with eps 1e-3 that keep 0.9 of their averages, ReLU6, truncated normals.
"""

from __future__ import annotations

import math

from torch import nn

NORM_EPS, NORM_MOMENTUM = 1e-3, 0.1
DEPTHWISE_STD = 0.01
CUT = 2.0  # standard deviations at which the normals are truncated
CUT_STD = 0.87962566103423978  # standard deviation of what is left of N(0, 1) between -CUT and CUT


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with TensorFlow's settings."""
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride): a 3x3 convolution with padding 1, norm, ReLU6.

    TensorFlow's SAME pads at stride 2 after the map alone; the padding-free form is the same for either.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU6(inplace=True))


def set_initial_values(model: nn.Module) -> None:
    """Set the documents' initial values.

    Truncated normals: He by fan-in for 1x1 and 3x3 convolutions, a standard deviation of 0.01 for depthwise ones;
    Xavier's uniform ones for linear layers; biases 0, norms 1 and 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.groups == module.in_channels > 1:
                std = DEPTHWISE_STD
            else:
                std = math.sqrt(2 / module.weight[0].numel()) / CUT_STD
            nn.init.trunc_normal_(module.weight, std=std, a=-CUT * std, b=CUT * std)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
