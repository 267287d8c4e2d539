"""What a few modules, called one after another, compute: a depthwise convolution, a batch norm, an activation, a 1x1.

What was read of them (`padfree.understood`) is kept until something about these modules changes (`padfree.watch`).
Nothing here keeps a module alive.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from padfree.understood import (
    NO_ACTIVATION,
    PATCHED,
    USUAL,
    Activation,
    Modules,
    Parts,
    after_nothing,
    is_depthwise,
    is_pointwise,
    norm_and_act,
)
from padfree.watch import has_usual, is_bare, objects, refs, state

__all__ = ["CHAIN", "Chain", "Modules", "has_joining", "is_reduction", "listed", "read"]

CHAIN = "padfree_chain"  # of a generated class whose forward is one chain and its pool: what the chain is made of

# Inputs and weights of a 1x1 convolution that is part of the pass: the library multiplies larger matrices faster.
WIDEST, LARGEST = 512, 1 << 17

_KNOWN: dict[int, Chain] = {}


class Chain:
    """A depthwise convolution at the beginning of a sequence of modules, and what was understood of what follows it.

    A 1x1 convolution of the sum, with the norm and the activation behind it, may be left to call or not: it `mixes`.
    What is `ahead` of the convolution is understood from number `start` on; or from somewhere inside a Sequential on,
    which is `parted` then: into what is to be called `first`, and what has been understood. Its `gate` is a watch on
    the Sequentials alone.
    """

    __slots__ = (
        "_after",
        "_behind",
        "_conv",
        "_first",
        "_led",
        "_rest",
        "gate",
        "late",
        "mixes",
        "parted",
        "start",
        "watch",
    )

    def __init__(
        self,
        before: Modules,
        behind: Modules,
        beside: tuple[nn.Module, ...],
        ahead: Modules,
        block: nn.Module | None,
        summed: bool,
    ) -> None:
        conv = before[0]  # something that was set in its place may have no weak references
        gone = functools.partial(_forget, _KNOWN, id(conv))
        self._conv = weakref.ref(conv, gone) if isinstance(conv, nn.Module) else None
        states: dict[int, tuple[Any, ...]] = {}
        world = _world()
        try:
            found = _read(before, behind, beside, states, block, summed)
            lead = _lead(ahead, states, found)
        except Exception:  # whatever a class of the user's raises when it is looked at, its modules can be called
            found, lead = _nothing_read(before, behind), _Lead(_NO_LEAD, ahead)
        modules = listed(before, behind, beside, ahead, block)
        self.watch = (refs(modules), tuple(states.values()), F.__dict__, world, *lead.read, *found.read)
        self.late = found.late  # the norm and the activation stand behind the sum, and nothing between
        self.mixes = found.after is not None
        self.start = len(lead.first)
        self.parted = any(a is not b for a, b in zip(lead.first, ahead, strict=False)) or self.start > len(ahead)
        self._first, self._led = (refs(lead.first), refs(lead.led)) if self.parted else ((), ())
        self.gate = (refs(ahead), lead.containers, *_NO_WORLD, *_NO_LEAD, *_NOTHING) if self.parted else ()
        self._rest, self._behind, self._after = refs(found.rest), refs(found.behind), refs(found.after or ())

    @property
    def first(self) -> Modules:
        """Parted: what is to be called before the pass."""
        return objects(self._first)

    @property
    def led(self) -> Modules:
        """Parted: what the pass begins with."""
        return objects(self._led)

    @property
    def rest(self) -> Modules:
        """What is left to call before the sum."""
        return objects(self._rest)

    @property
    def behind(self) -> Modules:
        """What is left to call on the sum."""
        return objects(self._behind)

    @property
    def after(self) -> Modules:
        """What is left to call on the result of the 1x1 convolution, its norm and its activation."""
        return objects(self._after)


def is_reduction(module: object) -> bool:
    """Whether a Sequential begins with a strided depthwise convolution."""
    first: Sequence[Any] = _flat((module,), {})[:1] if isinstance(module, nn.Sequential) else ()
    return any(is_depthwise(conv) and conv.stride == (2, 2) for conv in first)


def has_joining(container: nn.Module, block: nn.Module) -> bool:
    """Whether a plain Sequential calls, right before or behind this child, what a pass could begin or end with."""
    if not has_usual(nn.Sequential, container):
        return False
    children = [child for child in container._modules.values() if child is not None]
    at = next(index for index, child in enumerate(children) if child is block)
    before, behind = (_flat(tuple(some), {}) for some in (children[max(0, at - 1) : at], children[at + 1 : at + 2]))
    norm = any(isinstance(module, nn.BatchNorm2d) for module in before[-2:])
    follower = behind[0] if behind else None
    mixes = isinstance(follower, nn.Conv2d) and set(follower.kernel_size) == {1} and follower.groups == 1
    return norm or mixes or isinstance(follower, nn.BatchNorm2d)


def _forget(table: dict[int, Chain], key: int, gone: weakref.ref[nn.Module]) -> None:
    known = table.get(key)
    if known is not None and known._conv is gone:
        del table[key]


def read(
    before: Modules,
    behind: Modules = (),
    beside: tuple[nn.Module, ...] = (),
    ahead: Modules = (),
    block: nn.Module | None = None,
    summed: bool = True,
    *,
    again: bool = False,
) -> Chain:
    """What these modules compute in eval mode; kept until it is read `again`.

    Args:
        before: called one after another, each on what the one before returned, up to a sum.
        behind: called on the sum.
        beside: called on what `before` is; nothing is read where they do more than their classes' forwards.
        ahead: called before all others.
        block: whose forward, a generated one, would call `before`; nothing is read where calling it does more.
        summed: something is added between `before` and `behind`.
        again: the modules have changed since.
    """
    known = _KNOWN.get(id(before[0]))
    if known is None or again:
        known = Chain(before, behind, beside, ahead, block, summed)
        if known._conv is not None:
            _KNOWN[id(before[0])] = known
    return known


def listed(
    before: Modules,
    behind: Modules,
    beside: tuple[nn.Module, ...] = (),
    ahead: Modules = (),
    block: nn.Module | None = None,
) -> tuple[object, ...]:
    """All of them, so that one can see which was where."""
    return (*ahead, None, *before, None, *behind, None, *beside, None, block)


class _Found(NamedTuple):
    # References to convolution and norm; channels, kernel, stride, padding; activation, eps. The same of a 1x1, which
    # has a number of outputs instead.
    read: tuple[Any, ...]
    rest: Modules
    late: bool
    behind: Modules
    after: Modules | None  # None: there is no 1x1


def _nothing_read(before: Modules, behind: Modules) -> _Found:
    return _Found(_NOTHING, before, False, behind, None)


_NO_MIX = (None, None, 0, ())
_NOTHING = (None, None, (), (), *_NO_MIX)
_NO_WORLD: tuple[dict[str, Any], tuple[Any, ...]] = ({}, ())
_NO_LEAD = (None, ())


def _world() -> tuple[Any, ...]:
    """The functions that forwards call now, by name, as `_unchanged.c` takes them."""
    return tuple(part for name in USUAL for part in (name, getattr(F, name, None)))


_USUAL_WORLD = tuple(part for pair in USUAL.items() for part in pair)


def _read(
    before: Modules,
    behind: Modules,
    beside: tuple[nn.Module, ...],
    states: dict[int, tuple[Any, ...]],
    block: nn.Module | None,
    summed: bool,
) -> _Found:
    around = beside if block is None else (*beside, block)
    for module in around:
        states[id(module)] = state(module)
    parts = Parts(before, states)
    conv = parts.first()
    if (
        PATCHED
        or _world() != _USUAL_WORLD
        or not (is_depthwise(conv) and all(is_bare(module) for module in around) and _is_generated(block))
    ):
        return _nothing_read(before, behind)
    parts.take()
    channels = int(conv.in_channels)
    norm, act = norm_and_act(parts, channels)
    late, rest, left = False, parts.left(), behind
    if not (rest or beside) and behind and norm is None and act == NO_ACTIVATION:
        parts = Parts(behind, states)
        norm, found = norm_and_act(parts, channels)
        if norm is not None:
            late, act, left = True, found, parts.left()
    if not summed:
        rest, left = (), (*rest, *left)
    window = tuple(int(size) for size in (channels, conv.kernel_size[0], conv.stride[0], conv.padding[0]))
    mix, after = (_NO_MIX, None) if rest else _mix(left, states, 2 * channels if beside else channels)
    return _Found((weakref.ref(conv), *_ending(norm, act, window), *mix), rest, late, left, after)


def _is_generated(block: nn.Module | None) -> bool:
    """Whether its class runs the forward that was generated together with its chain."""
    members = {} if block is None else vars(type(block))
    forward, chain = members.get("forward"), members.get(CHAIN)
    return block is None or getattr(forward, "__globals__", None) is getattr(chain, "__globals__", members)


class _Lead(NamedTuple):
    read: tuple[Any, ...]  # a reference to the norm; activation, eps
    first: Modules  # what is to be called before
    led: Modules = ()
    containers: tuple[Any, ...] = ()  # the states of Sequentials that were taken apart


def _lead(ahead: Modules, states: dict[int, tuple[Any, ...]], found: _Found) -> _Lead:
    """A norm at the end of these and the activation behind it, and what comes before them."""
    containers: dict[int, tuple[Any, ...]] = {}
    flat = _flat(ahead, containers) if found.read[0] is not None else ()
    for start in range(len(flat)):
        looked_at: dict[int, tuple[Any, ...]] = {}
        parts = Parts(flat[start:], looked_at)
        norm, act = norm_and_act(parts, found.read[2][0])
        if norm is not None and not parts.left():  # what an activation alone works on in place, others may read
            states |= containers | looked_at
            statistics, _, numbers = _ending(norm, act, None)
            return _Lead((statistics, numbers), flat[:start], flat[start:], tuple(containers.values()))
    return _Lead(_NO_LEAD, ahead)


def _flat(modules: Modules, states: dict[int, tuple[Any, ...]]) -> Modules:
    """The same calls, with Sequentials taken apart."""
    found: list[Any] = []
    for module in modules:
        if has_usual(nn.Sequential, module) and is_bare(module):  # type: ignore[arg-type]
            states[id(module)] = state(module)  # type: ignore[arg-type]
            found += _flat(tuple(module._modules.values()), states)  # type: ignore[union-attr, arg-type]
        else:
            found.append(module)
    return tuple(found)


def _ending(norm: Any, act: Activation, sizes: Any) -> tuple[Any, ...]:
    eps, statistics = (0.0, None) if norm is None else (float(norm.eps), weakref.ref(norm))
    return statistics, sizes, (*act, eps)


def _mix(modules: Modules, states: dict[int, tuple[Any, ...]], inputs: int) -> tuple[tuple[Any, ...], Modules | None]:
    """A 1x1 convolution of so many channels at the front, with what follows it, and what is left to call."""
    parts = Parts(modules, states)
    conv = after_nothing(parts)
    small = is_pointwise(conv) and inputs <= WIDEST and inputs * conv.out_channels <= LARGEST
    if not small or conv.in_channels != inputs:
        return _NO_MIX, None
    parts.take()
    outputs = int(conv.out_channels)
    return (weakref.ref(conv), *_ending(*norm_and_act(parts, outputs), outputs)), parts.left()
