"""From a recording to matches grouped by domain: what could be converted, and what cannot and why."""

from __future__ import annotations

from dataclasses import dataclass

from padfree.analysis.kinds import data_input, strides
from padfree.analysis.sites import Sites
from padfree.geometry import padfree_size
from padfree.plan.patterns import Patterns, chosen
from padfree.record.recorder import Op
from padfree.rules.base import Rule
from padfree.types import Match, Options, Skip


@dataclass(frozen=True)
class Group:
    """Matches that are converted together or not at all: those of one domain, or the stem."""

    domain: int
    matches: tuple[Match, ...]

    @property
    def name(self) -> str:
        """The first match's module."""
        return self.matches[0].name


def find(
    sites: Sites,
    all_rules: tuple[Rule, ...],
    selected: tuple[Rule, ...],
    options: Options,
    include: Patterns,
    exclude: Patterns,
) -> tuple[list[Group], list[Skip]]:
    """Matches of the selected rules by domain, and the places left alone.

    Rules that are not selected are asked too: what they would match in a domain stops that domain.

    Raises:
        PadfreeError: an `include` or `exclude` pattern matches nothing.
    """
    found: list[Match] = []
    skips: list[Skip] = []
    for rule in all_rules:
        for item in rule.match(sites, options):
            if isinstance(item, Match):
                found.append(item)
            elif rule in selected:
                skips.append(item)
    names = [*(m.name for m in found), *(s.name for s in skips)]
    wanted = chosen(names, include, "include") if include is not None else set(names)
    wanted -= chosen(names, exclude, "exclude") if exclude is not None else set()
    in_use = {rule.name for rule in selected}
    groups: list[Group] = []
    for domain in sorted({match.domain for match in found}):
        together = [match for match in found if match.domain == domain]
        for group, why in _whole(sites, domain, together, skips, in_use, wanted):
            if why:
                skips += [Skip(match.name, why, match.rule, domain) for match in group if match.rule in in_use]
            else:
                groups.append(Group(domain, tuple(group)))
    return groups, skips


def _whole(
    sites: Sites, domain: int, together: list[Match], skips: list[Skip], in_use: set[str], wanted: set[str]
) -> list[tuple[list[Match], str]]:
    """The domain's matches with "" if it can be converted whole, or with the reason it cannot."""
    if domain < 0:
        parts = [[match] for match in together]
        return [
            (part, "" if part[0].name in wanted and part[0].rule in in_use else _left(part[0], in_use))
            for part in parts
        ]
    kept = [match for match in together if not match.detail.get("kept")]
    if not any(match.rule != "projection" for match in kept):
        mains = [skip for skip in skips if skip.domain == domain]
        why = f"`{mains[0].name}`: {mains[0].reason}" if mains else "no strided conv with it is converted"
        return [(kept, why)]
    for match in kept:
        if match.rule not in in_use or match.name not in wanted:
            return [(kept, f"`{match.name}` enters the same map and {_left(match, in_use)}")]
    covered = {match.detail.get("op") for match in together}
    covered.update(op for match in together for op in match.detail.get("points", ()))
    for op in sites.flow.entries.get(domain, ()):
        if op.index not in covered and not _shrinks_alike(sites, op):
            path, why = _entry_reason(sites, op, skips)
            return [(kept, f"`{path}` enters the same map and has no padding-free form: {why}")]
    if domain in sites.flow.pinned:
        return [(kept, _pinned_reason(sites, domain))]
    return [(kept, "")]


def _pinned_reason(sites: Sites, domain: int) -> str:
    op = sites.flow.pinned[domain]
    path = sites.recording.calls[op.call].path if op.call >= 0 else ""
    where = f"`{path}`" if path else "the model's own forward"
    sizes = " and ".join("x".join(map(str, sites.flow.size(value))) for value in op.inputs if sites.flow.is_map(value))
    return f"in {where} {op.kind} reads maps of {sizes}, and nothing says how their sizes must fit"


def _left(match: Match, in_use: set[str]) -> str:
    if match.rule not in in_use:
        return f"needs rule {match.rule!r}, which is not selected"
    return "is not among the included modules, or is excluded"


def _shrinks_alike(sites: Sites, op: Op) -> bool:
    """Whether an operation writes the padding-free size as it stands, or does not halve its map."""
    flow = sites.flow
    source, out = flow.size(data_input(op)), flow.size(op.outputs[0])
    if out == tuple(padfree_size(side) for side in source):
        conv = sites.convs.get(op.index)
        return conv is None or not conv.padded
    return max(strides(op)) == 1 or out[0] > source[0]


def _entry_reason(sites: Sites, op: Op, skips: list[Skip]) -> tuple[str, str]:
    path = sites.recording.calls[op.call].path if op.call >= 0 else ""
    for skip in skips:
        if skip.name == path:
            return path, skip.reason
    flow = sites.flow
    source, out = flow.size(data_input(op)), flow.size(op.outputs[0])
    conv = sites.convs.get(op.index)
    what = (
        op.kind
        if conv is None
        else f"a {conv.kernel[0]}x{conv.kernel[1]} conv of stride {conv.stride[0]}x{conv.stride[1]}"
    )
    return path, f"{what} maps {source[0]}x{source[1]} to {out[0]}x{out[1]}"
