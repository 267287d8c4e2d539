"""`replace`: other layers in the place of a network's convolutions.

padfree.replace(model, "bsconv-u", init="svd")

The same way as `convert` goes: record -> match -> try on a weightless copy -> carry out on a copy of the model, whose
`padfree_plan` is the plan. Replace first, then convert: `convert` takes a strided BSConv pair for the dense convolution
that it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import nn

from padfree.convert import Plan
from padfree.errors import NothingToConvertError, PadfreeError
from padfree.geometry import size_text
from padfree.layers.learned_groups import LearnedGroupConv2d
from padfree.layers.separable import BSConvS, BSConvU
from padfree.plan.patterns import Patterns
from padfree.plan.planning import Prepared, Request, prepare
from padfree.record.batches import image_batches
from padfree.record.copies import bare_copy, full_copy
from padfree.replacing.fit import Fitted, called, fit_outputs
from padfree.replacing.norms import reestimate_norms
from padfree.rewrite.operations import perform
from padfree.rules.base import Rule, registered
from padfree.rules.separable import INITS

Kernels = Sequence[int | tuple[int, int]]
_LAYERS: dict[str, type[nn.Module]] = {
    "bsconv-u": BSConvU,
    "bsconv-s": BSConvS,
    "learned-groups": LearnedGroupConv2d,
}
KINDS = tuple(_LAYERS)


def plan_replacement(
    model: nn.Module,
    kind: str,
    *,
    kernel_sizes: Kernels | None = None,
    p: float | None = None,
    with_bn: bool | None = None,
    groups: int | None = None,
    condense_factor: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    init: str | None = None,
    input_size: tuple[int, ...] | None = None,
    check: bool = True,
) -> Plan:
    """What `replace` with the same arguments would do; the model stays untouched.

    Raises:
        PadfreeError: a wrong argument, or a model that cannot be looked through.
    """
    settings = {"kernel_sizes": kernel_sizes, "p": p, "with_bn": with_bn, "init": init}
    rule = _rule(kind, settings | {"groups": groups, "condense_factor": condense_factor})
    return Plan.of(model, *_prepared(model, rule, include, exclude, input_size, check))


def replace(
    model: nn.Module,
    kind: str,
    *,
    kernel_sizes: Kernels | None = None,
    p: float | None = None,
    with_bn: bool | None = None,
    groups: int | None = None,
    condense_factor: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    init: str | None = None,
    batches: Iterable[Any] | None = None,
    norms: bool = False,
    progress: Callable[[Fitted], None] | None = None,
    input_size: tuple[int, ...] | None = None,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Put other layers in the place of dense convolutions.

    Class, dtype, device, modes, `requires_grad`, hooks and shared layers stay. A convolution is left alone whose
    forward does more than pad and convolve, or whose weight is computed or another module's too.

    Args:
        model: a network that takes image batches (N, C, H, W).
        kind: "bsconv-u" or "bsconv-s" (`padfree.layers.separable`), "learned-groups"
            (`padfree.layers.learned_groups`: the same parameters and outputs, until stages condense it).
        kernel_sizes: of the convolutions to replace; default ((3, 3), (5, 5)), for learned groups ((1, 1),).
        p: of bsconv-s: M' = min(M, max(4, ceil(p M))); default 0.25.
        with_bn: of bsconv: a batch norm behind each 1x1 convolution; default False.
        groups: of learned-groups: how many; default 4.
        condense_factor: of learned-groups: each group ends with a C-th of the inputs; default 4.
        include: module paths (with all below them), `fnmatch` patterns or "re:" patterns of what to replace.
        exclude: the same for places to leave alone.
        init: values of bsconv: "fresh" (default), torch's initial ones: what was learnt is lost; or "svd", those
            nearest to the convolution's weight.
        batches: image batches, with or without labels: the values with the smallest error of the outputs over them,
            layer by layer (`padfree.replacing.fit`); they keep far more than "svd" does, for some forward passes.
        norms: re-estimate the network's batch norms on these batches afterwards.
        progress: called with a `padfree.replacing.fit.Fitted` after each layer that was fitted; `print` will do.
        input_size: (C, H, W); default: that of the model's `pretrained_cfg`, else (3, 224, 224).
        inplace: change `model` itself; else a copy.
        check: run a changed copy once for real, see `padfree.convert`.

    Returns:
        the network; `model` itself if all of it was replaced before.

    Raises:
        NothingToConvertError: there is nothing to replace, saying what was looked at.
        PadfreeError: the model, an argument or a batch is refused, with the reason.
    """
    if batches is not None:
        if kind == "learned-groups" or init not in (None, "svd"):
            raise PadfreeError(
                f"batches are for the values of bsconv-u and bsconv-s, not for {kind!r} with init={init!r}"
            )
        init = "svd"
    elif norms or progress is not None:
        raise PadfreeError(f"{'norms' if norms else 'progress'} is about batches, and none are given")
    settings = {"kernel_sizes": kernel_sizes, "p": p, "with_bn": with_bn, "init": init}
    rule = _rule(kind, settings | {"groups": groups, "condense_factor": condense_factor})
    request, prepared = _prepared(model, rule, include, exclude, input_size, check)
    if not prepared.matches:
        if include is None and any(isinstance(module, _LAYERS[kind]) for module in model.modules()):
            return model
        raise NothingToConvertError(_nothing(model, kind, prepared))
    made = Plan.of(model, request, prepared)
    if batches is None:
        return _carried_out(model if inplace else full_copy(model), prepared, made)
    images = image_batches(batches, model, labels=True, together=2 if norms else 1, advice="a hundred or two do")
    before = bare_copy(model, model.parameters())
    names = [match.name for match in prepared.matches]
    for first in {tuple(batch.shape[1:]): batch for batch in reversed(images)}.values():
        order = called(before, names, first)  # whether every size is taken; the last one is the first batch's
    target = _carried_out(full_copy(model), prepared, made)  # so that `model` stays as it was where the fit fails
    with torch.autocast(images[0].device.type, enabled=False):  # it would go on with casts of old weights
        fit_outputs(before, target, order, images, progress)
        if norms:  # through a copy of the same tensors without hooks
            reestimate_norms(bare_copy(target, _tensors(target)), images)
    if not inplace:
        return target
    _carried_out(model, prepared, made)
    with torch.inference_mode(False), torch.no_grad():
        for mine, found in zip(_tensors(model), _tensors(target), strict=True):
            mine.copy_(found)
    return model


def _carried_out(target: nn.Module, prepared: Prepared, made: Plan) -> nn.Module:
    with torch.inference_mode(False):
        perform(target, prepared.operations)
    target.__dict__["padfree_plan"] = made
    return target


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _prepared(
    model: nn.Module,
    rule: Rule,
    include: Patterns,
    exclude: Patterns,
    input_size: tuple[int, ...] | None,
    check: bool,
) -> tuple[Request, Prepared]:
    request = changed(Request.of(None, include, exclude, None, input_size, check), rules=(rule,))
    return request, prepare(model, request)


def _rule(kind: str, settings: dict[str, Any]) -> Rule:
    """The rule of a kind with these settings, where they are not None.

    Raises:
        PadfreeError: the kind is unknown, or a setting is wrong or of another kind.
    """
    if kind not in _LAYERS:
        raise PadfreeError(f"kind is {kind!r}; it takes one of {', '.join(map(repr, _LAYERS))}")
    given = {name: value for name, value in settings.items() if value is not None}
    known = ["kernel_sizes", "groups", "condense_factor"] if kind == "learned-groups" else ["kernel_sizes", *_BSCONV]
    known += ["p"] if kind == "bsconv-s" else []
    other = sorted(given.keys() - set(known))
    if other:
        raise PadfreeError(f"{kind!r} takes no {other[0]}; its settings are {', '.join(known)}")
    for name, value in given.items():
        sound, takes = _CHECKS[name]
        if not sound(value):
            raise PadfreeError(f"{name} is {value!r}; it takes {takes}")
    if "kernel_sizes" in given:
        given["kernels"] = tuple(_pair(size) for size in given.pop("kernel_sizes"))
    if "p" in given:
        given["share"] = given.pop("p")
    rule = registered()[kind.replace("-", "_")]
    return changed(rule, match=functools.partial(rule.match, **given))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_kernels(value: Any) -> bool:
    pairs = [(size, size) if isinstance(size, int) else size for size in value] if isinstance(value, Sequence) else []
    return bool(pairs) and all(isinstance(p, Sequence) and len(p) == 2 and all(map(_is_count, p)) for p in pairs)


_BSCONV = ("with_bn", "init")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kernel_sizes": (_are_kernels, "a list of kernel sizes, such as ((3, 3), (5, 5))"),
    "p": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "with_bn": (lambda value: isinstance(value, bool), "True or False"),
    "init": (lambda value: value in INITS, f"one of {INITS}"),
    "groups": (_is_count, "a positive integer"),
    "condense_factor": (_is_count, "a positive integer"),
}


def _nothing(model: nn.Module, kind: str, prepared: Prepared) -> str:
    """Why nothing of a model is replaced."""
    found = [f"`{skip.name}`: {skip.reason}" for skip in prepared.skips]
    more = f" (and {len(found) - 6} more)" if len(found) > 6 else ""
    why = "; ".join(found[:6]) or "it has no dense nn.Conv2d with such a kernel"
    return f"nothing to replace by {kind} in {type(model).__name__} at {size_text(prepared.input_size)}: {why}{more}"
