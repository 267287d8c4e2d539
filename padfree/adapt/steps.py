"""Where a tape has a place's pool and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from padfree.adapt.places import Place
from padfree.adapt.tape import Tape

CONVS = ("convolution",)
POOLS = ("max_pool_values", "max_pool_taps", "max_pool2d_with_indices", "max_pool2d")


def pool_step(tape: Tape, place: Place) -> int:
    """The step that is a place's pool."""
    path, ordinal = place.pool
    return tape.find(path, *POOLS)[ordinal]


def conv_step(tape: Tape, path: str) -> int:
    """The step that is a convolution module's."""
    return tape.find(path, *CONVS)[0]


def without_pool(func: Callable[..., Any]) -> Callable[..., Any]:
    """What to run in the place of a pool's operator, to see a network without it."""

    def nothing(*args: Any, **kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        return tuple(map(torch.zeros_like, made)) if isinstance(made, tuple) else torch.zeros_like(made)

    return nothing
