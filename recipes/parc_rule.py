"""ParC operators follow their map (the paper, ParC-MobileNetV2).

before: ParC on an m x m map: kernel (m, 1) or (1, m), position embedding of m lines
after:  ParC on the m' x m' map that the conversion leaves: kernel and embedding of m' lines

1. the module is a `padfree.recipes.parc.ParC`;
2. the conversion changes the side of its map.

It rewrites nothing by itself: it follows the other rules. Values of the shorter kernel and embedding
are interpolated linearly from the longer ones, so what was learnt keeps its place relative to the map.
This is the extension point at work: a rule registered from outside of the core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from padfree import Example, Match, Options, Rule, Skip, register
from padfree.types import Detail

from .parc import ParC, ParCPair

if TYPE_CHECKING:
    from padfree.analysis.sites import Sites
    from padfree.rules.base import Editor, Sizes

NAME = "parc"


@dataclass(frozen=True)
class Resize(Detail):
    """A ParC operator of `channels` channels: the (height, width) of its new kernel, and if it has an embedding."""

    channels: int
    span: tuple[int, int]
    position: bool


def match(sites: Sites, options: Options) -> Iterable[Match | Skip]:
    """No place is rewritten for its own sake."""
    return ()


def follow(sites: Sites, options: Options, sizes: Sizes) -> Iterator[Match]:
    """Every ParC operator whose map has another side after the planned conversion."""
    flow = sites.flow
    for path, module in sites.recording.modules.items():
        if not isinstance(module, ParC):
            continue
        (source,) = sites.recording.calls_of[path][0].inputs
        domain, before = flow.domain(source), flow.size(source)
        after = sizes.get(domain, before)
        side = after[module.dim - 2]
        if side != module.side:
            detail = Resize(module.conv.in_channels, module.span(side), module.position is not None)
            yield Match(NAME, path, "", domain, before, before, after, detail)


def rewrite(match: Match, editor: Editor) -> None:
    """Resize kernel and embedding to the new map."""
    detail = match.detail
    assert isinstance(detail, Resize)
    channels, span = detail.channels, detail.span
    editor.resize(f"{match.name}.conv.weight", (channels, 1, *span))
    editor.assign(f"{match.name}.conv", kernel_size=span)
    if detail.position:
        editor.resize(f"{match.name}.position", (1, channels, *span))


def _toy() -> nn.Module:
    """A strided depthwise conv and a pair of ParC operators on its map."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        ParCPair(8, 8, position=True),
    )


RULE = Rule(
    NAME,
    match,
    rewrite,
    examples=(Example(_toy, (3, 16, 16), ("2.vertical", "2.horizontal")),),
    follow=follow,
    default=False,
    details=(Resize,),
)


def ensure_registered() -> None:
    """Make the rule known to `padfree.convert`; doing so twice changes nothing."""
    register(RULE)
