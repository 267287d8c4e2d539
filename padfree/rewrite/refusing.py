"""Classes whose methods beside `forward` raise where they would not give what the converted `forward` gives."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from padfree.errors import SiblingError
from padfree.rewrite.classes import quiet_subclass
from padfree.rewrite.forward import Locked, original_class, rebuild, rewritten_class, sealed_class

Refused = tuple[tuple[str, str], ...]  # (method, why)
_REFUSED = "_padfree_refused"


def refused_methods(kind: type[nn.Module]) -> Refused:
    """The methods of a class that raise, and why."""
    found: Refused = getattr(kind, _REFUSED, ())
    return found


def refusing_class(kind: type[nn.Module], methods: Refused) -> type[nn.Module]:
    """A class like `kind`, a module's present one, whose `methods` raise too.

    Like all classes made here it is a direct subclass of a generated one of the module's original class, pickles by
    how it was made, and is made once.
    """
    inner = _plain(kind)
    methods = tuple(sorted({**dict(refused_methods(kind)), **dict(methods)}.items()))
    found = _CLASSES.get((inner, methods))
    if found is None:
        members: dict[str, Any] = {name: _refusing(name, why) for name, why in methods}
        for name in ("__module__", "__qualname__", "__doc__", "_padfree_base"):
            members[name] = getattr(inner, name)
        members |= {_REFUSED: methods, "__reduce_ex__": _reduce}
        found = _CLASSES[inner, methods] = quiet_subclass(inner, members)
    return found


def relocked_class(module: nn.Module, locked: Locked) -> type[nn.Module]:
    """The generated class of a module, which refuses what it refuses, with other locks."""
    source, names, _ = type(module)._padfree_recipe  # type: ignore[attr-defined]
    kind = rewritten_class(original_class(module), source, names, locked)
    refused = refused_methods(type(module))
    return refusing_class(kind, refused) if refused else kind


_CLASSES: weakref.WeakValueDictionary[tuple[type[nn.Module], Refused], type[nn.Module]] = weakref.WeakValueDictionary()


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    """The generated class below a refusing one; for a class that is not generated, one that seals its fusers."""
    if _REFUSED in vars(kind):
        base: type[nn.Module] = kind.__bases__[0]
        return base
    return kind if "_padfree_recipe" in vars(kind) else sealed_class(kind)


def _refusing(name: str, why: str) -> Any:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise SiblingError(
            f"{original_class(self).__name__}.{name}() does not agree with the converted forward: {why}. "
            "Take what you need by forward hooks, or convert a network whose forward is what you need "
            "(timm: features_only=True)"
        )

    refuse.__name__ = name
    return refuse


def _reduce(self: nn.Module, protocol: Any) -> Any:
    inner: Any = type(self).__bases__[0]
    _, (base, *recipe), state = inner.__reduce_ex__(self, protocol)
    return (rebuild_refusing, (base, tuple(recipe), refused_methods(type(self))), state)


def rebuild_refusing(base: type[nn.Module], recipe: tuple[Any, ...], methods: Refused) -> nn.Module:
    """Unpickling entry: an empty instance of the class; its state follows."""
    kind = refusing_class(type(rebuild(base, *recipe)), methods)
    instance: nn.Module = kind.__new__(kind)
    return instance
