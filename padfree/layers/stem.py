"""The new layers: what a conversion adds to a network, and how it is initialised.

New convolutions have no bias and torch's default initial values; new norms and activations copy
their neighbour's class and settings with fresh statistics (the paper, Hybrid stem, Projection shortcut).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padfree.kernels import max_pool


class StemPool(nn.MaxPool2d):
    """3x3 `nn.MaxPool2d` with padding 1 by the fastest exact way (`padfree.kernels`).

    (N, C, H, W) -> (N, C, ceil(H/s), ceil(W/s)).
    """

    def __init__(self, stride: int) -> None:
        super().__init__(3, stride, padding=1)
        self.step = stride

    def forward(self, input: Tensor) -> Tensor:
        """Pool."""
        return max_pool(input, 3, self.step, 1)


def _absorbed(pool: nn.Module) -> nn.Module:
    """An absorbed 3x3 `nn.MaxPool2d` with padding 1 becomes a `StemPool`: same object, hooks and settings."""
    if type(pool) is nn.MaxPool2d and not pool.ceil_mode and not pool.return_indices:
        settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        kernel, stride, padding, dilation = ({s} if isinstance(s, int) else set(s) for s in settings)
        if kernel == {3} and padding == {1} and dilation == {1} and len(stride) == 1:
            pool.__class__ = StemPool
            pool.__dict__["step"] = int(stride.pop())
    return pool


class StemTail(nn.Module):
    """The second half of the hybrid stem (the paper, Hybrid stem), after the stem's own conv, norm and act.

    (N, C, H, W) -> (N, C, H/s, W/s). A depthwise 3x3 beside a 3x3 max-pool, concatenated (depthwise first),
    then a 1x1 convolution 2C -> C. The original end of the stem's chain that it takes the place of is its
    child `end`. With `residual` the stem's output (after an absorbed max-pool) is added back.

    Args:
        channels: C.
        stride: s, that of the max-pool it absorbs, else 1.
        norms: norms of C channels after the depthwise conv and after the 1x1; in the pre-activation form of
            C and of 2C channels, before each conv.
        acts: one activation for each of them.
        end: the parameter-free module whose place it takes; it runs first, unless it is the absorbed pool.
        absorbs: `end` is the max-pool; it becomes the pool branch.
        preact: norm -> act -> conv instead of conv -> norm -> act.
    """

    __constants__ = ("has_end", "preact", "residual")  # so that TorchScript compiles one side of each `if`

    def __init__(
        self,
        channels: int,
        norms: tuple[nn.Module | None, nn.Module | None],
        acts: tuple[nn.Module | None, nn.Module | None],
        end: nn.Module | None = None,
        *,
        stride: int = 1,
        absorbs: bool = False,
        residual: bool = False,
        preact: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.preact = preact
        if end is not None and not absorbs:
            self.end = end
        self.has_end = end is not None and not absorbs
        self.conv_dw = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.norm1 = _or_identity(norms[0])
        self.act1 = _or_identity(acts[0])
        self.pool = _absorbed(end) if end is not None and absorbs else StemPool(stride)
        self.conv_pw = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm2 = _or_identity(norms[1])
        self.act2 = _or_identity(acts[1])

    def forward(self, x: Tensor) -> Tensor:
        """Run the tail on the stem's output."""
        if self.has_end:
            x = self.end(x)
        pooled = self.pool(x)
        if self.preact:
            # norm and act copies may work in place, so x is pooled first and kept out of their reach
            left = self.conv_dw(self.act1(self.norm1(x)))
            out: Tensor = self.conv_pw(self.act2(self.norm2(torch.cat((left, pooled), 1))))
        else:
            left = self.act1(self.norm1(self.conv_dw(x)))
            out = self.act2(self.norm2(self.conv_pw(torch.cat((left, pooled), 1))))
        if self.residual:
            out = out + (x if self.conv_dw.stride[0] == 1 else pooled)
        return out


def _or_identity(module: nn.Module | None) -> nn.Module:
    return nn.Identity() if module is None else module
