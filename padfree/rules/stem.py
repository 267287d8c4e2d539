"""Hybrid stem (the paper, Hybrid stem).

before: act(norm(conv(x)))  [maxpool(., 3, s, p1)]
after:  y = act(norm(conv(x)));  act(norm(conv1x1(cat(act(norm(dwconv(y, 3, s, p1))), maxpool(y, 3, s, p1)))))  [+ y]

1. the network reads its input (through whatever learns nothing: resizing, a data norm) by one conv, or by branches
   that act as one, or by a BSConv pair; its kernel is odd, at least 3, and overlaps its neighbours (kernel > stride:
   no patchify);
2. the network has an odd stride-2 conv or a 3x3 stride-2 max-pool: else there is nothing to convert;
3. a 3x3 p1 max-pool of stride s = 1 or 2 that reads the stem's output is absorbed, if no other pool or conv does;
   skip connections and the model's caller go on to get that output;
4. where the stem conv has neither norm nor activation and the network goes on with norm -> act in another block, or
   on a branch parallel to a residual of the conv's output, the tail takes the pre-activation form;
5. the tail has a place outside norms and convolutions, at the same path in a classifier and in a feature extractor made
   of the same layers: that of the absorbed max-pool; else the entry of the first module that alone reads the stem's
   output and has a forward of its own; else that of the stem's activation module; else the forward of a module other
   than the root in which the chain ends, which is re-forwarded; else the entry of a Sequential.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from padfree.analysis.chain import Chain
from padfree.analysis.convolution import Conv, Site
from padfree.analysis.kinds import AFFINE, AVG_POOLS, MAX_POOLS, NORMS, plain_kind
from padfree.analysis.sites import Sites
from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.layers.spec import FUNCTIONS, StemTailSpec
from padfree.layers.stem import StemTail
from padfree.record.recorder import Op
from padfree.rules._downsampling import block_for
from padfree.rules._stem_place import Placer, placed, placed_earlier, replaceable
from padfree.rules._toys import Joined, Methodical, Residual, depthwise, net, unit
from padfree.rules.base import Editor, Example, Rule, register
from padfree.types import NO_DOMAIN, Match, Options, Skip, StridedDetail

NAME = "stem"
Setting = bool | int | float | str | None  # of an activation


@dataclass(frozen=True)
class Stem(StridedDetail):
    """The stem's convolution, and the hybrid tail that follows it (`StemTail`).

    Attributes:
        channels: of the tail.
        stride: of the max-pool that it absorbs, else 1.
        norm, act: paths of the modules that its norms and activations are like.
        function: ATen name of an activation that is called as a function, with its `settings`.
        preact: the tail is norm -> act -> conv.
        norm_last: the norm reads (N, H, W, C).
        absorbs: a max-pool becomes part of the tail.
        value: the value that the tail reads, or for an absorbed pool the one that the pool makes.
        place: path of the module whose place the tail takes; None where it goes into the match's block.
        end, pool: there, the value that the absorbed pool reads, and the pool.
    """

    channels: int
    stride: int
    norm: str | None
    act: str | None
    function: str | None
    settings: tuple[Setting, ...]
    preact: bool
    norm_last: bool
    absorbs: bool
    value: ValueId
    place: str | None = None
    end: ValueId | None = None
    pool: OpId | None = None


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """The one stem, if the network has something to convert."""
    return _matches(sites, options, placed)


def alternatives(sites: Sites, options: Options) -> Iterator[Match]:
    """The same with the tail at its other places, for blocks whose forward cannot be rewritten."""
    first = list(match(sites, options))
    for place in itertools.count(1):
        items = list(_matches(sites, options, functools.partial(placed, place=place)))
        if items == first or not all(isinstance(item, Match) for item in items):
            return
        yield from (item for item in items if isinstance(item, Match))


def earlier(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """The same as plans of before had it: the tail in the activation's place, or inside a norm that carries one."""
    return _matches(sites, options, placed_earlier)


def _matches(sites: Sites, options: Options, placed: Placer) -> Iterator[Match | Skip]:
    if not sites.first:
        return
    conv = max(sites.first, key=lambda conv: (conv.spans[0], -conv.op))
    if any(isinstance(module, StemTail) for module in sites.recording.modules.values()):
        yield Skip(conv.path, "it has a hybrid tail already", NAME, in_scope=False)
        return
    site = sites.site(conv)
    outside = _out_of_scope(sites, conv, site)
    if outside:
        yield Skip(conv.path, outside, NAME, in_scope=False)
        return
    try:
        yield _match(sites, options, conv, site, placed)
    except Refusal as refusal:
        yield Skip(conv.path, str(refusal), NAME)


def _out_of_scope(sites: Sites, conv: Conv, site: Site) -> str:
    kernel, stride = conv.kernel, conv.stride
    one = {part.op for part in (*site.convs, *site.points, *site.paired)}
    apart = (part for part in sites.first if part.op not in one)
    others = [part for part in apart if not sites.flow.reaches(conv.source, part.out)[0]]  # it maps the channels
    if others and all(part.path == conv.path for part in others):
        return f"it reads the input {len(others) + 1} times, and a hybrid stem follows one call"
    if others:
        return f"{len(others) + 1} separate convs read the input (`{others[0].path}` too); a hybrid stem follows one"
    if kernel[0] % 2 == 0 or kernel[0] < 3 or kernel[0] <= stride[0]:
        if kernel[0] > stride[0]:
            return f"its kernel is {kernel[0]}x{kernel[1]}; an odd one of at least 3 is needed"
        return f"patchify stem: {kernel[0]}x{kernel[1]} stride {stride[0]}x{stride[1]} windows do not overlap"
    if not _has_padded_downsampling(sites):
        return "the network has no odd stride-2 convolution and no 3x3 stride-2 max-pool"
    return ""


def _has_padded_downsampling(sites: Sites) -> bool:
    for conv in sites.convs.values():
        if conv.stride == (2, 2) and conv.kernel[0] % 2 and conv.kernel[0] >= 3:
            return True
    pools = (op.args[0] for op in sites.flow.ops if op.kind in MAX_POOLS)
    return any(tuple(args[1]) == (3, 3) and len(args) > 2 and set(args[2]) == {2} for args in pools)


def _match(sites: Sites, options: Options, conv: Conv, site: Site, placed: Placer) -> Match:
    flow, recording = sites.flow, sites.recording
    if len(recording.calls_of.get(conv.path, ())) != 1 or not conv.is_module:
        raise Refusal("its module does not run exactly once in a forward")
    chain = site.chain
    following = _following(sites, chain.end()) if chain.norm is None and chain.act is None else None
    if following is not None and not _is_preact(sites, following):  # a skip connection reads the raw output too
        chain = following
    if chain.act_last:
        raise Refusal("its activation reads a map laid out (N, H, W, C), which a hybrid tail's would not")
    end = chain.end()
    pool = _absorbed(sites, end)
    stride = 1 if pool is None else _first(pool.args[0][2])
    value = end if pool is None else pool.outputs[0]
    norm, act, norm_last, preact = chain.norm_path, chain.act_path, chain.norm_last, False
    function = _function(sites, chain)
    if chain.norm is None and chain.act is None:
        following = _following(sites, value)
        if following is not None:
            preact = True
            norm, act, function = following.norm_path, following.act_path, _function(sites, following)
            norm_last = following.norm_last
    if norm and act.startswith(f"{norm}."):
        act = ""  # the norm's copy brings its activation along (timm's BatchNormAct2d)
    detail = Stem(
        conv.op,
        conv.out_channels,
        stride,
        norm or None,
        act or None,
        *function,
        preact=preact,
        norm_last=norm_last,
        absorbs=pool is not None,
        value=value,
    )
    block = ""
    if pool is not None:
        place = recording.calls[pool.call].path
        if replaceable(sites, place):
            detail = replace(detail, place=place)
        else:  # a function call, or a module that others use too
            detail = replace(detail, end=end, pool=pool.index)
            block = block_for(sites, conv.op, end, value, owner=conv.path, child=True).path
    else:
        # a norm or activation that was not seen may follow
        bare = chain.norm is None and chain.act is None and not preact
        block, taken = placed(sites, conv, chain, value, (conv.path,) if bare else ())
        detail = replace(detail, place=taken)
    size = flow.size(conv.source)
    return Match(NAME, conv.path, block, NO_DOMAIN, size, flow.size(value), flow.size(value), detail)


def _absorbed(sites: Sites, end: ValueId) -> Op | None:
    readers = [sites.flow.ops[index] for index in sites.flow.consumers(end)]
    entering = [op for op in readers if op.kind == "convolution" or op.kind in MAX_POOLS | AVG_POOLS]
    if len(entering) != 1 or entering[0].kind not in MAX_POOLS:
        return None
    (op,) = entering
    args = [*op.args[0], None, None, None, None][1:6]
    kernel, stride, padding, dilation, ceil = args
    plain = _both(dilation) in ((1, 1), ()) and not ceil
    fits = _both(kernel) == (3, 3) and _both(padding) == (1, 1) and _both(stride) in ((1, 1), (2, 2))
    return op if plain and fits else None


def _both(value: Any) -> tuple[int, ...]:
    return () if value is None else (value, value) if isinstance(value, int) else (value[0], value[-1]) if value else ()


def _first(value: Any) -> int:
    return int(_both(value)[0])


def _function(sites: Sites, chain: Chain) -> tuple[str | None, tuple[Setting, ...]]:
    """The ATen name and settings of an activation that is a function call, if there is a module for it."""
    if chain.act is None or chain.act_path:
        return None, ()
    if chain.formula:
        raise Refusal("its activation is a formula in a forward, without a module to copy")
    op = sites.flow.producer(chain.act)
    kind = "" if op is None else plain_kind(op)
    if kind not in FUNCTIONS:
        raise Refusal(f"its activation `{kind}` is a function without a module to copy")
    assert op is not None
    return kind, (*op.args[0][1:], *(value for _, value in op.args[1]))


def _following(sites: Sites, value: ValueId) -> Chain | None:
    """The norm -> act that some reader of a raw stem output begins with."""
    flow = sites.flow
    for index in flow.consumers(value):
        op = flow.ops[index]
        if op.kind not in NORMS:
            continue
        act, path = flow.activation(op.outputs[0])
        if act is not None:
            return Chain(value, op.outputs[0], act, sites.recording.calls[op.call].path, path)
    return None


def _is_preact(sites: Sites, following: Chain) -> bool:
    """Whether the norm behind a raw stem output is a block's own: of another module, or part of a residual branch."""
    flow, raw = sites.flow, following.conv
    readers = [flow.ops[index] for index in flow.consumers(raw)]
    norm = next(op for op in readers if op.kind in NORMS)
    residual = any(plain_kind(op) in AFFINE and len(op.inputs) > 1 for op in readers)
    return residual or flow.in_other_block(norm, raw)


def rewrite(match: Match, edit: Editor) -> None:
    """Put the tail in place."""
    detail = match.detail
    assert isinstance(detail, Stem)
    spec = StemTailSpec(
        match.name,
        detail.channels,
        detail.stride,
        detail.norm,
        detail.act,
        detail.function,
        detail.settings,
        absorbs=detail.absorbs,
        residual=edit.options.stem_residual,
        preact=detail.preact,
        norm_last=detail.norm_last,
    )
    if detail.place is not None:
        edit.replace_end(detail.place, spec)
    elif detail.end is not None and detail.pool is not None:
        edit.replace(match.block, detail.end, detail.pool, spec)
    else:
        edit.insert_after(match.block, detail.value, spec)


SIZE = (3, 32, 32)


def _preact() -> nn.Sequential:
    body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), unit(8, 8, stride=2))
    return net(Residual(body, unit(8, 8, 1, 2, act=False)), stem=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))


EXAMPLES = (
    Example(lambda: net(depthwise(8)), SIZE, ("0.0",)),
    Example(lambda: net(stem=nn.Sequential(unit(3, 8, 7, 2), nn.MaxPool2d(3, 2, padding=1))), SIZE, ("0.0.0",)),
    Example(lambda: net(depthwise(8), stem=unit(3, 8, stride=2)), SIZE, ("0.0",), Options(stem_residual=True)),
    Example(_preact, SIZE, ("0.0",)),
    Example(
        lambda: net(stem=Joined(unit(3, 8, 3, 2, act=False), unit(3, 8, 1, 2, act=False), out=8, total=True)),
        SIZE,
        ("0.branches.0.0",),
    ),
    Example(lambda: Methodical(8, nn.GroupNorm(2, 8)), SIZE, ("conv",)),
    Example(lambda: Methodical(8, nn.BatchNorm2d(8)), SIZE, ("conv",)),
    Example(lambda: Methodical(8, nn.Identity()), SIZE, ("conv",)),
    Example(lambda: Methodical(8, nn.Identity(), nn.BatchNorm2d(8), nn.ReLU()), SIZE, ("conv",)),
)
COUNTEREXAMPLES = (
    Example(lambda: net(depthwise(8), stem=unit(3, 8, 4, 4, padding=0)), SIZE, ("patchify stem",)),
    Example(lambda: net(unit(8, 8)), SIZE, ("no odd stride-2 convolution",)),
    Example(
        lambda: net(depthwise(16), stem=Joined(unit(3, 8), unit(3, 8), out=16), out=16),
        SIZE,
        ("2 separate convs read the input",),
    ),
)
RULE = register(
    Rule(NAME, match, rewrite, EXAMPLES, COUNTEREXAMPLES, details=(Stem,), alternatives=alternatives, earlier=earlier)
)
