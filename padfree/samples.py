"""Random images that a model can take, and the tensors in what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["random_images", "size_text", "tensors"]


def random_images(model: nn.Module, size: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    """(batch, *size) of values from 0 to 1, the same at every call, of the model's type and on its device."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.rand((batch, *size), generator=torch.Generator().manual_seed(0))
    return images.to(weight.device, weight.dtype)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested lists, tuples and dicts, in their order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_text(size: tuple[int, ...]) -> str:
    """A size in messages: 3x224x224."""
    return "x".join(map(str, size))
