"""`plan` and `convert`: the whole story on one screen.

record -> match -> group -> try on weightless copies, once for real -> carry out on the model (`padfree.plan.planning`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import padfree.rules  # noqa: F401  (registers the rules)
from padfree.errors import NothingToConvertError, PadfreeError, UntrainedWarning
from padfree.layers.new import new_layers, untrained
from padfree.layers.preserve import shows_training
from padfree.layers.stem import StemTail
from padfree.plan.patterns import Patterns
from padfree.plan.planning import Prepared, Request, nothing_to_convert, prepare, prepare_again
from padfree.plan.reading import read
from padfree.record.copies import full_copy
from padfree.record.inputs import check_model
from padfree.rewrite.forward import is_rewritten
from padfree.rewrite.operations import Operation, perform, preserve
from padfree.types import INITS, Init, Options, PlanData


@dataclass(frozen=True)
class Plan(PlanData):
    """What `convert` will do, word for word: print it, save it (`to_dict`), apply it to any equal model."""

    def apply(self, model: nn.Module, *, inplace: bool = False, init: Init | None = None) -> nn.Module:
        """Carry the plan, and those before it, out on a copy of `model`, or on `model` itself.

        Args:
            model: one that the plan fits.
            inplace: rewrite `model` itself, keeping its Parameter objects; else a copy.
            init: how new layers begin, as in `convert`; default: as the plan says.

        Raises:
            PlanError: the model is not one the plan fits.
        """
        check_model(model)
        if init is not None:
            _check_init(init)
        chosen = None if init is None else _chosen(init, model)
        operations: list[Operation] = []
        kept: list[Operation] = []
        current = model
        for step in self.steps():
            if operations:
                current = perform(full_copy(model), operations)
            found = prepare_again(current, step).operations
            operations += found
            kept += found if (chosen or step.init) == "preserve" else ()
        made = self if chosen is None else replace(self, init=chosen)
        return _carry_out(model, operations, made, inplace, kept)

    @property
    def preserves(self) -> bool:
        """Whether new layers begin at values that preserve what the network computes."""
        return self.init == "preserve"

    @classmethod
    def of(cls, model: nn.Module, request: Request, prepared: Prepared, init: Init = "fresh") -> Plan:
        """The plan of what was prepared for a model."""
        return cls(
            model=type(model).__name__,
            input_size=prepared.input_size,
            options=request.options,
            matches=prepared.matches,
            skips=prepared.skips,
            earlier=model.__dict__.get("padfree_plan"),
            outputs=prepared.outputs,
            init=init,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: a field is missing, unknown or of the wrong kind, or a match comes twice.
        """
        fields = read(data)
        earlier = data.get("earlier")
        return cls(**fields, earlier=None if earlier is None else cls.from_dict(earlier))


def plan(
    model: nn.Module,
    *,
    rules: Iterable[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    options: Options | None = None,
    input_size: tuple[int, ...] | None = None,
    check: bool = True,
    init: Init = "auto",
) -> Plan:
    """What `convert` with the same arguments would do; the model stays untouched.

    Raises:
        PadfreeError: a wrong argument, or a model that cannot be looked through.
    """
    request = Request.of(rules, include, exclude, options, input_size, check)
    _check_init(init)
    return Plan.of(model, request, prepare(model, request), _chosen(init, model))


def convert(
    model: nn.Module,
    *,
    rules: Iterable[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    options: Options | None = None,
    input_size: tuple[int, ...] | None = None,
    inplace: bool = False,
    check: bool = True,
    init: Init = "auto",
) -> nn.Module:
    """Rewrite a network into its padding-free form (the paper, Rewrites).

    Args:
        model: a network that takes image batches (N, C, H, W).
        rules: names of the rules to use; the default is all of them.
        include: module paths (with all below them), `fnmatch` patterns or "re:" patterns of what to convert.
        exclude: the same for places to leave alone.
        options: how the rules rewrite.
        input_size: (C, H, W); default: that of the model's `pretrained_cfg`, else (3, 224, 224).
        inplace: rewrite `model` itself, keeping its Parameter objects; else a copy.
        check: run a converted copy once for real, on one image of that size in eval mode on the model's own device:
            operators of other libraries may fail on maps that their meta kernels accept. Models on the meta
            device are not run.
        init: how the new layers begin. "fresh": with torch's initial values, as in the paper, for networks that are
            trained from scratch. "preserve": at values where the network computes what it did before, as far as there
            are such without data; `padfree.calibrate` then does what takes images. "auto": preserve where the
            network's norms show that it was trained, else fresh.

    Returns:
        the converted network; `model` itself if it was converted before and nothing is left to do.

    Warns:
        UntrainedWarning: with "auto", a trained network has new layers now that are not trained.

    Raises:
        NothingToConvertError: nothing matches, saying what was looked at.
        PadfreeError: the model or an argument is refused, with the reason.
    """
    request = Request.of(rules, include, exclude, options, input_size, check)
    _check_init(init)
    prepared = prepare(model, request)
    if not prepared.matches:
        if is_converted(model):
            return model
        raise NothingToConvertError(nothing_to_convert(model, request, prepared, by_name=rules is not None))
    made = Plan.of(model, request, prepared, _chosen(init, model))
    converted = _carry_out(model, prepared.operations, made, inplace, prepared.operations if made.preserves else ())
    if init == "auto" and made.preserves and new_layers(converted):
        warnings.warn(untrained(converted), UntrainedWarning, stacklevel=2)
    return converted


def is_converted(model: nn.Module) -> bool:
    """Whether some part of the model was rewritten by padfree.

    Raises:
        PadfreeError: it is not a network.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"is_converted takes a torch.nn.Module, not {type(model).__name__}")
    return any(isinstance(module, StemTail) or is_rewritten(module) for module in model.modules())


def _check_init(init: Any) -> None:
    if not isinstance(init, str) or init not in INITS:
        raise PadfreeError(f"init is {init!r}; it takes one of {', '.join(map(repr, INITS))}")


def _chosen(init: Init, model: nn.Module) -> Init:
    """What "auto" means for a model that was looked through."""
    if init != "auto":
        return init
    return "preserve" if shows_training(model) else "fresh"


def _carry_out(
    model: nn.Module, operations: Iterable[Operation], made: Plan, inplace: bool, preserved: Iterable[Operation]
) -> nn.Module:
    """Perform the operations; of those in `preserved` the new layers are given values that preserve the network."""
    with torch.inference_mode(False):
        target = model if inplace else full_copy(model)
        perform(target, operations)
        preserve(target, preserved)
    target.__dict__["padfree_plan"] = made
    return target
