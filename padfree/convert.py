"""`plan` and `convert`: the whole story on one screen.

record -> match -> plan -> surgery -> verify, first on weightless copies, then once for real, then on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import padfree.rules  # noqa: F401  (registers the rules)
from padfree.analysis.flow import Flow
from padfree.analysis.sites import Sites
from padfree.errors import NothingToConvertError, PadfreeError, PlanError
from padfree.layers.stem import StemTail
from padfree.plan.groups import Group, find
from padfree.plan.patterns import Patterns
from padfree.plan.sizes import sizes_after, with_sizes
from padfree.plan.trials import Trials
from padfree.record.copies import full_copy, kept_random_state
from padfree.record.inputs import check_model
from padfree.record.recording import record
from padfree.rewrite.effects import kept_globals
from padfree.rewrite.forward import is_rewritten
from padfree.rewrite.operations import Operation, perform
from padfree.rules.base import rules as get_rules
from padfree.types import Match, Options, PlanData
from padfree.verify.real import real_run

_one_at_a_time = threading.RLock()  # torch.fx patches nn.Module.__call__ for all threads while it traces


@dataclass(frozen=True)
class Plan(PlanData):
    """What `convert` will do, word for word: print it, save it (`to_dict`), apply it to any equal model."""

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Carry the plan out on a copy of `model`, or on `model` itself.

        Raises:
            PlanError: the model is not one the plan fits.
        """
        check_model(model)
        return _finish(model, self._operations(model), self, inplace)

    def _operations(self, model: nn.Module) -> tuple[Operation, ...]:
        """What carries out this plan and those before it, which the model is left untouched by."""
        before: tuple[Operation, ...] = ()
        if self.earlier is not None:
            before = Plan(**vars(self.earlier))._operations(model)
            model = perform(full_copy(model), before)
        with _one_at_a_time, kept_random_state(), kept_globals(model):
            sites = Sites(Flow(record(model, self.input_size)))
            groups, trials = _refind(self, sites)
            operations, why = trials.attempt(groups)
        if operations is None:
            raise PlanError(f"the plan for {self.model} cannot be carried out on this {type(model).__name__}: {why}")
        return (*before, *operations)


def plan(
    model: nn.Module,
    *,
    rules: Iterable[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    options: Options | None = None,
    input_size: tuple[int, ...] | None = None,
    check: bool = True,
) -> Plan:
    """What `convert` with the same arguments would do; the model stays untouched.

    Raises:
        PadfreeError: a wrong argument, or a model that cannot be looked through.
    """
    return _plan(model, rules, include, exclude, options, input_size, check)[0]


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
) -> nn.Module:
    """Rewrite a network into its padding-free form (paper.md, Rewrites).

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

    Returns:
        the converted network; `model` itself if it was converted before and nothing is left to do.

    Raises:
        NothingToConvertError: nothing matches, saying what was looked at.
        PadfreeError: the model or an argument is refused, with the reason.
    """
    rules = None if rules is None else tuple(rule.name for rule in get_rules(rules))
    made, operations = _plan(model, rules, include, exclude, options, input_size, check)
    if not made.matches:
        if is_converted(model):
            return model
        raise NothingToConvertError(_nothing(model, made, rules))
    return _finish(model, operations, made, inplace)


def is_converted(model: nn.Module) -> bool:
    """Whether some part of the model was rewritten by padfree.

    Raises:
        PadfreeError: it is not a network.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"is_converted takes a torch.nn.Module, not {type(model).__name__}")
    return any(isinstance(module, StemTail) or is_rewritten(module) for module in model.modules())


def _plan(
    model: nn.Module,
    rule_names: Iterable[str] | None,
    include: Patterns,
    exclude: Patterns,
    options: Options | None,
    input_size: tuple[int, ...] | None,
    check: bool,
) -> tuple[Plan, tuple[Operation, ...]]:
    check_model(model)
    options = Options() if options is None else options
    if not isinstance(options, Options):
        raise PadfreeError(f"options is {options!r}; pass padfree.Options(...)")
    selected = get_rules(rule_names)
    everything = tuple(dict.fromkeys((*selected, *get_rules())))
    with _one_at_a_time, kept_random_state(), kept_globals(model) as put_back:
        sites = Sites(Flow(record(model, input_size)))
        groups, skips = find(sites, everything, selected, options, include, exclude)
        trials = Trials(sites, options, selected, real_run(model, sites.recording, put_back) if check else None)
        kept, operations, failed = trials.settle(groups)
    matches = (*with_sizes(kept, sizes_after(sites, kept), sites), *trials.following(kept))
    recording = sites.recording
    order = sorted([*skips, *failed], key=lambda skip: (skip.domain, skip.name))
    earlier = model.__dict__.get("padfree_plan")
    made = Plan(
        model=type(model).__name__,
        input_size=recording.input_size,
        options=options,
        matches=matches,
        skips=tuple(dict.fromkeys(order)),
        earlier=earlier,
        outputs=trials.outputs(kept),
    )
    return made, operations


def _refind(plan: Plan, sites: Sites) -> tuple[list[Group], Trials]:
    """The plan's matches, found again in a model, and the trials that carry them out.

    Raises:
        PlanError: one is not there, or differs.
    """
    used = get_rules(dict.fromkeys(match.rule for match in plan.matches) or None)
    trials = Trials(sites, plan.options, used)
    found = [item for rule in used for item in rule.match(sites, plan.options) if isinstance(item, Match)]
    there = {_key(match): match for match in found}
    groups: dict[int, list[Match]] = {}
    for match in plan.matches:
        if _key(match) in there:
            groups.setdefault(match.domain, []).append(there[_key(match)])
    grouped = [Group(domain, tuple(matches)) for domain, matches in sorted(groups.items())]
    there |= {_key(match): match for match in trials.following(grouped)}
    for match in plan.matches:
        again = there.get(_key(match))
        if again is None or again.to_dict()["detail"] != match.to_dict()["detail"]:
            raise PlanError(
                f"the plan for {plan.model} does not fit this {type(sites.recording.model).__name__}: "
                f"`{match.name}` is not there, or not as it was; make a new plan"
            )
    return grouped, trials


def _key(match: Match) -> tuple[str, str, Any]:
    return (match.rule, match.name, match.detail.get("op"))


def _finish(model: nn.Module, operations: tuple[Operation, ...], made: Plan, inplace: bool) -> nn.Module:
    with torch.inference_mode(False):
        target = model if inplace else full_copy(model)
        perform(target, operations)
    target.__dict__["padfree_plan"] = made
    return target


def _nothing(model: nn.Module, made: Plan, rules: tuple[str, ...] | None) -> str:
    size = "x".join(map(str, made.input_size))
    found = list(
        dict.fromkeys(f"{f'`{skip.name}`' if skip.name else 'its own forward'}: {skip.reason}" for skip in made.skips)
    )
    seen = "; ".join(found[:6])
    more = f" (and {len(found) - 6} more)" if len(found) > 6 else ""
    kinds = {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Conv")}
    what = f"its convolutions are {', '.join(sorted(kinds))}" if kinds else "it has no convolution modules"
    lacking = "no 2-D convolution with an odd kernel of at least 3 and stride 2, and no stem to follow"
    if rules is not None:
        lacking = f"no place for {' or '.join(map(repr, rules))}, the only rules asked for"
    seen = seen or f"{lacking}; {what}"
    return f"nothing to convert in {type(model).__name__} at {size}: {seen}{more}"
