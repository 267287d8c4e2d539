"""The sizes that maps will have once groups of matches are converted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from padfree.analysis.flow import Flow
from padfree.analysis.kinds import AVG_POOLS, MAX_POOLS, data_input, pair
from padfree.analysis.sites import Sites
from padfree.geometry import out_size, padfree_size
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
            if op.kind != "convolution" and op.kind not in MAX_POOLS | AVG_POOLS:
                continue
            before = sizes.get(flow.domain(sites.read_by(op)))
            if before is not None:
                sizes[domain] = _after(sites, op, before, domain in converted)
    return sizes


class _Window(NamedTuple):
    """What a convolution or pool reads for each pixel that it writes, by axis, pixels."""

    kernel: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @staticmethod
    def of(flow: Flow, op: Op) -> _Window:
        """From an operation's arguments, where those at the end that are torch's defaults are missing."""
        settings = op.args[0]
        if op.kind == "convolution":
            stride, padding, dilation = map(pair, settings[3:6])
            return _Window(flow.values[settings[1].value].shape[2:], stride, padding, dilation)
        kernel = pair(settings[1])
        stride = pair(settings[2]) if len(settings) > 2 and settings[2] else kernel
        padding = pair(settings[3]) if len(settings) > 3 else (0, 0)
        dilated = op.kind in MAX_POOLS
        dilation = pair(settings[4]) if dilated and len(settings) > 4 else (1, 1)
        return _Window(kernel, stride, padding, dilation, any(settings[5 if dilated else 4 :][:1]))


def _after(sites: Sites, op: Op, before: tuple[int, int], converted: bool) -> tuple[int, int]:
    """(H, W) that a conv or pool writes once the map that it reads (before any pad) is (H, W) = `before`."""
    if converted:
        return (padfree_size(before[0]), padfree_size(before[1]))
    flow, window = sites.flow, _Window.of(sites.flow, op)
    was, padded, out = flow.size(sites.read_by(op)), flow.size(data_input(op)), flow.size(op.outputs[0])

    def side(axis: int) -> int:
        if op.kind == "convolution" and op.args[0][6]:  # transposed
            return out[axis] + (before[axis] - was[axis]) * window.stride[axis]
        kernel, stride, padding, dilation = (part[axis] for part in window[:4])
        read = before[axis] + padded[axis] - was[axis]
        return out_size(read, kernel, stride, padding, dilation, window.ceil_mode)

    return (side(0), side(1))


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
