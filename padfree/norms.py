"""Batch norms with a forward of their own: whether it is the norm, and then children of theirs, and nothing else.

Norms that carry their activation (timm's `BatchNormAct2d`, say) are such. Their code must name nothing but what a norm
and its children are made of, and do so when a stand-in is run while every function of torch's is watched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from padfree.forwards import Calls, names_no_more

__all__ = ["children_behind"]

_NAMES = frozenset(  # attributes: a norm's own, those of modules and functions that compute no more than it, a rank
    (
        *("training", "momentum", "track_running_stats", "num_batches_tracked", "eps", "num_features", "affine"),
        *("running_mean", "running_var", "weight", "bias", "add_", "forward", "nn", "functional", "BatchNorm2d"),
        *("batch_norm", "_assert", "ndim", "dim", "jit", "is_scripting"),
    )
)
_COUNTED = ("num_batches_tracked",)  # in train mode


def children_behind(norm: nn.BatchNorm2d) -> tuple[str, ...] | None:
    """The children that a norm's forward calls on the norm's result in eval mode, in order; None where it does more.

    Args:
        norm: in eval mode, with a forward of its own; it is not changed.
    """
    forwards = [vars(owner)["forward"] for owner in type(norm).__mro__ if "forward" in vars(owner)]
    own = forwards[: forwards.index(nn.BatchNorm2d.forward)] if nn.BatchNorm2d.forward in forwards else None
    if norm.training or own is None or not all(_is_a_norms(forward, tuple(norm._modules)) for forward in own):
        return None
    try:
        return _watched(norm)
    except Exception:  # whatever a forward of the user's raises here, it is called as it is
        return None


def _is_a_norms(forward: Any, children: tuple[str, ...]) -> bool:
    functions = (nn.BatchNorm2d, torch._assert, F.batch_norm)
    names = _NAMES.union(children)
    return names_no_more(forward, names, functions=functions, builtins=("super", "float"), written=_COUNTED)


def _watched(norm: nn.BatchNorm2d) -> tuple[str, ...] | None:
    called: list[tuple[str, Any, Any]] = []
    twin = object.__new__(type(norm))
    twin.__dict__.update(norm.__dict__)
    twin.__dict__["_modules"] = {name: _StandIn(name, called) for name in norm._modules}
    like: Any = norm.running_mean
    x = torch.randn(2, norm.num_features, 3, 3, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    calls = Calls()
    with torch.no_grad(), calls:
        result = twin.forward(x)
    norms = [(_ordered(*args, **settings), out) for func, args, settings, out in calls.seen if func is F.batch_norm]
    if len(norms) != 1 or any(func is not F.batch_norm and func not in _HARMLESS for func, *_ in calls.seen):
        return None
    arguments, out = norms[0]
    expected = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, norm.eps)
    same = all(a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(arguments, expected, strict=True))
    for _, given, passed_on in called:
        same = same and given is out
        out = passed_on
    return tuple(name for name, _, _ in called) if same and result is out else None


class _StandIn(nn.Module):
    def __init__(self, name: str, called: list[tuple[str, Any, Any]]) -> None:
        super().__init__()
        self.note = (name, called)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.view_as(x)
        self.note[1].append((self.note[0], x, out))
        return out


_HARMLESS = {torch._assert, torch.Tensor.dim, torch.Tensor.ndim.__get__, torch.Tensor.view_as}  # type: ignore[attr-defined]


def _ordered(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    return input, running_mean, running_var, weight, bias, training, eps
