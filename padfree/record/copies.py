"""Copies of a model: a weightless one to look at, and a true one to work on.

Both leave the original untouched. Forward hooks belong to the user and must not fire while
padfree looks, so the weightless copy carries none.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from padfree.errors import PadfreeError
from padfree.record.rebind import FUNCTIONS, Copies

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Look at a model the same way whatever surrounds the call, and leave every CPU random generator as it was.

    A recorded forward or a trial copy may draw numbers. Gradients are on, or a block that switches them off
    would look like any other.
    """
    with kept_generators(), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def kept_generators(seed: int | None = None) -> Iterator[None]:
    """Leave the random generators of Python, numpy and torch's CPU as they were.

    Args:
        seed: what they start from inside, so that two forwards draw the same numbers; None: from where they are.
    """
    numpy = sys.modules.get("numpy")
    python, drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                random.seed(seed)
                torch.default_generator.manual_seed(seed)  # of the CPU alone
                if numpy is not None:
                    numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy with every parameter and buffer on the meta device, in eval mode, without hooks.

    Raises:
        PadfreeError: the model cannot be copied (`copy.deepcopy` fails).
    """
    return _bare(model, {id(tensor): _meta(tensor) for tensor in [*model.parameters(), *model.buffers()]})


def bare_copy(model: nn.Module, shared: Iterable[torch.Tensor] = ()) -> nn.Module:
    """A copy with real tensors, in eval mode, without hooks; the tensors in `shared` are the model's own."""
    return _bare(model, {id(tensor): tensor for tensor in shared})


def _bare(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in eval mode without hooks; `memo` says what stands for what."""
    for module in model.modules():
        memo |= {id(module.__dict__[name]): OrderedDict() for name in HOOK_TABLES}
    duplicate = _deepcopy(model, memo)
    for module in duplicate.modules():
        module.training = False
    return duplicate


def full_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose own functions read the copy: closures over the model's modules are rebound.

    bsconv's BSConv-S models carry such closures (`reg_loss`); after a plain `copy.deepcopy` they
    would read, and send gradients to, the original (the paper, BSConv-S MobileNetV3).

    Raises:
        PadfreeError: the model cannot be copied (`copy.deepcopy` fails).
    """
    return _deepcopy(model, {})


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for module in model.modules():
        for computed in _computed(module.__dict__):
            memo.setdefault(id(computed), computed.detach().clone())
        for held in module.__dict__.values():
            if type(held) is OrderedDict and not held and not held.__dict__:  # tables of hooks: most of the work
                memo.setdefault(id(held), OrderedDict())
    try:
        duplicate: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise PadfreeError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "padfree works on a copy. "
            "Hint: keep open files, generators and locks out of the model"
        ) from error
    own = set(map(id, model.modules()))
    shared = next((name for name, module in duplicate.named_modules() if id(module) in own), None)
    if shared is not None:
        raise PadfreeError(
            f"copying {type(model).__name__} gives `{shared}` itself again (its __deepcopy__ says so), and padfree "
            "works on a copy. Hint: convert a model without it, or let __deepcopy__ copy"
        )
    originals = [*model.modules(), *model.parameters(), *model.buffers()]
    copies = Copies({id(old): memo[id(old)] for old in originals if id(old) in memo})
    for module in duplicate.modules():
        _rebind_in(module.__dict__, copies)
    return duplicate


def _rebind_in(held: Any, copies: Copies) -> None:
    """Rebind what a module holds, also in its plain containers, such as those of its hooks."""
    items = list(held.items()) if isinstance(held, dict) else list(enumerate(held))
    for key, value in items:
        if type(value) in (dict, OrderedDict, list):
            _rebind_in(value, copies)
        elif isinstance(value, FUNCTIONS) and (rebound := copies.of(value)) is not value:
            held[key] = rebound


def _computed(tree: Any) -> Iterator[torch.Tensor]:
    """Plain tensors that carry a graph (caches of eval-mode attention, old-style weight_norm): torch copies none."""
    if isinstance(tree, torch.Tensor):
        if tree.grad_fn is not None:
            yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _computed(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _computed(item)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise PadfreeError(
            "the model has lazy parameters that no forward has initialised yet; run it on a sample input first"
        )
    empty = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Modules in this mode, past a `train` of their own, which may do anything and return nothing."""
    before = [(module, module.training) for module in modules]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
