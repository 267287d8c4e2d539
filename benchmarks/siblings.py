"""Whether what a converted model of timm offers beside `forward` still runs the layers that its forward runs.

An oracle of its own for `padfree.verify.siblings`: it compares plain lists of the operations that read weights or pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.record.quick import TorchDispatchMode, quick_meta

_Step = tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]


class _Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that read weights, pools and concatenations: name, shapes of what they read, weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self._names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        given = [one for one in flat if isinstance(one, torch.Tensor)]
        weights = tuple(self._names[id(one)] for one in given if id(one) in self._names)
        kind = func.__name__.split(".")[0]
        if weights or "pool" in kind or kind == "cat":
            self.steps.append((kind, tuple(tuple(one.shape) for one in given), weights))
        result = quick_meta(func, args)
        return func(*args, **(kwargs or {})) if result is None else result


_OFFERS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x)),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x),
}


def sibling_fault(model: nn.Module, converted: nn.Module, input_size: tuple[int, ...]) -> str:
    """The first method that ran what the forward ran and, converted, neither does that nor raises; "" for none.

    Args:
        model: as it was, on the meta device.
        converted: its converted copy.
        input_size: (C, H, W).
    """
    forwards = [_steps(each, lambda model, x: model(x), input_size) for each in (model, converted)]
    for name, offer in _OFFERS.items():
        if not hasattr(model, name) or forwards[0] is None:
            continue
        was = _steps(model, offer, input_size)
        if was is None or was != forwards[0][: len(was)]:
            continue  # it does not run, or is something else than the forward's beginning
        try:
            now = _steps(converted, offer, input_size, raising=True)
        except PadfreeError:  # it says what to do
            continue
        except Exception as error:  # the table must show any crash
            return f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        left = len(forwards[0]) - len(was)  # what the forward runs behind it
        whole = forwards[1] is not None and now is not None and now == forwards[1][: len(forwards[1]) - left]
        if not whole:
            return f"{name} does not run what the forward runs"
    return ""


def _steps(model: nn.Module, call: Any, size: tuple[int, ...], *, raising: bool = False) -> list[_Step] | None:
    try:
        with torch.no_grad(), _Steps(model) as steps:
            call(model.eval(), torch.empty(1, *size, device="meta"))
    except Exception:  # the original does not offer it on such an input
        if raising:
            raise
        return None
    return steps.steps
