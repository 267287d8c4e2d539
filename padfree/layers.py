"""The new layers: what a conversion adds to a network, and how it is initialised.

New convolutions have no bias and torch's default initial values; new norms and activations copy
their neighbour's class and settings with fresh statistics (paper.md, Hybrid stem, Projection shortcut).
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from padfree.pooling import max_pool, shortcut_pool


class PoolProjection(nn.Module):
    """Max-pool shortcut of a convolution that changes the number of channels (paper.md, Dense downsampling).

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

    (N, C, H, W) -> (N, C, floor((H-3)/2)+1, floor((W-3)/2)+1); paper.md, Projection shortcut.
    """

    def __init__(self, channels: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, groups=channels, bias=False)
        self.norm = nn.Identity() if norm is None else norm


class StemPool(nn.MaxPool2d):
    """3x3 `nn.MaxPool2d` with padding 1 by the fastest exact way (`padfree.pooling`).

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
        kernel, stride, padding, dilation = (set(_pair(setting)) for setting in settings)
        if kernel == {3} and padding == {1} and dilation == {1} and len(stride) == 1:
            pool.__class__ = StemPool
            pool.__dict__["step"] = int(stride.pop())
    return pool


class StemTail(nn.Module):
    """The second half of the hybrid stem (paper.md, Hybrid stem), after the stem's own conv, norm and act.

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


class LastChannelNorm(nn.Module):
    """A norm over the last axis, such as `nn.LayerNorm`, on (N, C, H, W)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def _or_identity(module: nn.Module | None) -> nn.Module:
    return nn.Identity() if module is None else module


def norm_like(norm: nn.Module, channels: int, *, with_act: bool = True) -> nn.Module:
    """A fresh norm of `channels` channels with the class and settings of `norm`.

    Args:
        norm: any norm layer whose state has one entry a channel.
        channels: what the copy normalises.
        with_act: keep an activation that is part of the norm (timm's BatchNormAct2d).
    """
    duplicate = without_hooks(copy.deepcopy(norm))
    old = _channels(norm)
    for module in duplicate.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.dim() > 0 and (old in tensor.shape or name in _USUAL_NAMES):
                    shape = [channels if side == old else side for side in tensor.shape]
                    fresh = tensor.detach().new_full(shape, _fresh_value(name, tensor))
                    table[name] = nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh
                elif tensor is not None and tensor.dim() == 0:
                    table[name] = torch.zeros_like(tensor)
        for name in ("num_features", "num_channels"):
            if getattr(module, name, None) == old:
                setattr(module, name, channels)
        if getattr(module, "normalized_shape", None) == (old,):
            module.__dict__["normalized_shape"] = (channels,)
        if isinstance(module, nn.GroupNorm):
            module.num_groups = math.gcd(channels, module.num_groups)
    if not with_act:
        for name, child in duplicate.named_children():
            if not list(child.parameters()):
                setattr(duplicate, name, nn.Identity())
    return duplicate


_USUAL_NAMES = ("weight", "bias", "running_mean", "running_var")  # of norms over whole maps too


def _fresh_value(name: str, tensor: Tensor) -> float:
    """What a fresh norm has in a parameter or buffer: 0 or 1, for names of a user's own by what it holds now."""
    if name in ("weight", "running_var"):
        return 1.0
    if name in ("bias", "running_mean") or tensor.is_meta or not tensor.is_floating_point():
        return 0.0
    mean = float(tensor.detach().float().mean())
    return float(abs(mean - 1) < abs(mean))


def _channels(norm: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(norm, name, None), int):
            return int(getattr(norm, name))
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.dim() > 0:
            return int(tensor.numel())
    return 0


def act_like(act: nn.Module, *, inplace: bool = True) -> nn.Module:
    """A fresh copy of an activation; `inplace=False` where its input has other readers."""
    duplicate = without_hooks(copy.deepcopy(act))
    for module in duplicate.modules():
        if not inplace and getattr(module, "inplace", None) is True:
            module.__dict__["inplace"] = False
    return duplicate


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module with its hooks taken off."""
    for child in module.modules():
        for name, table in list(child.__dict__.items()):
            if name.endswith("_hooks") and name.startswith(("_forward", "_backward")):
                child.__dict__[name] = OrderedDict() if isinstance(table, OrderedDict) else table
    return module
