"""`--replace KIND [KEY=VALUE ...]`: what is put in the place of convolutions before a network is converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from padfree.errors import PadfreeError
from padfree.replacing.replace import KINDS, replace

HELP = (
    f"before converting, put {', '.join(KINDS)} in the place of convolutions; KEY=VALUE: kernel_sizes=3,5 p=0.25 "
    "with_bn=true init=svd groups=4 condense_factor=4 include=PATTERN,... exclude=PATTERN,..."
)


def replaced(model: nn.Module, requests: Sequence[Sequence[str]], size: tuple[int, ...] | None) -> nn.Module:
    """A copy of a model with every replacement made that was asked for, in order.

    Raises:
        PadfreeError: a request cannot be read, or carried out.
    """
    for kind, *pairs in requests:
        model = replace(model, kind, **_settings(pairs), input_size=size)
    return model


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or key not in _READ:
            raise PadfreeError(f"--replace takes KIND and KEY=VALUE with a key of {', '.join(_READ)}, not {text!r}")
        if key in found:
            raise PadfreeError(f"--replace says {key} twice")
        try:
            found[key] = _READ[key](value)
        except (KeyError, ValueError) as error:
            raise PadfreeError(f"--replace {text}: {value!r} is nothing that {key} takes") from error
    return found


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _kernels(text: str) -> list[tuple[int, int]]:
    """3,5 or 3x3,1x5."""
    sizes = [[int(side) for side in part.split("x")] for part in _list(text)]
    if any(len(size) > 2 for size in sizes):
        raise ValueError(text)
    return [(size[0], size[-1]) for size in sizes]


_READ: dict[str, Callable[[str], Any]] = {
    "kernel_sizes": _kernels,
    "p": float,
    "with_bn": {"true": True, "false": False}.__getitem__,
    "init": str,
    "groups": int,
    "condense_factor": int,
    "include": _list,
    "exclude": _list,
}
