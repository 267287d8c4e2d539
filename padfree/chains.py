"""What a few modules, called one after another, compute: a depthwise convolution, a batch norm, an activation.

Told by which functions a module's class runs, never by its name. What was read is kept as long as nothing about these
modules changes: a hook, a parametrized weight, a patched or replaced function, training mode, another setting or child
is seen at the next call, and ends what can be read. Nothing here keeps a module alive.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from padfree.norms import children_behind

__all__ = ["HARDSWISH", "NO_LIMITS", "Chain", "Modules", "is_bare", "read"]

Modules = tuple[nn.Module, ...]

HARDSWISH = (1.0, 0.0)  # no clamp has such limits
NO_LIMITS = (-math.inf, math.inf)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED = ("forward", "_call_impl", "_conv_forward", "_check_input_dim")  # by instance attributes
_CALLING = attrgetter("__call__", "_call_impl", "__getattr__", "__getattribute__")
_USUAL_CALL = _CALLING(nn.Module)
_FUNCTIONS = attrgetter("conv2d", "batch_norm", "relu", "hardtanh", "hardswish")
_USUAL_FUNCTIONS = _FUNCTIONS(F)

# Settings of an instance, by its base class.
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("training", "num_features", "eps", "momentum", "track_running_stats")
# By the base class: the functions of a class that decide what it computes, and the settings of an instance.
_KINDS: tuple[tuple[type[nn.Module], Any, Any], ...] = (
    (nn.Conv2d, attrgetter("forward", "_conv_forward"), itemgetter(*_CONV)),
    (nn.BatchNorm2d, attrgetter("forward", "_check_input_dim"), itemgetter(*_NORM)),
    (nn.Sequential, attrgetter("forward", "__iter__"), itemgetter("training")),
    (nn.Hardtanh, attrgetter("forward"), itemgetter("min_val", "max_val")),
    (nn.Module, attrgetter("forward"), itemgetter("training")),
)
_USUAL = {base: functions(base) for base, functions, _ in _KINDS[:-1]}
_RELU, _HARDSWISH = nn.ReLU.forward, nn.Hardswish.forward
_NOTHING = {nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward}  # in eval mode


class Chain(NamedTuple):
    """A depthwise convolution at the beginning of a sequence of modules, and what was understood of what follows it."""

    conv: nn.Conv2d  # windows of 3x3 or 5x5 pixels
    norm: nn.BatchNorm2d | None  # by running statistics
    limits: tuple[float, float]  # the activation: a clamp to these, or HARDSWISH
    rest: Modules
    late: bool  # the norm and the activation stand behind the sum, and nothing between
    behind: Modules


def read(before: Modules, behind: Modules = ()) -> Chain | None:
    """What these modules compute in eval mode; None where they do not begin with a depthwise convolution.

    Args:
        before: called one after another, each on what the one before returned, up to a sum.
        behind: called on the sum.
    """
    known = _KNOWN.get(id(before[0]))
    if known is None or not known.holds(before, behind):
        known = _Known(before, behind)
        _KNOWN[id(before[0])] = known
    return known.chain()


def is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing besides."""
    own = module.__dict__
    return (
        not _hooked(own)
        and not any(name in own for name in _REPLACED)
        and own.get("_compiled_call_impl") is None
        and _CALLING(type(module)) == _USUAL_CALL
    )


def _hooked(own: dict[str, Any]) -> bool:
    return any([own.get(name) for name in _HOOKS])


class _State:
    """What decides what calling a module does, but for its tensors, which are looked at each time.

    Short comparisons: this is asked between the layers of a network, where every byte read is a missed one.
    """

    __slots__ = ("calling", "children", "count", "functions", "hooked", "kind", "read", "ref", "settings")

    def __init__(self, module: nn.Module) -> None:
        own, self.kind, self.ref = module.__dict__, type(module), weakref.ref(module)
        functions, settings = next(found[1:] for found in _KINDS if isinstance(module, found[0]))
        self.read = functions, settings
        self.functions, self.calling = functions(self.kind), _CALLING(self.kind)
        self.settings, self.hooked = settings(own), _hooked(own)
        self.count = len(own)  # another one would be a forward of its own, say
        self.children = [child if child is None else weakref.ref(child) for child in own["_modules"].values()]

    def holds(self) -> bool:
        module = self.ref()
        kind = type(module)
        if kind is not self.kind:
            return False
        own, (functions, settings) = module.__dict__, self.read
        children = own["_modules"]
        return (
            len(own) == self.count
            and functions(kind) == self.functions
            and _CALLING(kind) == self.calling
            and settings(own) == self.settings
            and _hooked(own) is self.hooked
            and len(children) == len(self.children)
            and (not children or _same(self.children, children.values()))
        )


def _same(refs: Any, modules: Any) -> bool:
    return all([(ref if ref is None else ref()) is module for ref, module in zip(refs, modules, strict=True)])


class _Known:
    """What was read, and the state of all modules that were looked at."""

    __slots__ = ("first", "found", "others", "states")

    def __init__(self, before: Modules, behind: Modules) -> None:
        key = id(before[0])
        self.first = weakref.ref(before[0], lambda gone: _forget(key, gone))
        self.others = [weakref.ref(module) for module in before[1:] + behind]
        looked_at: list[nn.Module] = []
        self.found = _read(before, behind, looked_at)
        self.states = [_State(module) for module in looked_at]

    def holds(self, before: Modules, behind: Modules) -> bool:
        """Whether it was read of these modules, and they are as they were."""
        others = before[1:] + behind
        if self.first() is not before[0] or len(others) != len(self.others) or not _same(self.others, others):
            return False
        try:
            return all([state.holds() for state in self.states]) and _FUNCTIONS(F) == _USUAL_FUNCTIONS
        except Exception:  # settings are gone, or cannot be compared
            return False

    def chain(self) -> Chain | None:
        """What was read, as long as its tensors are what the extension reads."""
        if self.found is None:
            return None
        conv, norm, limits, rest, late, behind = self.found
        own, statistics = conv(), None if norm is None else norm()
        if not _conv_holds(own) or not (norm is None or _norm_holds(statistics)):
            return None
        following = tuple([ref() for ref in rest]) if rest else ()
        return Chain(own, statistics, limits, following, late, tuple([ref() for ref in behind]) if behind else ())


_KNOWN: dict[int, _Known] = {}


def _forget(key: int, gone: weakref.ref[nn.Module]) -> None:
    known = _KNOWN.get(key)
    if known is not None and known.first is gone:
        del _KNOWN[key]


def _conv_holds(conv: Any) -> bool:
    parameters, channels = conv._parameters, conv.out_channels
    bias = parameters.get("bias")
    weight = parameters.get("weight")
    return _is_plain(weight, (channels, 1, *conv.kernel_size)) and (bias is None or _is_plain(bias, (channels,)))


def _norm_holds(norm: Any) -> bool:
    shape, buffers, parameters = (norm.num_features,), norm._buffers, norm._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        _is_plain(buffers.get("running_mean"), shape)
        and _is_plain(buffers.get("running_var"), shape)
        and (weight is None or _is_plain(weight, shape))
        and (bias is None or _is_plain(bias, shape))
    )


def _is_plain(tensor: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are plain float32 numbers of this shape, one after another in the CPU's memory."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.shape == shape
        and tensor.is_contiguous()
        and tensor.data_ptr() != 0
        and not tensor.is_neg()
    )


_PLAIN = (nn.Parameter, torch.Tensor)

_Found = tuple[Any, Any, tuple[float, float], tuple[Any, ...], bool, tuple[Any, ...]]


def _read(before: Modules, behind: Modules, looked_at: list[nn.Module]) -> _Found | None:
    parts = _Parts(before, looked_at)
    conv = parts.first()
    if conv is None or not _is_depthwise(conv) or _FUNCTIONS(F) != _USUAL_FUNCTIONS:
        return None
    parts.take()
    norm, limits = _norm_and_act(parts, conv.out_channels)
    late, rest, left = False, parts.left(), behind
    if not rest and behind and norm is None and limits == NO_LIMITS:
        parts = _Parts(behind, looked_at)
        norm, found = _norm_and_act(parts, conv.out_channels)
        if norm is not None:
            late, limits, left = True, found, parts.left()
    refs = [tuple(weakref.ref(module) for module in modules) for modules in (rest, left)]
    return weakref.ref(conv), None if norm is None else weakref.ref(norm), limits, refs[0], late, refs[1]


class _Parts:
    """Modules yet to be read, with the Sequentials at their front taken apart."""

    def __init__(self, modules: Sequence[nn.Module], looked_at: list[nn.Module]) -> None:
        self._left, self._looked_at = deque(modules), looked_at

    def first(self) -> Any:
        while self._left:
            module = self._left[0]
            self._looked_at.append(module)
            if not (_has_usual(nn.Sequential, module) and is_bare(module)):
                return module
            self.take(list(module._modules.values()))  # type: ignore[arg-type]
        return None

    def take(self, instead: Sequence[nn.Module] = ()) -> None:
        self._left.popleft()
        self._left.extendleft(reversed(instead))

    def left(self) -> Modules:
        return tuple(self._left)


def _has_usual(base: type[nn.Module], module: nn.Module) -> bool:
    functions = next(found[1] for found in _KINDS if found[0] is base)
    return isinstance(module, base) and functions(type(module)) == _USUAL[base]


def _norm_and_act(parts: _Parts, channels: int) -> tuple[Any, tuple[float, float]]:
    """The norm and the activation at the front, which are taken away."""
    norm, limits = _after_nothing(parts), NO_LIMITS
    children = _children(norm, channels)
    if children is None:
        norm = None
    else:
        parts.take([norm._modules[name] for name in children])
    act = _after_nothing(parts)
    found = None if act is None else _limits(act)
    if found is not None:
        limits = found
        parts.take()
        _after_nothing(parts)
    return norm, limits


def _after_nothing(parts: _Parts) -> Any:
    """The module at the front, once those that do nothing in eval mode are gone."""
    while True:
        module = parts.first()
        if module is None or type(module).forward not in _NOTHING or module.training or not is_bare(module):
            return module
        parts.take()


def _is_depthwise(conv: Any) -> bool:
    if not _has_usual(nn.Conv2d, conv) or not is_bare(conv) or not _own_tensors(conv, ("weight", "bias")):
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
    return () if _has_usual(nn.BatchNorm2d, norm) else children_behind(norm)


def _limits(act: Any) -> tuple[float, float] | None:
    if not is_bare(act):
        return None
    forward = type(act).forward
    if forward is _RELU:
        return (0.0, math.inf)
    if _has_usual(nn.Hardtanh, act) and act.min_val <= act.max_val:
        return (float(act.min_val), float(act.max_val))
    return HARDSWISH if forward is _HARDSWISH else None
