"""The layers of downsampling shortcuts (the paper, Dense downsampling, Projection shortcut)."""

from __future__ import annotations

from torch import Tensor, nn

from padfree.kernels import shortcut_pool


class PoolProjection(nn.Module):
    """Max-pool shortcut of a convolution that changes the number of channels (the paper, Dense downsampling).

    (N, C_in, H, W) -> (N, C_out, floor((H-3)/2)+1, floor((W-3)/2)+1): max-pool, then a 1x1 convolution
    without bias, norm or activation.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, padding: int = 0) -> None:
        super().__init__()
        self.kernel = kernel
        self.padding = padding
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pool and project."""
        projected: Tensor = self.conv(shortcut_pool(x, self.kernel, self.padding))
        return projected


class DepthwiseReduction(nn.Sequential):
    """What shrinks a projection shortcut: depthwise 3x3 stride 2 without padding, then a norm.

    (N, C, H, W) -> (N, C, floor((H-3)/2)+1, floor((W-3)/2)+1); the paper, Projection shortcut.
    """

    def __init__(self, channels: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, groups=channels, bias=False)
        self.norm = nn.Identity() if norm is None else norm
