"""Norms, activations, sums, products and means on meta tensors: torch's own kernels take up to 50 times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode as TorchDispatchMode,  # documented, in a module without a public name
)

_UNARY = frozenset({"hardswish", "hardsigmoid", "silu", "hardtanh", "gelu", "sigmoid", "relu", "leaky_relu", "mish"})
_BINARY = frozenset({"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"})
_BINARY_INPLACE = frozenset({"add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor"})
_KINDS: dict[Any, str] = {}


def kind_of(func: Any) -> str:
    """An ATen operator's name without its overload: "add" of `aten.add.Tensor`."""
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = func.__name__.split(".")[0]
    return kind


def quick_meta(func: Any, args: Any) -> Any:
    """The outputs of an operation on meta tensors; None for all but those that are known here.

    Args:
        func: the ATen operator.
        args: its positional arguments.
    """
    kind = kind_of(func)
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or not x.is_meta:
        return None
    if func.__name__ == "add_.Tensor" and x.dtype == torch.int64 and x.dim() == 0:  # a norm counts its batches
        return x if type(args[1]) is int else None
    if not x.is_floating_point():
        return None
    if kind == "native_batch_norm":
        count = x.shape[1] if args[5] else 0
        statistics = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
        return (_like(x), *statistics)
    if kind.rstrip("_") in _UNARY:
        return x if kind.endswith("_") else _like(x)
    name = func.__name__
    if name in _BINARY or name in _BINARY_INPLACE:
        return _binary(x, args[1], name in _BINARY_INPLACE)
    if name == "mean.dim" and len(args) > 1:
        return _mean(x, args[1], bool(len(args) > 2 and args[2]))
    return None


def _like(x: torch.Tensor) -> torch.Tensor:
    """What `torch.empty_like` gives, which is slow on meta tensors."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.new_empty_strided(x.shape, x.stride()) if dense and 0 not in x.shape else torch.empty_like(x)


def _binary(x: torch.Tensor, other: Any, inplace: bool) -> torch.Tensor | None:
    """Of two maps of one shape and layout, or of a contiguous map and one that is broadcast over it."""
    if not isinstance(other, torch.Tensor) or not other.is_meta or other.dtype != x.dtype or other.dim() != x.dim():
        return None
    same = x.shape == other.shape
    if not same and any(b not in (a, 1) for a, b in zip(x.shape, other.shape, strict=True)):
        return None  # broadcast the other way, or an error of torch's to raise
    if inplace:
        return x
    if 0 in x.shape:
        return None
    if same and x.stride() == other.stride():
        return _like(x)
    plain = x.is_contiguous() and not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.new_empty(x.shape) if plain and other.is_contiguous() else None


def _mean(x: torch.Tensor, axes: Any, keep: bool) -> torch.Tensor | None:
    """Of a contiguous map over some of its axes."""
    if not isinstance(axes, (list, tuple)) or not axes or not x.is_contiguous() or 0 in x.shape:
        return None
    if any(not -x.dim() <= axis < x.dim() for axis in axes):
        return None
    over = {axis % x.dim() for axis in axes}
    if len(over) < len(axes):
        return None
    sides = [1 if axis in over else side for axis, side in enumerate(x.shape) if keep or axis not in over]
    return x.new_empty(sides)


class QuickMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Forwards run under it on meta tensors only find their shapes, or what does not fit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None if kwargs else quick_meta(func, args)
        return func(*args, **(kwargs or {})) if result is None else result
