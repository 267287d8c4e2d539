"""Types of a forward's parameters, for generated code."""

from __future__ import annotations

import types
import typing
from typing import Any

import torch
from torch import nn


def parameter_types(module: nn.Module) -> dict[str, Any]:
    """The types of a forward's parameters that are made of tensors, numbers and `typing`: TorchScript needs them."""
    try:
        hints = typing.get_type_hints(type(module).forward)
    except Exception:  # they name what only type checkers see
        return {}
    return {name: hint for name, hint in hints.items() if _is_plain(hint)}


def without_none(hint: Any) -> Any:
    """`Tensor` for `Optional[Tensor]`."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and len(parts) == 1
    return parts[0] if optional else hint


def _is_plain(hint: Any) -> bool:
    parts = typing.get_args(hint)
    if not parts:
        return hint in (torch.Tensor, int, float, bool, str, type(None))
    return typing.get_origin(hint) in (list, tuple, dict, typing.Union, types.UnionType) and all(map(_is_plain, parts))
