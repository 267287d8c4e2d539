"""Depthwise downsampling (the paper, Rewrites).

before: act(norm(dwconv(x, k, s2, p)))
after:  act(norm(dwconv(x, k, s2, (k-3)/2))) + maxpool(x, 3, s2, p0)

1. the conv is depthwise with stride 2x2 and an odd square kernel of at least 3, dilation counted;
2. it pads more zeros than (k-3)/2 a side, itself or by a pad before it;
3. it is not the network's first conv, and not the depthwise half of a BSConv pair (`dense`);
4. it runs once, and does not only subsample the keys and values of an attention;
5. its input and the end of its chain meet in the forward of one module.

With a channel multiplier m the pool is repeated m times a channel. Convs over the parts of a split, and
linear branches summed before the norm or activation, act as one conv with one shortcut. On a residual
branch that only adapts shape the padding goes and no pool comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from padfree.analysis.sites import Sites
from padfree.rules._downsampling import Downsampling, rewrite_site, site_matches, strided
from padfree.rules._toys import Joined, KeyAttention, Padded, Residual, SplitJoin, Twice, depthwise, net, unit
from padfree.rules.base import Example, Rule, register
from padfree.types import Match, Options, Skip

NAME = "depthwise"


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """Every stride-2 depthwise conv that is not half a BSConv pair."""
    for conv, site in strided(sites):
        if not site.dense and site.largest.depthwise:
            yield site_matches(sites, options, NAME, conv, site)


SIZE = (3, 32, 32)
EXAMPLES = (
    Example(lambda: net(depthwise(8)), SIZE, ("1.0",)),
    Example(lambda: net(depthwise(8, 5), depthwise(8, 7, act=False)), SIZE, ("1.0", "2.0")),
    Example(lambda: net(depthwise(8, dilation=2, padding=2)), SIZE, ("1.0",)),
    Example(lambda: net(depthwise(8, multiplier=2), out=16), SIZE, ("1.0",)),
    Example(lambda: net(SplitJoin(8)), SIZE, ("1.large", "1.small")),
    Example(lambda: net(Padded(8)), SIZE, ("1.conv",)),
    Example(
        lambda: net(Joined(depthwise(8, act=False), depthwise(8, 1, act=False), out=8, total=True)),
        SIZE,
        ("1.branches.0.0",),
    ),
    Example(
        lambda: net(Residual(nn.Sequential(depthwise(8), unit(8, 8, 1)), depthwise(8, act=False))),
        SIZE,
        ("1.main.0.0", "1.shortcut.0"),
    ),
)
COUNTEREXAMPLES = (
    Example(lambda: net(depthwise(8, padding=0)), SIZE, ("padding-free already",)),
    Example(lambda: net(depthwise(8, padding_mode="reflect")), SIZE, ("reflection_pad2d",)),
    Example(lambda: net(depthwise(8, stride=4)), SIZE, ("stride is 4x4",)),
    Example(lambda: net(KeyAttention(8)), SIZE, ("keys and values",)),
    Example(lambda: net(Twice(depthwise(8))), SIZE, ("called 2 times",)),
    Example(lambda: net(Residual(depthwise(8), unit(8, 8, 2, 2, padding=0))), SIZE, ("1.shortcut.0", "2x2")),
)
RULE = register(Rule(NAME, match, rewrite_site, EXAMPLES, COUNTEREXAMPLES, details=(Downsampling,)))
