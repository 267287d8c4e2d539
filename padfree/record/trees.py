"""Nested arguments and results: the tensors in them, copies of their containers, frozen forms.

Three walks, rather than `torch.utils._pytree`'s, which torch has no public name for: `collect` sees into mappings that
are not registered there (outputs of detectors), and `freeze` makes forms that compare and hash.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from padfree.indices import ValueId


class Ref(NamedTuple):
    """Stands for a tensor among an operation's recorded arguments."""

    value: ValueId


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def storage(tensor: torch.Tensor) -> int:
    """What tells storages apart while they live."""
    return int(tensor.untyped_storage()._cdata)


def geometry_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells values apart: storage, offset, shape and strides."""
    return (storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def collect(tree: Any, into: list[torch.Tensor]) -> None:
    """Every tensor in nested tuples, lists and mappings (and dataclass-like outputs), in order."""
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided:
            into.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            collect(item, into)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            collect(item, into)
    elif hasattr(tree, "tensors") and hasattr(tree, "image_sizes"):  # an ImageList-like holder
        collect(tree.tensors, into)


def tensors(tree: Any) -> list[torch.Tensor]:
    """Every tensor that `collect` finds."""
    found: list[torch.Tensor] = []
    collect(tree, found)
    return found


def mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Lists, tuples and dictionaries anew, with what `leaf` makes of everything else in them."""
    if type(tree) in (list, tuple):
        return type(tree)([mapped(item, leaf) for item in tree])
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[mapped(item, leaf) for item in tree])
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, mapped(item, leaf)) for key, item in tree.items())
    return leaf(tree)


def names(tree: Any, prefix: str = "") -> list[str]:
    """Where each tensor that `collect` finds lies, in order: "0", "out", "features.2"; "" for a bare tensor."""
    if isinstance(tree, torch.Tensor):
        return [prefix] if tree.layout == torch.strided else []
    if isinstance(tree, (tuple, list)):
        items: Iterable[tuple[Any, Any]] = enumerate(tree)
    elif isinstance(tree, Mapping):
        items = tree.items()
    else:
        items = [("tensors", tree.tensors)] if hasattr(tree, "tensors") and hasattr(tree, "image_sizes") else []
    return [name for key, item in items for name in names(item, f"{prefix}.{key}" if prefix else str(key))]


def containers_copied(tree: Any) -> Any:
    """The same tensors in new lists, tuples and dictionaries, which nobody else can change."""
    return mapped(tree, lambda item: item)


def repeat_batch(tree: Any) -> Any:
    """The arguments with batches of one doubled: batch norms in train mode need two values a channel."""
    return mapped(tree, _doubled)


def _doubled(item: Any) -> Any:
    alone = isinstance(item, torch.Tensor) and item.dim() > 1 and item.shape[0] == 1
    return item.expand(2, *item.shape[1:]).clone() if alone else item


def to_meta(tree: Any) -> Any:
    """The same arguments with their tensors on the meta device."""
    return mapped(tree, lambda item: item.to("meta") if isinstance(item, torch.Tensor) else item)


def freeze(tree: Any, index: Callable[[torch.Tensor], ValueId]) -> Any:
    """Nested arguments as nested tuples, tensors as `Ref`."""
    if isinstance(tree, torch.Tensor):
        return Ref(index(tree)) if tree.layout == torch.strided else "sparse"
    if isinstance(tree, (tuple, list)):
        return tuple(freeze(item, index) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, freeze(item, index)) for key, item in tree.items())
    if isinstance(tree, float) and math.isnan(tree):
        return "nan"
    if isinstance(tree, torch.ScriptObject):  # a profiler's record: nothing to compare
        return type(tree).__name__
    return tree
