"""What decides what calling a module does, its tensors apart: read once, so that C can see when it changes.

A state is what `_unchanged.c` compares at each call, by identity: a hook, a patched or replaced function, training
mode, another setting or child is a change. Nothing here keeps a module alive.
"""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

__all__ = ["has_usual", "is_bare", "is_torchs", "objects", "refs", "state"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What an attribute of the instance would stand before: functions of the class, parameters and buffers.
_FUNCTIONS = ("forward", "_call_impl", "_compiled_call_impl", "_conv_forward", "_check_input_dim")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_REPLACED = _FUNCTIONS + _TENSORS
_CALLING = ("__call__", "_call_impl", "_compiled_call_impl", "__getattr__", "__getattribute__")

# By the base class: the functions of a class that decide what it computes, and the settings of an instance.
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("training", "num_features", "eps", "momentum", "affine", "track_running_stats")
_KINDS: tuple[tuple[type[nn.Module], tuple[str, ...], tuple[str, ...]], ...] = (
    (nn.Conv2d, ("forward", "_conv_forward"), _CONV),
    (nn.BatchNorm2d, ("forward", "_check_input_dim"), _NORM),
    (nn.Sequential, ("forward", "__iter__"), ()),
    (nn.Hardtanh, ("forward",), ("min_val", "max_val")),
    (nn.GELU, ("forward",), ("approximate",)),
    (nn.LeakyReLU, ("forward",), ("negative_slope",)),
    (nn.Module, ("forward",), ("training",)),
)


def _functions(kind: type, names: Sequence[str]) -> list[Any]:
    return [getattr(kind, name) for name in names]


_MODULES = os.path.join("nn", "modules", "module.py")
_PLACE = nn.Module.extra_repr.__code__.co_filename.removesuffix(_MODULES)  # a frozen program has no path to torch


def is_torchs(function: object) -> bool:
    """Whether this is a function of torch's own, rather than one that somebody put in its place."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function is None or isinstance(function, (types.BuiltinFunctionType, types.WrapperDescriptorType))
    return str(code.co_filename).startswith(_PLACE)


def _own(base: type[nn.Module], names: Sequence[str]) -> list[Any] | None:
    """The functions of a class that has all of them from torch; None, which no class has, of one that was patched."""
    functions = _functions(base, names)
    return functions if all(map(is_torchs, functions)) else None


_USUAL = {base: _own(base, names) for base, names, _ in _KINDS[:-1]}
_USUAL_CALL = _own(nn.Module, _CALLING)


def has_usual(base: type[nn.Module], module: object) -> bool:
    """Whether it is of this class, with the functions of this class that decide what it computes."""
    names = next(found[1] for found in _KINDS if found[0] is base)
    return isinstance(module, base) and _functions(type(module), names) == _USUAL[base]


def is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing besides."""
    return not _is_altered(module.__dict__) and _functions(type(module), _CALLING) == _USUAL_CALL


def _is_altered(own: dict[str, Any]) -> bool:
    return any(own.get(name) for name in _HOOKS) or any(name in own for name in _REPLACED)


def state(module: nn.Module) -> tuple[Any, ...]:
    """What `_unchanged.c` compares.

    Raises:
        TypeError: it has settings that are no plain values of its own; nothing would show that they change.
    """
    own, kind = module.__dict__, type(module)
    base, functions, settings = next(found for found in _KINDS if isinstance(module, found[0]))
    for name in (*settings, *_HOOKS):
        if name not in own or hasattr(kind, name) or not (name in _HOOKS or _is_plain(own[name])):
            raise TypeError(f"{name} is no plain value of {kind.__qualname__}'s own")
    # forwards that a forward of its own may call
    owners = kind.__mro__[1 : kind.__mro__.index(base) + 1] if base is nn.BatchNorm2d else ()
    methods = [(kind, name) for name in functions + _CALLING] + [(owner, "forward") for owner in owners]
    return (
        weakref.ref(module),
        kind,
        len(own),
        tuple(part for owner, name in methods for part in (owner, name, getattr(owner, name))),
        tuple(part for name in settings for part in (name, own[name])),
        _HOOKS,
        _REPLACED,
        _is_altered(own),
        refs(own["_modules"].values()),
    )


def _is_plain(value: object) -> bool:
    return type(value) in (bool, int, float, str, type(None)) or (type(value) is tuple and all(map(_is_plain, value)))


def refs(modules: Iterable[object]) -> tuple[Any, ...]:
    """Weak references; None, and what cannot be referred to weakly (some callables), for itself."""
    return tuple(_ref(module) for module in modules)


def objects(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `refs` were made of, and None for what is gone."""
    return tuple([each() if isinstance(each, weakref.ref) else each for each in found]) if found else ()


def _ref(module: Any) -> Any:
    try:
        return None if module is None else weakref.ref(module)
    except TypeError:
        return module
