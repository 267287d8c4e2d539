"""What a few modules, called one after another, compute: a depthwise convolution, a batch norm, an activation, a 1x1.

Told by which functions a module's class runs, never by its name. What was read is kept until something about these
modules changes (`padfree.watch`). Nothing here keeps a module alive.
"""

from __future__ import annotations

import enum
import functools
import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from padfree.norms import children_behind
from padfree.watch import has_usual, is_bare, refs, state

__all__ = ["Chain", "Functional", "Modules", "listed", "read"]


class Functional(enum.Enum):
    """An activation that a forward calls as a function, called as a module would be; by its name in `F`."""

    RELU = "relu"
    RELU6 = "relu6"
    HARDSWISH = "hardswish"
    SILU = "silu"

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

Activation = tuple[int, float, float]  # its kind, as in `_depthwise.h`, and what a clamp clamps to
_CLAMP, _HARDSWISH, _SILU = range(3)
_NO_ACTIVATION: Activation = (_CLAMP, -math.inf, math.inf)

_FUNCTIONS = ("conv2d", "batch_norm", "relu", "relu6", "hardtanh", "hardswish", "silu", "dropout", "dropout2d")
_USUAL = {name: getattr(F, name) for name in _FUNCTIONS}
_ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU.forward: (_CLAMP, 0.0, math.inf),
    nn.Hardswish.forward: (_HARDSWISH, 0.0, 0.0),
    nn.SiLU.forward: (_SILU, 0.0, 0.0),
    Functional.RELU6: (_CLAMP, 0.0, 6.0),
}
_ACTIVATIONS |= {
    Functional.RELU: _ACTIVATIONS[nn.ReLU.forward],
    Functional.HARDSWISH: _ACTIVATIONS[nn.Hardswish.forward],
    Functional.SILU: _ACTIVATIONS[nn.SiLU.forward],
}
_NOTHING = {nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward}  # in eval mode


WIDEST = 512  # inputs of a 1x1 convolution that is part of the pass: the library multiplies larger matrices faster

_KNOWN: dict[int, Chain] = {}


class Chain:
    """A depthwise convolution at the beginning of a sequence of modules, and what was understood of what follows it.

    A 1x1 convolution of the sum, with the norm and the activation behind it, may be left to call or not: it `mixes`.
    What is `ahead` of the convolution is understood from number `start` on.
    """

    __slots__ = ("_after", "_behind", "_first", "_rest", "late", "mixes", "start", "watch")

    def __init__(self, before: Modules, behind: Modules, beside: tuple[nn.Module, ...], ahead: Modules) -> None:
        self._first = weakref.ref(before[0], functools.partial(_forget, _KNOWN, id(before[0])))
        states: dict[int, tuple[Any, ...]] = {}
        try:
            found = _read(before, behind, beside, states)
            lead, self.start = _lead(ahead, states, found)
        except Exception:  # whatever a class of the user's raises when it is looked at, its modules can be called
            found = _nothing_read(before, behind)
            lead, self.start = _NO_LEAD, len(ahead)
        self.watch = (refs(listed(before, behind, beside, ahead)), tuple(states.values()), *_WORLD, *lead, *found.read)
        self.late = found.late  # the norm and the activation stand behind the sum, and nothing between
        self.mixes = found.after is not None
        self._rest, self._behind, self._after = refs(found.rest), refs(found.behind), refs(found.after or ())

    @property
    def rest(self) -> Modules:
        """What is left to call before the sum."""
        return tuple([ref() for ref in self._rest]) if self._rest else ()

    @property
    def behind(self) -> Modules:
        """What is left to call on the sum."""
        return tuple([ref() for ref in self._behind]) if self._behind else ()

    @property
    def after(self) -> Modules:
        """What is left to call on the result of the 1x1 convolution, its norm and its activation."""
        return tuple([ref() for ref in self._after]) if self._after else ()


def _forget(table: dict[int, Chain], key: int, gone: weakref.ref[nn.Module]) -> None:
    known = table.get(key)
    if known is not None and known._first is gone:
        del table[key]


def read(
    before: Modules,
    behind: Modules = (),
    beside: tuple[nn.Module, ...] = (),
    ahead: Modules = (),
    *,
    again: bool = False,
) -> Chain:
    """What these modules compute in eval mode; kept until it is read `again`.

    Args:
        before: called one after another, each on what the one before returned, up to a sum.
        behind: called on the sum.
        beside: called on what `before` is; nothing is read where they do more than their classes' forwards.
        ahead: called before all others.
        again: the modules have changed since.
    """
    known = _KNOWN.get(id(before[0]))
    if known is None or again:
        known = Chain(before, behind, beside, ahead)
        _KNOWN[id(before[0])] = known
    return known


def listed(
    before: Modules, behind: Modules, beside: tuple[nn.Module, ...] = (), ahead: Modules = ()
) -> tuple[object, ...]:
    """All of them, so that one can see which was where."""
    return (*ahead, None, *before, None, *behind, None, *beside)


class _Found(NamedTuple):
    # References to convolution and norm; channels, kernel, stride, padding; activation, eps. The same of a 1x1, which
    # has a number of outputs instead.
    read: tuple[Any, ...]
    rest: Modules
    late: bool
    behind: Modules
    after: Modules | None  # None: there is no 1x1


def _nothing_read(before: Modules, behind: Modules) -> _Found:
    return _Found((None, None, (), (), *_NO_MIX), before, False, behind, None)


_NO_MIX = (None, None, 0, ())
_NO_LEAD = (None, ())
_WORLD = F.__dict__, tuple(part for pair in _USUAL.items() for part in pair)


def _read(
    before: Modules, behind: Modules, beside: tuple[nn.Module, ...], states: dict[int, tuple[Any, ...]]
) -> _Found:
    for module in beside:
        states[id(module)] = state(module)
    parts = _Parts(before, states)
    conv = parts.first()
    patched = any(getattr(F, name, None) is not usual for name, usual in _USUAL.items())
    if patched or not (_is_depthwise(conv) and all(is_bare(module) for module in beside)):
        return _nothing_read(before, behind)
    parts.take()
    channels = int(conv.in_channels)
    norm, act = _norm_and_act(parts, channels)
    late, rest, left = False, parts.left(), behind
    if not (rest or beside) and behind and norm is None and act == _NO_ACTIVATION:
        parts = _Parts(behind, states)
        norm, found = _norm_and_act(parts, channels)
        if norm is not None:
            late, act, left = True, found, parts.left()
    window = tuple(int(size) for size in (channels, conv.kernel_size[0], conv.stride[0], conv.padding[0]))
    mix, after = (_NO_MIX, None) if rest else _mix(left, states, 2 * channels if beside else channels)
    return _Found((weakref.ref(conv), *_ending(norm, act, window), *mix), rest, late, left, after)


def _lead(ahead: Modules, states: dict[int, tuple[Any, ...]], found: _Found) -> tuple[tuple[Any, ...], int]:
    """A norm at the end of these and the activation behind it, and the number of the first that is part of it."""
    for start in range(len(ahead) if found.read[0] is not None else 0):
        looked_at: dict[int, tuple[Any, ...]] = {}
        parts = _Parts(ahead[start:], looked_at)
        norm, act = _norm_and_act(parts, found.read[2][0])
        if norm is not None and not parts.left():  # what an activation alone works on in place, others may read
            states |= looked_at
            statistics, _, numbers = _ending(norm, act, None)
            return (statistics, numbers), start
    return _NO_LEAD, len(ahead)


def _ending(norm: Any, act: Activation, sizes: Any) -> tuple[Any, ...]:
    eps, statistics = (0.0, None) if norm is None else (float(norm.eps), weakref.ref(norm))
    return statistics, sizes, (*act, eps)


def _mix(modules: Modules, states: dict[int, tuple[Any, ...]], inputs: int) -> tuple[tuple[Any, ...], Modules | None]:
    """A 1x1 convolution of so many channels at the front, with what follows it, and what is left to call."""
    parts = _Parts(modules, states)
    conv = _after_nothing(parts)
    if not _is_pointwise(conv) or conv.in_channels != inputs or inputs > WIDEST:
        return _NO_MIX, None
    parts.take()
    outputs = int(conv.out_channels)
    return (weakref.ref(conv), *_ending(*_norm_and_act(parts, outputs), outputs)), parts.left()


class _Parts:
    """Modules yet to be read, with the Sequentials at their front taken apart."""

    def __init__(self, modules: Modules, states: dict[int, tuple[Any, ...]]) -> None:
        self._left, self._states = deque[Any](modules), states

    def first(self) -> Any:
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
        self._left.popleft()
        self._left.extendleft(reversed(instead))

    def left(self) -> Modules:
        return tuple(self._left)


def _norm_and_act(parts: _Parts, channels: int) -> tuple[Any, Activation]:
    """The norm and the activation at the front, which are taken away."""
    norm, understood = _after_nothing(parts), _NO_ACTIVATION
    children = _children(norm, channels)
    if children is None:
        norm = None
    else:
        parts.take([norm._modules[name] for name in children])
    act = _after_nothing(parts)
    found = None if act is None else _activation(act)
    if found is not None:
        understood = found
        parts.take()
        _after_nothing(parts)
    return norm, understood


def _after_nothing(parts: _Parts) -> Any:
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


def _is_pointwise(conv: Any) -> bool:
    if not _is_plain(conv):
        return False
    window = conv.kernel_size, conv.stride, conv.dilation
    plain = conv.padding == (0, 0) and conv.padding_mode == "zeros" and conv.groups == 1
    return bool(window == ((1, 1), (1, 1), (1, 1)) and plain)


def _is_depthwise(conv: Any) -> bool:
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
    if not has_usual(nn.Hardtanh, act):
        return _ACTIVATIONS.get(getattr(type(act), "forward", None))
    low, high = act.min_val, act.max_val
    plain = all(type(limit) in (int, float) and _is_float32(limit) for limit in (low, high)) and low <= high
    return (_CLAMP, float(low), float(high)) if plain else None


def _is_float32(number: float) -> bool:
    return math.isinf(number) or abs(number) <= torch.finfo(torch.float32).max
