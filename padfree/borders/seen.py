"""What the elements of a tensor see: a field, and a table of its positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from padfree.borders.field import Field


@dataclass
class Buffer:
    """A tensor that others are copied into: what its positions see now."""

    field: Field


@dataclass(frozen=True)
class Seen:
    """What a value sees: `index` has its shape and holds positions of the field; None: the map itself, (N, C, H, W)."""

    held: Field | Buffer
    index: Tensor | None = field(default=None, repr=False)

    @property
    def field(self) -> Field:
        """The field, as it is now."""
        return self.held.field if isinstance(self.held, Buffer) else self.held


@dataclass(frozen=True)
class Unknown:
    """A value that could not be followed, and the operation that stands in the way."""

    reason: str


def starts(known: Sequence[Field]) -> list[int]:
    """Where the positions of each field begin once they are put side by side."""
    ends = itertools.accumulate(len(each.inside) for each in known)
    return [0, *ends][:-1]


def narrowed(index: Tensor) -> Tensor:
    """The same table with every axis along which it is constant cut to one."""
    for axis, size in enumerate(index.shape):
        if size > 1:
            first = index.narrow(axis, 0, 1)
            if index.stride(axis) == 0 or bool((index == first).all()):
                index = first
    return index
