"""What single modules compute: which are depthwise and 1x1 convolutions, batch norms and activations.

Told by which functions a module's class runs, never by its name; in eval mode. Modules that do more than their class's
forward (hooks, say) are none of these.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from padfree.activations import function_behind
from padfree.norms import children_behind
from padfree.watch import has_usual, is_bare, is_torchs, state

__all__ = [
    "NO_ACTIVATION",
    "PATCHED",
    "USUAL",
    "Activation",
    "Functional",
    "Modules",
    "Parts",
    "after_nothing",
    "is_depthwise",
    "is_pointwise",
    "norm_and_act",
]


class Functional(enum.Enum):
    """An activation that a forward calls as a function, called as a module would be; by its name in `F`."""

    RELU = "relu"
    RELU6 = "relu6"
    HARDSWISH = "hardswish"
    SILU = "silu"
    GELU = "gelu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> (...)."""
        activated: torch.Tensor = getattr(F, self.value)(x)
        return activated

    @classmethod
    def of(cls, function: object) -> Functional | None:
        """The one that this function of torch's is."""
        if function is torch.relu:
            return cls.RELU
        return next((each for each in cls if function is getattr(F, each.value)), None)


Modules = tuple[nn.Module | Functional, ...]

Activation = tuple[int, float, float]  # its kind, as in `_depthwise.h`, and what a clamp clamps to, or a leak's slope
_CLAMP, _HARDSWISH, _SILU, _GELU, _GELU_TANH, _LEAKY = range(6)
NO_ACTIVATION: Activation = (_CLAMP, -math.inf, math.inf)

_FUNCTIONS = (
    *("conv2d", "batch_norm", "relu", "relu6", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu"),
    *("dropout", "dropout2d"),
)
USUAL = {name: getattr(F, name) for name in _FUNCTIONS}
PATCHED = not all(map(is_torchs, USUAL.values()))  # by the time padfree was imported: nothing is understood then
_ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU.forward: (_CLAMP, 0.0, math.inf),
    nn.Hardswish.forward: (_HARDSWISH, 0.0, 0.0),
    nn.SiLU.forward: (_SILU, 0.0, 0.0),
    Functional.RELU6: (_CLAMP, 0.0, 6.0),
    Functional.GELU: (_GELU, 0.0, 0.0),
}
_ACTIVATIONS |= {
    Functional.RELU: _ACTIVATIONS[nn.ReLU.forward],
    Functional.HARDSWISH: _ACTIVATIONS[nn.Hardswish.forward],
    Functional.SILU: _ACTIVATIONS[nn.SiLU.forward],
}
_ACTIVATIONS = {key: found for key, found in _ACTIVATIONS.items() if isinstance(key, Functional) or is_torchs(key)}
_NOTHING = set(filter(is_torchs, (nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward)))  # in eval mode


class Parts:
    """Modules yet to be read, with the Sequentials at their front taken apart."""

    def __init__(self, modules: Modules, states: dict[int, tuple[Any, ...]]) -> None:
        self._left, self._states = deque[Any](modules), states

    def first(self) -> Any:
        """The module, or function, at the front; None where none is left."""
        while self._left:
            module = self._left[0]
            if not isinstance(module, nn.Module):  # a function, or None: a child that was taken away
                return module
            if id(module) not in self._states:
                self._states[id(module)] = state(module)  # before anything is read
            if not (has_usual(nn.Sequential, module) and is_bare(module)):
                return module
            self.take(list(module._modules.values()))
        return None

    def take(self, instead: Sequence[Any] = ()) -> None:
        """Take it away, and put these there."""
        self._left.popleft()
        self._left.extendleft(reversed(instead))

    def left(self) -> Modules:
        """All that are left."""
        return tuple(self._left)


def norm_and_act(parts: Parts, channels: int) -> tuple[Any, Activation]:
    """The norm and the activation at the front, which are taken away."""
    norm, understood = after_nothing(parts), NO_ACTIVATION
    children = _children(norm, channels)
    if children is None:
        norm = None
    else:
        parts.take([norm._modules[name] for name in children])
    act = after_nothing(parts)
    found = None if act is None else _activation(act)
    if found is not None:
        understood = found
        parts.take()
        after_nothing(parts)
    return norm, understood


def after_nothing(parts: Parts) -> Any:
    """The module at the front, once those that do nothing in eval mode are gone."""
    while True:
        module = parts.first()
        forward = getattr(type(module), "forward", None)
        does_nothing = isinstance(module, nn.Module) and forward in _NOTHING and not module.training
        if not (does_nothing and is_bare(module)):
            return module
        parts.take()


def _is_plain(conv: Any) -> bool:
    return has_usual(nn.Conv2d, conv) and is_bare(conv) and _own_tensors(conv, ("weight", "bias"))


def is_pointwise(conv: Any) -> bool:
    """Whether this is a plain 1x1 convolution."""
    if not _is_plain(conv):
        return False
    window = conv.kernel_size, conv.stride, conv.dilation
    plain = conv.padding == (0, 0) and conv.padding_mode == "zeros" and conv.groups == 1
    return bool(window == ((1, 1), (1, 1), (1, 1)) and plain)


def is_depthwise(conv: Any) -> bool:
    """Whether this is a depthwise convolution of a window that the extension passes over."""
    if not _is_plain(conv):
        return False
    channels, kernel, padding = conv.in_channels, conv.kernel_size, conv.padding
    return bool(
        conv.groups == conv.out_channels == channels
        and kernel in ((3, 3), (5, 5))
        and conv.stride in ((1, 1), (2, 2))
        and padding in ((0, 0), (1, 1), (2, 2))
        and 2 * padding[0] < kernel[0]
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def _own_tensors(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether these attributes are its parameters and buffers: no property, no attribute before them."""
    kind, own, tables = type(module), module.__dict__, (module._parameters, module._buffers)
    return all(name not in own and not hasattr(kind, name) and any(name in table for table in tables) for name in names)


def _children(norm: Any, channels: int) -> tuple[str, ...] | None:
    """The children that a norm of this many channels calls on its result; None where it is no such norm."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or norm.num_features != channels or not is_bare(norm):
        return None
    if not _own_tensors(norm, ("weight", "bias", "running_mean", "running_var")):
        return None
    if norm._buffers["running_mean"] is None or type(norm.eps) not in (int, float) or not norm.eps >= 0:
        return None
    if type(norm)._check_input_dim is not nn.BatchNorm2d._check_input_dim:
        return None
    return () if has_usual(nn.BatchNorm2d, norm) else children_behind(norm)


def _activation(act: Any) -> Activation | None:
    if isinstance(act, Functional):
        return _ACTIVATIONS[act]
    if not is_bare(act):
        return None
    if has_usual(nn.GELU, act):
        kinds = {"none": _GELU, "tanh": _GELU_TANH}
        return (kinds[act.approximate], 0.0, 0.0) if act.approximate in kinds else None
    if has_usual(nn.LeakyReLU, act):
        slope = act.negative_slope
        return (_LEAKY, float(slope), 0.0) if type(slope) in (int, float) and _is_float32(slope) else None
    if not has_usual(nn.Hardtanh, act):
        forward = getattr(type(act), "forward", None)
        return _ACTIVATIONS.get(forward) or _of_one_function(forward)
    low, high = act.min_val, act.max_val
    plain = all(type(limit) in (int, float) and _is_float32(limit) for limit in (low, high)) and low <= high
    return (_CLAMP, float(low), float(high)) if plain else None


def _of_one_function(forward: Any) -> Activation | None:
    function, settings = function_behind(forward) or (None, {})
    if settings == {"approximate": "tanh"} and function is F.gelu:
        return (_GELU_TANH, 0.0, 0.0)
    found = None if settings else Functional.of(function)
    return None if found is None else _ACTIVATIONS[found]


def _is_float32(number: float) -> bool:
    return math.isinf(number) or abs(number) <= torch.finfo(torch.float32).max
