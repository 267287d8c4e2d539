"""Planning, the one way that `plan`, `convert` and `Plan.apply` go: record -> match -> group -> try."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from padfree.analysis.flow import Flow
from padfree.analysis.sites import Sites
from padfree.errors import PadfreeError, PlanError
from padfree.geometry import size_text
from padfree.plan.groups import find
from padfree.plan.patterns import Exactly, Named, Patterns
from padfree.plan.reading import check_matches
from padfree.plan.sizes import sizes_after, with_sizes
from padfree.plan.trials import Trials
from padfree.record.copies import full_copy, kept_random_state
from padfree.record.inputs import check_model
from padfree.record.recording import Recording, record
from padfree.rewrite.effects import kept_globals
from padfree.rewrite.metadata import descriptions
from padfree.rewrite.operations import Operation, perform
from padfree.rules.base import Rule, registered
from padfree.rules.base import rules as get_rules
from padfree.types import FUSED, Match, Options, PlanData, Returned, Skip
from padfree.verify.real import real_run
from padfree.verify.siblings import disagreeing

_one_at_a_time = threading.RLock()  # torch.fx patches nn.Module.__call__ for all threads while it traces


@contextmanager
def looking_at(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave no trace of looking at a model: in random generators, in its classes' globals, in other threads.

    Yields what puts those globals back at once.
    """
    with _one_at_a_time, kept_random_state(), kept_globals(model) as put_back:
        yield put_back


@dataclass(frozen=True)
class Request:
    """What is wanted of a model, checked: the rules to use, how, at which input size, and in which places."""

    rules: tuple[Rule, ...]
    options: Options
    input_size: tuple[int, ...] | None
    places: Named | Exactly
    check: bool = False  # run a converted copy once on real tensors

    @staticmethod
    def of(
        rules: Iterable[str] | None,
        include: Patterns,
        exclude: Patterns,
        options: Options | None,
        input_size: tuple[int, ...] | None,
        check: bool = True,
    ) -> Request:
        """From the arguments of `plan` and `convert`.

        Raises:
            PadfreeError: one is wrong.
        """
        options = Options() if options is None else options
        if not isinstance(options, Options):
            raise PadfreeError(f"options is {options!r}; pass padfree.Options(...)")
        return Request(get_rules(rules), options, input_size, Named(include, exclude), check)

    @staticmethod
    def again(plan: PlanData) -> Request:
        """For the places of a plan, and no others.

        Raises:
            PlanError: the plan names a rule that is not registered, or the same match twice.
        """
        check_matches(plan.matches)
        names = tuple(dict.fromkeys(match.rule for match in plan.matches))
        unknown = [name for name in names if name not in registered()]
        if unknown:
            raise PlanError(
                f"the plan for {plan.model} uses rule {unknown[0]!r}, and there are {', '.join(registered())}; "
                "import the module that registers it first"
            )
        used = get_rules(names or None)
        return Request(used, plan.options, plan.input_size, Exactly(plan.matches))


@dataclass(frozen=True)
class Prepared:
    """What will be done to a model.

    Attributes:
        input_size: (C, H, W) it was recorded at.
        matches: what will be rewritten, with the sizes that the maps will have.
        skips: what was looked at and left alone, and why.
        operations: what carries the matches out.
        outputs: the maps that the model returns.
    """

    input_size: tuple[int, ...]
    matches: tuple[Match, ...]
    skips: tuple[Skip, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Returned, ...]


def prepare(model: nn.Module, request: Request) -> Prepared:
    """Record a model, match the rules, and find by trials which groups of matches can be converted together.

    Raises:
        PadfreeError: the model cannot be looked through, or a pattern of the request means no place of it.
    """
    check_model(model)
    if FUSED in model.__dict__:
        raise PadfreeError(
            f"this {type(model).__name__} is what `padfree.fuse` returned, which is frozen and has no norms left; "
            "convert the network that it was made from, and fuse it then"
        )
    with looking_at(model) as put_back:
        sites = Sites(Flow(record(model, request.input_size)))
        groups, skips = find(sites, request.rules, request.options, request.places)
        run = real_run(model, sites.recording, put_back) if request.check else None
        trials = Trials(sites, request.options, request.rules, run)
        groups = trials.placed(groups)
        operations, _ = trials.attempt(groups)
        if operations is None or trials.fails(operations):
            groups, operations, failed = trials.settle(groups)
            skips += failed
        operations = (*operations, *_surroundings(sites.recording, operations))
        matches = (*with_sizes(groups, sizes_after(sites, groups), sites), *trials.following(groups))
        outputs = trials.outputs(groups)
    order = sorted(skips, key=lambda skip: (skip.domain, skip.name))
    return Prepared(sites.recording.input_size, matches, tuple(dict.fromkeys(order)), operations, outputs)


def _surroundings(recording: Recording, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """What else a conversion changes in the model: methods beside its forward, and what it says of itself."""
    if not operations:
        return ()
    converted = perform(full_copy(recording.model), operations)
    return (*disagreeing(recording, converted), *descriptions(recording, converted))


def prepare_again(model: nn.Module, plan: PlanData) -> Prepared:
    """The matches of a plan, found again in a model by the same way.

    Raises:
        PlanError: one is not there, is not as the plan says, or cannot be carried out; or the plan lacks one.
    """
    prepared = prepare(model, Request.again(plan))
    there = {match.key: match for match in prepared.matches}
    given_up = {(skip.rule, skip.name): skip.reason for skip in prepared.skips}
    kind = type(model).__name__
    for match in plan.matches:
        found = there.pop(match.key, None)
        if found is not None:
            _check_same(match, found, kind)
        elif (match.rule, match.name) in given_up:
            why = given_up[match.rule, match.name]
            raise PlanError(f"the plan for {plan.model} cannot be carried out on this {kind}: `{match.name}`: {why}")
        else:
            raise PlanError(
                f"the plan for {plan.model} does not fit this {kind}: rule {match.rule!r} does not find "
                f"`{match.name}` there; make a new plan"
            )
    if there:
        lacking = next(iter(there.values()))
        raise PlanError(
            f"the plan for {plan.model} lacks `{lacking.name}`, which rule {lacking.rule!r} rewrites together with "
            "what it has; make a new plan"
        )
    return prepared


def _check_same(planned: Match, found: Match, kind: str) -> None:
    says, is_ = planned.to_dict(), found.to_dict()
    for name, value in says.items():
        if value != is_[name]:
            raise PlanError(
                f"the plan does not fit this {kind}: its {name} of `{planned.name}` is {value}, and there it is "
                f"{is_[name]}; make a new plan"
            )


def nothing_to_convert(model: nn.Module, request: Request, prepared: Prepared, *, by_name: bool) -> str:
    """Why nothing of a model is converted: what was looked at (`by_name`: the rules were asked for by name)."""
    found = list(
        dict.fromkeys(
            f"{f'`{skip.name}`' if skip.name else 'its own forward'}: {skip.reason}" for skip in prepared.skips
        )
    )
    seen = "; ".join(found[:6])
    more = f" (and {len(found) - 6} more)" if len(found) > 6 else ""
    kinds = {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Conv")}
    what = f"its convolutions are {', '.join(sorted(kinds))}" if kinds else "it has no convolution modules"
    lacking = "no 2-D convolution with an odd kernel of at least 3 and stride 2, and no stem to follow"
    if by_name:
        lacking = f"no place for {' or '.join(repr(rule.name) for rule in request.rules)}, the only rules asked for"
    seen = seen or f"{lacking}; {what}"
    return f"nothing to convert in {type(model).__name__} at {size_text(prepared.input_size)}: {seen}{more}"
