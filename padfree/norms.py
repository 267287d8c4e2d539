"""Batch norms with a forward of their own: whether it is the norm, and then children of theirs, and nothing else.

Norms that carry their activation (timm's `BatchNormAct2d`, say) are such. Found out by running a copy with stand-ins
for its children while every function of torch's is watched, in this thread only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["children_behind"]


def children_behind(norm: nn.BatchNorm2d) -> tuple[str, ...] | None:
    """The children that a norm's forward calls on the norm's result in eval mode, in order; None where it does more.

    Args:
        norm: with a forward of its own; it is not changed.
    """
    if norm.training:
        return None
    try:
        return _watched(norm)
    except Exception:  # whatever a forward of the user's raises here, it is called as it is
        return None


def _watched(norm: nn.BatchNorm2d) -> tuple[str, ...] | None:
    called: list[tuple[str, Any, Any]] = []
    twin = copy.deepcopy(norm)
    twin._modules = {name: _StandIn(name, called) for name in norm._modules}
    before = _settings(twin)
    x = torch.empty(2, norm.num_features, 3, 3).normal_(generator=torch.Generator().manual_seed(0))
    watch = _Watch()
    with torch.no_grad(), watch:
        result = twin.forward(x)
    if len(watch.norms) != 1 or watch.others or _settings(twin) != before:
        return None
    arguments, out = watch.norms[0]
    expected = (x, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, twin.eps)
    same = all(a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(arguments, expected, strict=True))
    for _, given, passed_on in called:
        same = same and given is out
        out = passed_on
    return tuple(name for name, _, _ in called) if same and result is out else None


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in module.__dict__.items() if name[0] != "_"}
    return {name: repr(value) for name, value in own.items()}


class _StandIn(nn.Module):
    def __init__(self, name: str, called: list[tuple[str, Any, Any]]) -> None:
        super().__init__()
        self.note = (name, called)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.view_as(x)
        self.note[1].append((self.note[0], x, out))
        return out


class _Watch(TorchFunctionMode):
    """Keeps the arguments of each `F.batch_norm`, and counts what may not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[tuple[tuple[Any, ...], torch.Tensor]] = []
        self.others = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            self.norms.append((_ordered(*args, **(kwargs or {})), out))
        elif func not in _HARMLESS:
            self.others += 1
        return out


_HARMLESS = {torch._assert, torch.Tensor.dim, torch.Tensor.ndim.__get__, torch.Tensor.view_as}  # type: ignore[attr-defined]


def _ordered(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    return input, running_mean, running_var, weight, bias, training, eps
