"""From a recording to matches grouped by domain: what could be converted, and what cannot and why."""

from __future__ import annotations

from dataclasses import dataclass

from padfree.analysis.kinds import data_input, strides
from padfree.analysis.sites import Sites
from padfree.geometry import padfree_size, size_text
from padfree.indices import DomainId
from padfree.plan.patterns import Exactly, Key, Named
from padfree.record.recorder import Op
from padfree.rules.base import Rule
from padfree.rules.base import rules as default_rules
from padfree.types import NO_DOMAIN, Detail, Match, Options, Skip


@dataclass(frozen=True)
class Group:
    """Matches that are converted together or not at all: those of one domain, or the stem."""

    domain: DomainId
    matches: tuple[Match, ...]

    @property
    def name(self) -> str:
        """The first match's module."""
        return self.matches[0].name


def find(
    sites: Sites,
    selected: tuple[Rule, ...],
    options: Options,
    places: Named | Exactly,
) -> tuple[list[Group], list[Skip]]:
    """Matches of the selected rules by domain, and the places left alone.

    The default rules are asked even if they are not selected: what they would match in a domain stops that domain.

    Raises:
        PadfreeError: a pattern means no place that was found.
    """
    found: list[Match] = []
    skips: list[Skip] = []
    for rule in dict.fromkeys((*selected, *default_rules())):
        if rule.planned is not None and isinstance(places, Exactly):
            items = list(rule.planned(sites, options, [match for match in places.matches if match.rule == rule.name]))
        else:
            items = list(rule.match(sites, options))
        matches = [item for item in items if isinstance(item, Match)]
        if rule.earlier is not None and isinstance(places, Exactly):
            matches = places.as_planned(matches, rule.earlier(sites, options))
        found += matches
        skips += [item for item in items if isinstance(item, Skip) and rule in selected]
    wanted = places.wanted(found, skips)
    in_use = {rule.name for rule in selected}
    left = {
        match.key: places.unwanted if match.rule in in_use else f"needs rule {match.rule!r}, which is not selected"
        for match in found
        if match.rule not in in_use or match.key not in wanted
    }
    groups: list[Group] = []
    for domain in sorted({match.domain for match in found}):
        together = [match for match in found if match.domain == domain]
        for group, why in _whole(sites, domain, together, skips, left):
            if why:
                skips += [Skip(match.name, why, match.rule, domain) for match in group if match.rule in in_use]
            else:
                groups.append(Group(domain, tuple(group)))
    return groups, skips


def _whole(
    sites: Sites, domain: DomainId, together: list[Match], skips: list[Skip], left: dict[Key, str]
) -> list[tuple[list[Match], str]]:
    """The domain's matches with "" if it can be converted whole, or with the reason it cannot.

    `left` says of matches that are not wanted why.
    """
    if domain == NO_DOMAIN:
        return [([match], left.get(match.key, "")) for match in together]
    kept = [match for match in together if not (isinstance(match.detail, Detail) and match.detail.unchanged)]
    if not any(match.rule != "projection" for match in kept):
        mains = [skip for skip in skips if skip.domain == domain]
        why = f"`{mains[0].name}`: {mains[0].reason}" if mains else "no strided conv with it is converted"
        return [(kept, why)]
    for match in kept:
        if match.key in left:
            return [(kept, f"`{match.name}` enters the same map and {left[match.key]}")]
    covered = {op for match in together for op in match.operations}
    for op in sites.flow.entries.get(domain, ()):
        if op.index not in covered and not _shrinks_alike(sites, op):
            path, why = _entry_reason(sites, op, skips)
            return [(kept, f"`{path}` enters the same map and has no padding-free form: {why}")]
    if domain in sites.flow.pinned:
        return [(kept, _pinned_reason(sites, domain))]
    return [(kept, "")]


def _pinned_reason(sites: Sites, domain: DomainId) -> str:
    op = sites.flow.pinned[domain]
    path = sites.recording.calls[op.call].path if op.call >= 0 else ""
    where = f"`{path}`" if path else "the model's own forward"
    sizes = " and ".join(size_text(sites.flow.size(value)) for value in op.inputs if sites.flow.is_map(value))
    return f"in {where} {op.kind} reads maps of {sizes}, and nothing says how their sizes must fit"


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
