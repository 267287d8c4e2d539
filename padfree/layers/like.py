"""Fresh copies of a network's own norms and activations, for new layers."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from padfree.types import KEPT


class LastChannelNorm(nn.Module):
    """A norm over the last axis, such as `nn.LayerNorm`, on (N, C, H, W)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


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
                duplicate._modules[name] = nn.Identity()  # past the lock of a converted network
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
    """The same module with its hooks taken off, and free to be set anew."""
    for child in module.modules():
        for name, table in list(child.__dict__.items()):
            if name.endswith("_hooks") and name.startswith(("_forward", "_backward")):
                child.__dict__[name] = OrderedDict() if isinstance(table, OrderedDict) else table
        child.__dict__.pop(KEPT, None)
    return module
