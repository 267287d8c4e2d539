"""Projection shortcuts and pools that stand parallel to a strided conv (the paper, Projection shortcut).

before: norm(conv1x1(x, s2))                      depthwise (default): norm(conv1x1(norm'(dwconv(x, 3, s2, p0))))
                                                  dense: norm(conv1x1(maxpool(x, 3, s2, p0)) + conv(x, 3, s2, p0))
before: avgpool(x, 2, s2) or avgpool(x, 3, s2, p1)   after: avgpool(x, 3, s2, p0)
before: maxpool(x, 3, s2, p1) or maxpool(x, 2, s2)   after: maxpool(x, 3, s2, p0)

1. the 1x1 conv has stride 2x2 and lies on a residual branch that only adapts shape: nothing but linear
   operations from a fork to a sum with a branch that has an activation;
2. the pool's window is 2x2 or 3x3 with stride 2x2;
3. either enters a map that a depthwise or dense site enters too: alone they lose no border and stay.

A 1x1 without a norm of its own gets a new one after it, unless the network has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from padfree.analysis.convolution import Conv
from padfree.analysis.kinds import AVG_POOLS, MAX_POOLS, NORMS, data_input, pair
from padfree.analysis.sites import Sites
from padfree.errors import Refusal
from padfree.geometry import padfree_padding, padfree_size
from padfree.indices import DomainId, OpId, ValueId
from padfree.layers.spec import DenseReductionSpec, DepthwiseReductionSpec, NormSpec
from padfree.record.recorder import Op
from padfree.rules._downsampling import block_for, strided
from padfree.rules._toys import Residual, net, unit
from padfree.rules.base import Editor, Example, Rule, register
from padfree.types import Match, Options, Skip, StridedDetail

NAME = "projection"


@dataclass(frozen=True)
class Projection(StridedDetail):
    """A strided 1x1 conv.

    Attributes:
        source: the value it reads.
        dense: whether it becomes the dense form.
        norm: path of the norm that new norms are like; None where the network has none.
        own_norm: the value that a new norm reads; None where the conv has a norm of its own.
    """

    source: ValueId
    dense: bool
    norm: str | None
    own_norm: ValueId | None = None


@dataclass(frozen=True)
class Pool(StridedDetail):
    """A pool; `kept`: it has its padding-free form already, so that it stays."""

    kept: bool = False

    @property
    def unchanged(self) -> bool:
        """Whether nothing is done to it."""
        return self.kept


@dataclass(frozen=True)
class Blur(StridedDetail):
    """A conv with a fixed filter that reads `source`; `padding` is what is left of its padding, pixels a side."""

    source: ValueId
    padding: int


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """1x1 stride-2 convs on shortcuts, and pools, that enter a map some strided site enters."""
    flow = sites.flow
    shared: set[DomainId] = set()
    points: set[OpId] = set()
    for conv, site in strided(sites):
        if conv.padded:
            shared.add(flow.domain(conv.out))
            points.update(point.op for point in site.points)
    for conv in sites.convs.values():
        if conv.kernel == (1, 1) and conv.stride == (2, 2) and flow.domain(conv.out) not in shared and conv.is_module:
            why = "no padded strided conv enters the same map: alone it loses no border"
            yield Skip(conv.path, why, NAME, flow.domain(conv.out), in_scope=False)
        elif conv.fixed and max(conv.kernel) > 1 and max(conv.stride) > 1 and flow.domain(conv.out) not in shared:
            why = "a blur with a fixed filter, and no padded strided conv enters the same map"
            yield Skip(conv.path, why, NAME, flow.domain(conv.out), in_scope=False)
    for domain in sorted(shared):
        for op in flow.entries.get(domain, ()):
            if op.kind in MAX_POOLS | AVG_POOLS:
                found: Match | Skip | None = _pool(sites, op)
            elif op.index in points or op.index not in sites.convs:
                continue
            else:
                conv = sites.convs[op.index]
                if conv.fixed and conv.kernel != (1, 1):
                    yield _blur(sites, conv)
                    continue
                found = _projection(sites, options, conv) if conv.kernel == (1, 1) else None
            if found is not None:
                yield found


def _projection(sites: Sites, options: Options, conv: Conv) -> Match | Skip:
    flow = sites.flow
    domain = flow.domain(conv.out)
    why = ""
    if conv.stride != (2, 2):
        why = f"its stride is {conv.stride[0]}x{conv.stride[1]}, 2x2 is needed"
    elif not conv.is_module or len(sites.recording.calls_of[conv.path]) != 1:
        why = "it is not a convolution module that runs once"
    elif not sites.is_shortcut_op(flow.ops[conv.op]):
        why = "it is a 1x1 stride-2 conv on a branch that computes more than a shape"
    if why:
        return Skip(conv.path, why, NAME, domain)
    chain = flow.chain(conv.out)
    dense = options.projection == "dense"
    own_norm = chain.norm is not None
    detail = Projection(conv.op, conv.source, dense, _norm_near(sites, conv.op))
    try:
        if dense:
            block = block_for(sites, conv.op, conv.source, conv.out, owner=conv.path, child=True)
        elif own_norm:
            block = block_for(sites, conv.op, conv.source, owner=conv.path, child=True)
        else:
            block = block_for(sites, conv.op, conv.source, conv.out, owner=conv.path, child=True)
            detail = replace(detail, own_norm=conv.out)
    except Refusal as refusal:
        return Skip(conv.path, str(refusal), NAME, domain)
    return _match(sites, flow.ops[conv.op], conv.path, block.path, detail)


def _blur(sites: Sites, conv: Conv) -> Match | Skip:
    """A parallel conv whose filter is fixed (BlurPool): only its padding goes."""
    domain = sites.flow.domain(conv.out)
    if not conv.is_module:
        why = "its fixed filter is used in a function call, not by a module with the padding among its attributes"
        return Skip(conv.path, why, NAME, domain)
    if conv.stride != (2, 2) or conv.spans[0] != conv.spans[1] or conv.spans[0] % 2 == 0:
        return Skip(conv.path, "its fixed filter is not an odd square window of stride 2x2", NAME, domain)
    detail = Blur(conv.op, conv.source, padfree_padding(conv.spans[0]))
    return _match(sites, sites.flow.ops[conv.op], conv.path, conv.path, detail)


def _pool(sites: Sites, op: Op) -> Match | Skip:
    flow, recording = sites.flow, sites.recording
    path = recording.calls[op.call].path
    window = op.args[0][1]
    kernel, stride = pair(window), pair((op.args[0][2] if len(op.args[0]) > 2 else ()) or window)
    dilation = pair(op.args[0][4]) if op.kind in MAX_POOLS and len(op.args[0]) > 4 else (1, 1)
    domain = flow.domain(op.outputs[0])
    padding = pair(op.args[0][3]) if len(op.args[0]) > 3 else (0, 0)
    if stride == (2, 2) and kernel == (3, 3) and padding == (0, 0) and not _same_pad(sites, op):
        return _match(sites, op, path, path, Pool(op.index, kept=True))
    if stride != (2, 2) or kernel not in ((2, 2), (3, 3)) or dilation != (1, 1):
        size = f"{kernel[0]}x{kernel[1]} stride {stride[0]}x{stride[1]}"
        return Skip(
            path,
            f"its {size} pool has no padding-free form; a 2x2 or 3x3 window of stride 2x2 has",
            NAME,
            domain,
        )
    why = ""
    if len(recording.calls_of[path]) != 1:
        why = "its module is called more than once in one forward"
    elif any(flow.consumers(other) or other in recording.outputs for other in op.outputs[1:]):
        why = "its indices are used, and they would be of another map"
    return Skip(path, why, NAME, domain) if why else _match(sites, op, path, path, Pool(op.index))


def _same_pad(sites: Sites, op: Op) -> bool:
    before = sites.flow.producer(data_input(op))
    return before is not None and before.kind == "constant_pad_nd"


def _match(sites: Sites, op: Op, name: str, block: str, detail: Projection | Pool | Blur) -> Match:
    flow = sites.flow
    source = data_input(op)
    if _same_pad(sites, op):
        before = flow.producer(source)
        source = source if before is None else before.inputs[0]
    height, width = flow.size(source)
    after = (padfree_size(height), padfree_size(width))
    out = op.outputs[0]
    return Match(
        NAME,
        name,
        block,
        flow.domain(out),
        (height, width),
        flow.size(out),
        after,
        detail,
    )


def _norm_near(sites: Sites, op: OpId) -> str | None:
    """Path of the norm to copy: the nearest one after the operation, else before it, else None."""
    ops = sites.flow.ops
    for other in [*range(op + 1, len(ops)), *range(op - 1, -1, -1)]:
        if ops[other].kind in NORMS and sites.flow.is_map(ops[other].outputs[0]):
            return sites.flow.norm_module(ops[other]) or None
    return None


def rewrite(match: Match, edit: Editor) -> None:
    """Carry out one projection or pool."""
    detail = match.detail
    if isinstance(detail, Pool):
        if not detail.kept:
            edit.pool(detail.op)
        return
    assert isinstance(detail, (Projection, Blur))
    conv, source = edit.sites.convs[detail.op], detail.source
    if isinstance(detail, Blur):
        edit.conv(conv, detail.padding)
        return
    if detail.dense:
        spec = DenseReductionSpec(conv.path, conv.in_channels, conv.out_channels)
        edit.add_parallel(match.block, source, conv.op, conv.out, spec)
        edit.pool_input(match.block, source, conv.op)
    else:
        reduction = DepthwiseReductionSpec(conv.path, conv.in_channels, detail.norm)
        edit.insert_before(match.block, source, conv.op, reduction)
        if detail.own_norm is not None and detail.norm is not None:
            norm = NormSpec(conv.path, conv.out_channels, detail.norm)
            edit.insert_after(match.block, detail.own_norm, norm)
    edit.conv(conv, 0, stride=1)


SIZE = (3, 32, 32)


def _parallel(*shortcut: nn.Module, out: int = 8) -> nn.Sequential:
    return net(Residual(unit(8, out, stride=2), nn.Sequential(*shortcut)), out=out)


EXAMPLES = (
    Example(lambda: _parallel(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16), out=16), SIZE, ("1.shortcut.0",)),
    Example(lambda: _parallel(nn.Conv2d(8, 8, 1, 2)), SIZE, ("1.shortcut.0",)),
    Example(lambda: _parallel(nn.Conv2d(8, 8, 1, 2)), SIZE, ("1.shortcut.0",), Options(projection="dense")),
    Example(lambda: _parallel(nn.AvgPool2d(2, 2), nn.Conv2d(8, 8, 1)), SIZE, ("1.shortcut.0",)),
    Example(lambda: _parallel(nn.AvgPool2d(3, 2, padding=1)), SIZE, ("1.shortcut.0",)),
    Example(lambda: _parallel(nn.MaxPool2d(3, 2, padding=1)), SIZE, ("1.shortcut.0",)),
)
COUNTEREXAMPLES = (
    Example(lambda: _parallel(nn.Conv2d(8, 8, 1, 2), nn.ReLU()), SIZE, ("computes more than a shape",)),
    Example(lambda: _parallel(nn.AvgPool2d(4, 2, padding=1)), SIZE, ("4x4 stride 2x2",)),
)
RULE = register(Rule(NAME, match, rewrite, EXAMPLES, COUNTEREXAMPLES, details=(Projection, Pool, Blur)))
