"""The sizes that maps will have once groups of matches are converted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from padfree.analysis.kinds import strides
from padfree.analysis.sites import Sites
from padfree.geometry import padfree_size
from padfree.plan.groups import Group
from padfree.record.recorder import Op
from padfree.rules.base import Sizes
from padfree.types import NO_DOMAIN, Match


def sizes_after(sites: Sites, groups: Iterable[Group]) -> Sizes:
    """(H, W) by domain once `groups` are converted, followed from the input through convs and pools."""
    flow = sites.flow
    converted = {group.domain for group in groups}
    sizes: Sizes = {}
    for value in sites.recording.inputs:
        if flow.is_map(value):
            sizes[flow.domain(value)] = flow.size(value)
    for op in flow.ops:
        for out in op.outputs[:1]:
            if not flow.is_map(out) or flow.domain(out) in sizes:
                continue
            domain, size = flow.domain(out), flow.size(out)
            sizes[domain] = size
            if op.kind != "convolution" and not (op.kind.startswith(("max_pool2d", "avg_pool2d"))):
                continue
            before = sizes.get(flow.domain(sites.read_by(op)))
            if before is not None:
                sizes[domain] = _after(sites, op, before, size, domain in converted)
    return sizes


def _after(sites: Sites, op: Op, before: tuple[int, int], size: tuple[int, int], converted: bool) -> tuple[int, int]:
    if converted:
        return (padfree_size(before[0]), padfree_size(before[1]))
    stride = strides(op)[0]
    old = sites.flow.size(sites.read_by(op))
    shrunk = [new - was for new, was in zip(before, old, strict=True)]
    # an unconverted operation of stride s shrinks by what its input lost, in whole strides
    return (size[0] + -((-shrunk[0]) // stride), size[1] + -((-shrunk[1]) // stride))


def with_sizes(groups: list[Group], sizes: Sizes, sites: Sites) -> tuple[Match, ...]:
    """The groups' matches with the sizes they really read and write once all are converted."""
    matches: list[Match] = []
    for group in groups:
        for match in group.matches:
            if match.domain == NO_DOMAIN or not match.operations:  # it shrinks nothing, or does not say by what
                matches.append(match)
                continue
            op = sites.flow.ops[match.operations[0]]
            source = sizes.get(sites.flow.domain(sites.read_by(op)), match.size)
            matches.append(replace(match, out_after=(padfree_size(source[0]), padfree_size(source[1]))))
    return tuple(matches)
