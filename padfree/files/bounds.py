"""How much a weight file may ask of its reader: a network about as large as its weights, and a plan of one.

A file of some kilobytes could name a network of any size. It is refused while it is being built, before the
memory is used: torch allocates a tensor's pages when they are first written, after its registration.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from padfree.errors import FileError
from padfree.types import PlanData

_TEXT = 4 << 20  # bytes of metadata; the longest plan of timm's networks takes some 100,000
_INPUT = 1 << 28  # elements of the image that the plan was made with; 3 x 9000 x 9000 has fewer
_TIMES = 16  # how much larger the unconverted network may be: branches that were fused, tensors saved once
_SPARE = 1 << 24  # elements beyond that, for buffers that are not saved
_MODULES = 1 << 16  # the largest networks of timm have some thousands


def check_content(path: Path, text: str) -> None:
    """Refuse metadata that are longer than any network's.

    Raises:
        FileError: they are.
    """
    if len(text) > _TEXT:
        raise FileError(f"{path}: its metadata have {len(text):,} characters, and a plan takes {_TEXT:,} at most")


def check_input(plan: PlanData | None) -> None:
    """Refuse a plan made with an image that no computer could be asked to take, or one after such a plan.

    Raises:
        ValueError: the sizes are not positive, or too large.
    """
    for step in [] if plan is None else plan.steps():
        size = step.input_size
        if not size or min(size) < 1 or math.prod(size) > _INPUT:
            shown = "x".join(map(str, size))
            raise ValueError(f"input_size is {shown}; it takes positive sizes, and {_INPUT:,} values at most")


@contextlib.contextmanager
def size_limit(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Networks that this thread builds in the block may not be much larger than these weights.

    Raises:
        FileError: one is, from inside its constructor.
    """
    saved = sum(tensor.numel() for tensor in tensors.values())
    allowed, thread = _TIMES * saved + _SPARE, threading.get_ident()
    elements = modules = 0

    def tensor(module: nn.Module, name: str, value: Any) -> None:
        nonlocal elements
        if value is None or threading.get_ident() != thread or nn.parameter.is_lazy(value):
            return
        elements += value.numel()
        if elements > allowed:
            raise FileError(f"it asks for a network of over {allowed:,} values, and holds weights of {saved:,}")

    def child(module: nn.Module, name: str, value: Any) -> None:
        nonlocal modules
        modules += threading.get_ident() == thread
        if modules > _MODULES:
            raise FileError(f"it asks for a network of over {_MODULES:,} modules")

    with contextlib.ExitStack() as hooks:
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
            hooks.callback(register(tensor).remove)
        hooks.callback(register_module_module_registration_hook(child).remove)
        yield
