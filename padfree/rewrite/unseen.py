"""What a forward does that operations on meta tensors show no trace of."""

from __future__ import annotations

import pickle
import random
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_UNSEEN = (  # what operations on meta tensors show no trace of, and a generated forward would lose
    (torch.autocast, "__enter__", "switches autocast on or off"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "decides what is kept for the backward pass"),
    (torch.autograd.Function, "apply", "calls an autograd function, whose backward is its own"),
    (torch.profiler.record_function, "__enter__", "marks a stretch for the profiler"),
    (torch, "is_grad_enabled", "asks whether gradients are on"),
    (torch, "is_inference_mode_enabled", "asks whether inference mode is on"),
    (torch, "is_autocast_enabled", "asks whether autocast is on"),
)


@contextmanager
def noting_unseen() -> Iterator[list[str]]:
    """Collects which of `_UNSEEN` are called meanwhile by this thread."""
    noted: list[str] = []
    here = threading.get_ident()

    def noting(owner: Any, found: Any, does: str) -> Any:
        by_class = isinstance(found, (classmethod, types.ClassMethodDescriptorType))

        def asked(*args: Any, **kwargs: Any) -> Any:
            library = str(sys._getframe(1).f_globals.get("__name__")).startswith(("torch.", "padfree."))
            if threading.get_ident() == here and not library:
                noted.append(does)
            return found(*args, **kwargs)

        if isinstance(owner, types.ModuleType):
            return asked

        def note(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                noted.append(does)
            return found.__get__(None, owner)(*args, **kwargs) if by_class else found(owner, *args, **kwargs)

        return classmethod(note) if by_class else note

    usual = [(owner, name, vars(owner)[name]) for owner, name, _ in _UNSEEN]
    for owner, name, does in _UNSEEN:
        setattr(owner, name, noting(owner, vars(owner)[name], does))
    try:
        yield noted
    finally:
        for owner, name, found in usual:
            setattr(owner, name, found)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees random numbers that are drawn while tracing, which would become constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


TRIES = 4  # other threads may draw from the same generators meanwhile


def random_states() -> tuple[Any, ...]:
    """Of the generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), b"" if numpy is None else pickle.dumps(numpy.random.get_state())
