"""What a rule is, and the table of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from padfree.analysis.convolution import Conv
from padfree.analysis.sites import Sites
from padfree.errors import PadfreeError
from padfree.indices import DomainId, OpId, ValueId
from padfree.layers.spec import Spec, StemTailSpec
from padfree.types import Detail, Match, Options, Skip

Matcher = Callable[[Sites, Options], Iterable[Match | Skip]]


@dataclass(frozen=True)
class Shortcut:
    """A max-pool of stride 2 parallel to a strided chain: merge + repeat(maxpool(source)).

    Attributes:
        source: the value pooled.
        anchor: the operation just before which it is pooled: the first of the chain that reads `source`.
        merge: the value that the pooled map is added to.
        kernel, padding: of the pool, pixels.
        repeat: how often each pooled channel comes (a depthwise conv's channel multiplier).
        project: a 1x1 conv maps the pooled channels to those of `merge`.
    """

    source: ValueId
    anchor: OpId
    merge: ValueId
    kernel: int = 3
    padding: int = 0
    repeat: int = 1
    project: bool = False


class Editor(Protocol):
    """What `Rule.rewrite` may do to a network; everything else is out of its reach.

    Values and operations are indices of the recording, blocks are paths of modules whose own forward holds them.
    Each method raises `Refusal` where the block's forward cannot be traced, or does not hold what is to be edited.
    """

    sites: Sites
    options: Options

    def conv(self, conv: Conv, padding: int, stride: int | None = None) -> None:
        """Give a convolution another padding (and stride); a pad operation before it goes."""

    def pool(self, op: OpId) -> None:
        """Turn a parallel pool into its 3x3 stride-2 form without padding."""

    def shortcut(self, block: str, shortcut: Shortcut) -> None:
        """Add a max-pool shortcut to a strided chain."""

    def unfuse(self, block: str, value: ValueId, path: str) -> None:
        """Let `block` call a norm's own activation `path` itself, after what is now added to `value`."""

    def crop(self, block: str, source: ValueId, op: OpId, margin: int) -> None:
        """Let operation `op` read `source` without its outermost `margin` pixels."""

    def insert_before(self, block: str, source: ValueId, op: OpId, spec: Spec) -> None:
        """Let operation `op` read a new layer's output on `source`."""

    def insert_after(self, block: str, value: ValueId, spec: Spec) -> None:
        """Put a new layer after `value`."""

    def replace(self, block: str, source: ValueId, op: OpId, spec: Spec) -> None:
        """Put a new layer on `source` in the place of operation `op`, which goes."""

    def add_parallel(self, block: str, source: ValueId, anchor: OpId, merge: ValueId, spec: Spec) -> None:
        """Add a new layer's output on `source`, run just before operation `anchor`, to `merge`."""

    def pool_input(self, block: str, source: ValueId, op: OpId) -> None:
        """Let operation `op` read max-pool(source), 3x3 stride 2 without padding."""

    def replace_end(self, path: str, spec: StemTailSpec) -> None:
        """Put a new layer in the place of a parameter-free module, which becomes its part."""

    def substitute(self, path: str, spec: Spec) -> None:
        """Put a new layer in the place of a module, under all its names; it takes over that module's hooks."""

    def resize(self, path: str, shape: tuple[int, ...]) -> None:
        """Give a parameter another shape by linear interpolation along the sides that differ."""

    def assign(self, path: str, **attributes: Any) -> None:
        """Set plain attributes of a module."""


Sizes = dict[DomainId, tuple[int, int]]
"""(H, W) by domain, as they will be after a conversion."""


@dataclass(frozen=True)
class Example:
    """A toy network a rule is tried on, and what must come of it.

    Attributes:
        build: makes the network. input_size: (C, H, W). expect: match names, or for a counterexample
            words of the reason. options: options to plan with.
    """

    build: Callable[[], nn.Module]
    input_size: tuple[int, ...]
    expect: tuple[str, ...]
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: what `rules=` and plans call it.
        match: finds places in a recording; yields a `Match` or a `Skip` for each.
        rewrite: carries one match out through the editor.
        follow: for layers whose own size must follow their map: given the sizes after the planned
            conversion, yields further matches (the paper, ParC-MobileNetV2).
        default: whether `convert` uses it when no rules are named.
        details: the classes of its matches' details; without any they are mappings.
        alternatives: the same matches carried out in other modules, in order of preference, for those whose block
            cannot be given another forward.
        earlier: finds places as versions before this one did, whose plans are carried out as they say.
        planned: finds the places of a plan again, for rules whose settings only the details of its matches say.
    """

    name: str
    match: Matcher
    rewrite: Callable[[Match, Editor], None]
    examples: tuple[Example, ...] = ()
    counterexamples: tuple[Example, ...] = ()
    follow: Callable[[Sites, Options, Sizes], Iterable[Match]] | None = None
    default: bool = True
    details: tuple[type[Detail], ...] = ()
    alternatives: Callable[[Sites, Options], Iterable[Match]] | None = None
    earlier: Matcher | None = None
    planned: Callable[[Sites, Options, Iterable[Match]], Iterable[Match | Skip]] | None = None


_RULES: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule to the table; a rule of the same name is replaced.

    Raises:
        PadfreeError: it is not a `Rule` or has no name, or a class of its details is no dataclass of `Detail`.
    """
    if not isinstance(rule, Rule) or not rule.name.isidentifier():
        raise PadfreeError(f"register takes a padfree.Rule with a name that is an identifier, not {rule!r}")
    for kind in rule.details:
        if not (isinstance(kind, type) and issubclass(kind, Detail) and dataclasses.is_dataclass(kind)):
            raise PadfreeError(
                f"rule {rule.name!r} has the detail {kind!r}; it takes frozen dataclasses of padfree.types.Detail"
            )
    _RULES[rule.name] = rule
    return rule


def registered() -> Mapping[str, Rule]:
    """All rules by name."""
    return _RULES


def rules(names: Iterable[str] | None = None) -> tuple[Rule, ...]:
    """The rules of these names, or the default ones.

    Raises:
        PadfreeError: a name is unknown, or none is given.
    """
    if names is None:
        return tuple(rule for rule in _RULES.values() if rule.default)
    wanted: tuple[Any, ...] = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    unknown = [name for name in wanted if not isinstance(name, str) or name not in _RULES]
    if unknown or not wanted:
        raise PadfreeError(
            f"unknown rule {', '.join(map(repr, unknown)) or '(none given)'}; there are {', '.join(_RULES)}"
        )
    return tuple(_RULES[name] for name in dict.fromkeys(wanted))
