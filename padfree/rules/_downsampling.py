"""What the downsampling rules share: which convolutions they look at, where a shortcut can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from padfree.analysis.convolution import Conv, Site
from padfree.analysis.sites import Sites
from padfree.errors import Refusal
from padfree.geometry import padfree_padding, padfree_size
from padfree.indices import OpId, ValueId
from padfree.layers.stem import StemTail
from padfree.record.recording import Call
from padfree.rules.base import Editor, Shortcut
from padfree.types import NEW, Match, Options, Skip, StridedDetail


@dataclass(frozen=True)
class Downsampling(StridedDetail):
    """One strided convolution of a site.

    Attributes:
        kernel: its kernel, pixels a side.
        padding: what is left of its padding, pixels a side.
        largest: path of the site's largest conv, whose match has all that follows; None for that conv itself.
        channels: of the map that the site reads, and of the one it writes.
        points: 1x1 convs summed with it, whose input loses its border.
        points_block: path of the module whose forward calls them.
        shortcut: the max-pool that is added; None on a residual branch that only adapts shape.
        unfuse: path of an activation inside a norm that the shortcut is added in front of.
    """

    kernel: int
    padding: int
    largest: str | None = None
    channels: tuple[int, int] | None = None
    points: tuple[OpId, ...] = ()
    points_block: str | None = None
    shortcut: Shortcut | None = None
    unfuse: str | None = None

    @property
    def operations(self) -> tuple[OpId, ...]:
        """The conv and the 1x1 convs that shrink with it."""
        return (self.op, *self.points)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def strided(sites: Sites) -> Iterator[tuple[Conv, Site]]:
    """Strided convolutions with a kernel of at least 3 that are not the network's first, and what they act as."""
    first = {conv.op for conv in sites.first}
    for conv in sites.convs.values():
        if max(conv.stride) < 2 or max(conv.kernel) < 3 or conv.fixed or added(sites, conv.path):
            continue
        if conv.op not in first and sites.flow.is_map(conv.source):
            yield conv, sites.site(conv)


def added(sites: Sites, path: str) -> bool:
    """Whether a conversion put this module in; no rule may match such layers again."""
    parts = path.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    modules = sites.recording.modules
    return any(part.startswith(NEW) for part in parts) or any(isinstance(modules[name], StemTail) for name in above)


def out_of_scope(sites: Sites, conv: Conv) -> str:
    """Why the method has nothing to say on a strided convolution, or ""."""
    if sites.flow.feeds_only_attention(conv.out):
        return "it only subsamples the keys and values of an attention"
    return conv.out_of_scope()


def trouble(sites: Sites, conv: Conv) -> str:
    """Why a strided convolution cannot be rewritten, or ""."""
    found = conv.trouble()
    inner = sites.recording.modules[conv.path].children() if not conv.is_module else ()
    if any(isinstance(child, torch.jit.ScriptModule) for child in inner):
        return "it lies in a TorchScript module, or beside one; convert the Python model, then script it"
    if found:
        return found
    calls = len(sites.recording.calls_of.get(conv.path, ()))
    if calls != 1:
        return f"its module is called {calls} times in one forward"
    if min(sites.flow.size(conv.source)) < 3:
        return f"its input of {sites.flow.size(conv.source)} pixels is smaller than the 3x3 window"
    return ""


def block_for(sites: Sites, op: OpId, *values: ValueId, owner: str, child: bool = False) -> Call:
    """The smallest module whose own forward holds all values; with `child`, a block that can take a new child.

    A module that runs the network's first convolution is no block: a network inside another, or its stem. Then a
    container takes the child, as it does below the root, and who reads the container's output reads the sum.

    Raises:
        Refusal: there is none, or it runs more than once in a forward.
    """
    around = [call for call in sites.flow.blocks(op, *values) if call.path != owner]
    inner = [call for call in around if call.path]
    if child:
        modules, first = sites.recording.modules, {conv.op for conv in sites.first}
        blocks = (call for call in inner if first.isdisjoint(call.ops))
        inner = [call for call in blocks if not isinstance(modules[call.path], _CONTAINERS)] or inner
    if not around:
        raise Refusal("no module's own forward holds both its input and the end of its chain")
    call = (inner or around)[0]
    count = len(sites.recording.calls_of[call.path])
    if count != 1:
        raise Refusal(f"its block `{call.path}` is called {count} times in one forward")
    return call


def new_match(sites: Sites, rule: str, conv: Conv, block: str, detail: Downsampling) -> Match:
    """A match of a strided convolution, with the sizes before and after."""
    flow = sites.flow
    height, width = flow.size(conv.source)
    return Match(
        rule=rule,
        name=conv.path,
        block=block,
        domain=flow.domain(conv.out),
        size=(height, width),
        out_before=flow.size(conv.out),
        out_after=(padfree_size(height), padfree_size(width)),
        detail=detail,
    )


def site_matches(sites: Sites, options: Options, rule: str, conv: Conv, site: Site) -> Match | Skip:
    """A match for one conv of a site: its largest carries the pool shortcut, the others only shrink."""
    outside = out_of_scope(sites, conv)
    if outside:
        return Skip(conv.path, outside, rule, sites.flow.domain(conv.out), in_scope=False)
    parts = ((part, out_of_scope(sites, part) or trouble(sites, part)) for part in site.convs)
    found = next((f"`{part.path}`: {why}" for part, why in parts if why), "")
    why = trouble(sites, conv) or found
    if why:
        return Skip(conv.path, why, rule, sites.flow.domain(conv.out))
    alone = Downsampling(conv.op, conv.kernel[0], padfree_padding(conv.spans[0]))
    if conv != site.largest:
        return new_match(sites, rule, conv, "", replace(alone, largest=site.largest.path))
    channels = (
        sites.recording.values[site.source].shape[1],
        sites.recording.values[site.chain.conv].shape[1],
    )
    detail = replace(alone, channels=channels, points=tuple(point.op for point in site.points))
    block = ""
    try:
        if not site.shortcut:
            block, shortcut, unfuse = _shortcut(sites, options, site, channels)
            detail = replace(detail, shortcut=shortcut, unfuse=unfuse)
        if site.points:
            around = block_for(sites, site.points[0].op, site.points[0].source, owner=site.points[0].path)
            detail = replace(detail, points_block=around.path)
    except Refusal as refusal:
        return Skip(conv.path, str(refusal), rule, sites.flow.domain(conv.out))
    return new_match(sites, rule, conv, block, detail)


def _shortcut(
    sites: Sites, options: Options, site: Site, channels: tuple[int, int]
) -> tuple[str, Shortcut, str | None]:
    """The block that takes a site's shortcut, the shortcut, and the activation that leaves its norm for it.

    Raises:
        Refusal: no module holds the source and any part of the chain.
    """
    project = site.dense and channels[0] != channels[1]
    merge, unfuse = site.chain.end(options.merge), None
    if merge == site.chain.norm and site.chain.act is not None and _fused(sites, site):
        merge, unfuse = site.chain.act, site.chain.act_path
    block, merge = _block_and_merge(sites, site, merge, project)
    parts = [part.op for part in (*site.paired, *site.convs, *site.points)]
    anchor = min(parts + [part.pad for part in site.convs if part.pad >= 0])
    span = site.largest.spans[0]
    window = (span, padfree_padding(span)) if options.pool == "kernel" else (3, 0)
    repeat = 1 if site.dense else channels[1] // channels[0]
    return block.path, Shortcut(site.source, anchor, merge, *window, repeat, project), unfuse


def _block_and_merge(sites: Sites, site: Site, merge: ValueId, child: bool) -> tuple[Call, ValueId]:
    """The block that holds the site's source and `merge`; or, where none does, an earlier part of the chain.

    A norm or activation that only another module's forward sees together with the source is that module's:
    the chain ends before it (a pre-activation conv inside a module of its own).

    Raises:
        Refusal: no module holds the source and any part of the chain.
    """
    largest, chain = site.largest, site.chain
    parts = [value for value in (chain.conv, chain.norm, chain.act) if value is not None and value <= merge]
    refusal = Refusal("")
    for value in reversed(parts):
        try:
            return block_for(sites, largest.op, site.source, value, owner=largest.path, child=child), value
        except Refusal as error:
            refusal = refusal if str(refusal) else error
    raise refusal


def _fused(sites: Sites, site: Site) -> bool:
    """Whether the chain's activation is a parameter-free part of its norm (timm's BatchNormAct2d)."""
    chain, recording = site.chain, sites.recording
    if not chain.norm_path or not chain.act_path.startswith(f"{chain.norm_path}."):
        return False
    return len(recording.calls_of[chain.act_path]) == 1 and not recording.modules[chain.act_path].state_dict()


def rewrite_site(match: Match, edit: Editor) -> None:
    """Reduce the padding, add the shortcut where the match carries one, crop for summed 1x1 convs."""
    detail = match.detail
    assert isinstance(detail, Downsampling)
    if detail.shortcut is not None:
        edit.shortcut(match.block, detail.shortcut)
        if detail.unfuse is not None:
            edit.unfuse(match.block, detail.shortcut.merge, detail.unfuse)
    if detail.points_block is not None:
        for op in detail.points:
            edit.crop(detail.points_block, edit.sites.convs[op].source, op, 1)
    edit.conv(edit.sites.convs[detail.op], detail.padding)
