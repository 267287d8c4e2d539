"""What a few modules, called one after another, compute: a depthwise convolution, a batch norm, an activation.

Told by which `forward` a module's class runs, never by its name. What was read is kept as long as nothing about these
modules changes: a hook, a parametrized weight, a patched or replaced forward, training mode, another setting or child
is seen at the next call, and ends what can be read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from padfree.norms import children_behind

__all__ = ["HARDSWISH", "NO_LIMITS", "Chain", "is_bare", "read"]

Modules = tuple[nn.Module, ...]

_CALL = nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONV, _CONV_INSIDE = nn.Conv2d.forward, nn.Conv2d._conv_forward
_NORM, _SEQUENTIAL = nn.BatchNorm2d.forward, nn.Sequential.forward
_RELU, _HARDSWISH, _HARDTANH = nn.ReLU.forward, nn.Hardswish.forward, nn.Hardtanh.forward
_NOTHING = {nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward}  # in eval mode

HARDSWISH = (1.0, 0.0)  # no clamp has such limits
NO_LIMITS = (-math.inf, math.inf)


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
        not any(own.get(name) for name in _HOOKS)
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and type(module).__call__ is _CALL
    )


class _State:
    """What decides what calling a module does, but for its tensors, which are looked at each time.

    Shallow comparisons: this is asked between the layers of a network, where every byte read is a missed one.
    """

    __slots__ = ("children", "forward", "hooked", "hooks", "kind", "own", "ref")

    def __init__(self, module: nn.Module) -> None:
        self.ref, self.kind, self.forward = weakref.ref(module), type(module), type(module).forward
        self.own = dict(module.__dict__)
        self.hooks = tuple(self.own[name] for name in _HOOKS if name in self.own)
        self.hooked = any(self.hooks)
        children = module._modules
        self.children = (children, dict(children)) if children else None

    def holds(self) -> bool:
        module = self.ref()
        if type(module) is not self.kind or self.kind.forward is not self.forward or module.__dict__ != self.own:
            return False
        return any(self.hooks) is self.hooked and (self.children is None or self.children[0] == self.children[1])


class _Known:
    """What was read, and the state of all modules that were looked at; nothing here keeps the first of them alive."""

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
        if self.first() is not before[0] or nn.Module.__call__ is not _CALL:
            return False
        if [ref() for ref in self.others] != [*before[1:], *behind]:
            return False
        try:
            return all([state.holds() for state in self.states])
        except Exception:  # values that cannot be compared: what was kept is not there any more
            return False

    def chain(self) -> Chain | None:
        """What was read, as long as its tensors are what the extension reads."""
        if self.found is None:
            return None
        conv, norm, limits, rest, late, behind = self.found
        own, statistics = conv(), None if norm is None else norm()
        if not _holds(own) or not (norm is None or _holds(statistics)):
            return None
        following = tuple([ref() for ref in rest]) if rest else ()
        return Chain(own, statistics, limits, following, late, tuple([ref() for ref in behind]) if behind else ())


_KNOWN: dict[int, _Known] = {}


def _forget(key: int, gone: weakref.ref[nn.Module]) -> None:
    known = _KNOWN.get(key)
    if known is not None and known.first is gone:
        del _KNOWN[key]


def _holds(module: Any) -> bool:
    """Whether its tensors are plain float32 numbers of its channels, one after another in the CPU's memory."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if isinstance(module, nn.Conv2d):
        channels = module.out_channels
        return _is_plain(weight, module.kernel_size[0] ** 2 * channels) and (bias is None or _is_plain(bias, channels))
    channels, buffers = module.num_features, module._buffers
    return (
        _is_plain(buffers.get("running_mean"), channels)
        and _is_plain(buffers.get("running_var"), channels)
        and (weight is None or _is_plain(weight, channels))
        and (bias is None or _is_plain(bias, channels))
    )


def _is_plain(tensor: Any, count: int) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.numel() == count
        and tensor.is_contiguous()
        and tensor.data_ptr() != 0
        and not tensor.is_neg()
    )


_PLAIN = (nn.Parameter, torch.Tensor)

_Found = tuple[Any, Any, tuple[float, float], tuple[Any, ...], bool, tuple[Any, ...]]


def _read(before: Modules, behind: Modules, looked_at: list[nn.Module]) -> _Found | None:
    parts: list[Any] = list(_parts(before, looked_at))
    if not parts or not _is_depthwise(parts[0]):
        return None
    conv = parts[0]
    norm, limits, at = _norm_and_act(parts, 1, conv.out_channels)
    rest, late = parts[at:], False
    if not rest and behind and norm is None and limits == NO_LIMITS:
        parts = list(_parts(behind, looked_at))
        norm, limits, at = _norm_and_act(parts, 0, conv.out_channels)
        late, behind = norm is not None, tuple(parts[at:])
        if not late:
            limits, behind = NO_LIMITS, tuple(parts)
    refs = [tuple(weakref.ref(module) for module in modules) for modules in (rest, behind)]
    return weakref.ref(conv), None if norm is None else weakref.ref(norm), limits, refs[0], late, refs[1]


def _norm_and_act(parts: Sequence[Any], at: int, channels: int) -> tuple[Any, tuple[float, float], int]:
    """The norm and the limits that stand at this place, and the place behind them."""
    norm, limits, at = None, NO_LIMITS, _after_nothing(parts, at)
    if at < len(parts) and _is_norm(parts[at], channels):
        norm, at = parts[at], _after_nothing(parts, at + 1)
    found = _limits(parts[at]) if at < len(parts) else None
    return (norm, limits, at) if found is None else (norm, found, _after_nothing(parts, at + 1))


def _parts(modules: Sequence[nn.Module], looked_at: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules with Sequentials, and norms that call children of theirs, taken apart."""
    for module in modules:
        looked_at.append(module)
        forward = type(module).forward
        if is_bare(module) and forward is _SEQUENTIAL:
            yield from _parts(list(module._modules.values()), looked_at)  # type: ignore[arg-type]
            continue
        yield module
        if is_bare(module) and isinstance(module, nn.BatchNorm2d) and forward is not _NORM:
            behind = children_behind(module) or ()
            yield from _parts([module._modules[name] for name in behind], looked_at)  # type: ignore[misc]


def _after_nothing(parts: Sequence[nn.Module], at: int) -> int:
    while at < len(parts) and type(parts[at]).forward in _NOTHING and not parts[at].training and is_bare(parts[at]):
        at += 1
    return at


def _is_depthwise(conv: Any) -> bool:
    kind: Any = type(conv)
    if kind.forward is not _CONV or kind._conv_forward is not _CONV_INSIDE or not is_bare(conv):
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
        and {"weight", "bias"} <= conv._parameters.keys()
    )


def _is_norm(norm: nn.Module, channels: int) -> bool:
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or norm.num_features != channels or not is_bare(norm):
        return False
    statistics = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if any(tensor is None for tensor in statistics) or not {"weight", "bias"} <= norm._parameters.keys():
        return False
    return type(norm).forward is _NORM or children_behind(norm) is not None


def _limits(act: Any) -> tuple[float, float] | None:
    if not is_bare(act):
        return None
    forward = type(act).forward
    if forward is _RELU:
        return (0.0, math.inf)
    if forward is _HARDTANH and act.min_val <= act.max_val:
        return (float(act.min_val), float(act.max_val))
    return HARDSWISH if forward is _HARDSWISH else None
