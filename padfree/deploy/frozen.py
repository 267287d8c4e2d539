"""The contract of a fused network: it computes what it does now, and nothing in it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.rewrite.sealed import FUSERS
from padfree.types import FUSED


def freeze(model: nn.Module, size: tuple[int, ...]) -> None:
    """Freeze a fused network, in place: no gradients, no training mode, no weights of another network.

    Each module gets a `train` of its own on the instance: its class stays what it is to whatever asks. So do its own
    fusing methods, which have nothing left to do: libraries call them before they run a network (ultralytics' predict).
    """
    model.requires_grad_(False)
    for module in model.modules():
        module.training = False
        module.__dict__["train"] = _Frozen(module)
        module.__dict__.update({name: _Done(module) for name in FUSERS if _takes_nothing(module, name)})
    model.register_load_state_dict_pre_hook(_check_keys)  # type: ignore[no-untyped-call]
    model.__dict__[FUSED] = tuple(size)


def is_fused(model: nn.Module) -> bool:
    """Whether `padfree.fuse` returned this network."""
    return FUSED in model.__dict__


class _Frozen:
    """The `train` of a module of a fused network; an object, so that it is copied and pickled with the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise PadfreeError(
                f"this {type(self.module).__name__} belongs to a fused network, whose batch norms are folded and whose "
                "weights are frozen; train the network that padfree.fuse was given, and fuse it afterwards"
            )
        return self.module


def _takes_nothing(module: nn.Module, name: str) -> bool:
    """Whether a module's class has a method of this name that can be called without arguments.

    One that needs some computes (`fuse(a, b)` of two maps), and a forward may call it.
    """
    method = getattr(type(module), name, None)
    if not inspect.isfunction(method):
        return False
    parameters = list(inspect.signature(method).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(each.default is not each.empty or each.kind in kinds for each in parameters)


class _Done:
    """A fusing method of a module of a fused network: everything is folded, so it returns the module as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.module


def _check_keys(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, metadata: Any, strict: bool, *_: Any
) -> None:
    """Refuse weights of the network before it was fused, whatever `strict` says: they are not the same values."""
    own, given = set(module.state_dict()), {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    if own != given:
        first = ", ".join(sorted(own ^ given)[:3])
        raise PadfreeError(
            f"this {type(module).__name__} is fused, and these are not the weights of a fused one ({len(own ^ given)} "
            f"keys differ, {first}, ...); load them into the unfused network, and fuse it then"
        )
