"""Dense downsampling (paper.md, Rewrites).

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

from padfree.downsampling import rewrite_site, site_matches, strided
from padfree.rule import Rule, register
from padfree.sites import Sites
from padfree.types import Match, Options, Skip

NAME = "dense"


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """Every stride-2 conv that is not depthwise, and BSConv pairs."""
    for conv, site in strided(sites):
        if site.dense:
            yield site_matches(sites, options, NAME, conv, site)


RULE = register(Rule(NAME, match, rewrite_site))
