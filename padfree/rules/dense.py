"""Dense downsampling (the paper, Rewrites).

before: act(norm(conv(x, k, s2, p)))
after:  act(norm(conv(x, k, s2, (k-3)/2))) + conv1x1(maxpool(x, 3, s2, p0))

1. the conv is dense or grouped, or a BSConv pair (a depthwise conv that only 1x1 convs feed, with no
   activation between): then x is what the first 1x1 reads and the padding goes from the depthwise conv;
2. stride 2x2, an odd square kernel of at least 3, more zeros than (k-3)/2 a side;
3. it is not the network's first conv;
4. it runs once, and does not only subsample the keys and values of an attention;
5. its input and the end of its chain meet in the forward of one module.

Where the conv keeps the number of channels the pool needs no 1x1. On a residual branch that only adapts
shape the padding goes and no pool comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from padfree.analysis.sites import Sites
from padfree.rules._downsampling import Downsampling, rewrite_site, site_matches, strided
from padfree.rules._toys import Residual, net, unit
from padfree.rules.base import Example, Rule, register
from padfree.types import Match, Options, Skip

NAME = "dense"


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """Every stride-2 conv that is not depthwise, and BSConv pairs."""
    for conv, site in strided(sites):
        if site.dense:
            yield site_matches(sites, options, NAME, conv, site)


SIZE = (3, 32, 32)


def _bsconv(out: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, out, 1, bias=False),
        nn.Conv2d(out, out, 3, 2, padding=1, groups=out, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


EXAMPLES = (
    Example(lambda: net(unit(8, 8, stride=2)), SIZE, ("1.0",)),
    Example(lambda: net(unit(8, 16, stride=2), out=16), SIZE, ("1.0",)),
    Example(lambda: net(unit(8, 8, 5, stride=2, groups=2)), SIZE, ("1.0",)),
    Example(lambda: net(_bsconv()), SIZE, ("1.1",)),
    Example(lambda: net(_bsconv(16), out=16), SIZE, ("1.1",)),
    Example(lambda: net(Residual(unit(8, 8, stride=2), unit(8, 8, 1, 2, act=False))), SIZE, ("1.main.0",)),
)
COUNTEREXAMPLES = (
    Example(lambda: net(unit(8, 8, 2, 2, padding=0), unit(8, 8, 3, 2, padding=0)), SIZE, ("padding-free already",)),
    Example(lambda: net(unit(8, 8, 4, 2, padding=1)), SIZE, ("kernel spans 4x4",)),
)
RULE = register(Rule(NAME, match, rewrite_site, EXAMPLES, COUNTEREXAMPLES, details=(Downsampling,)))
