"""Activations with a class of their own, whose forward calls one function of torch's on its input and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import torch

from padfree.forwards import Calls, names_no_more

__all__ = ["function_behind"]

_NAMES = frozenset(("nn", "functional", "relu", "relu6", "hardswish", "silu", "gelu"))


@functools.lru_cache(maxsize=256)
def function_behind(forward: Any) -> tuple[Any, dict[str, Any]] | None:
    """The function, and its settings by name; None where the forward does, or reads, anything else.

    Args:
        forward: of a class; it reads no attribute of the module, so that one answer is true of all.
    """
    if not names_no_more(forward, _NAMES):
        return None
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    calls = Calls()
    try:
        with torch.no_grad(), calls:
            result = forward(None, x)
    except Exception:  # whatever a forward of the user's raises here, it is called as it is
        return None
    if len(calls.seen) != 1:
        return None
    function, args, settings, out = calls.seen[0]
    whole = len(args) == 1 and args[0] is x and result is out
    return (function, {key: value for key, value in settings.items() if key != "inplace"}) if whole else None
