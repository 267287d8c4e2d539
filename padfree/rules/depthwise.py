"""Depthwise downsampling (paper.md, Rewrites).

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

from padfree.downsampling import rewrite_site, site_matches, strided
from padfree.rule import Rule, register
from padfree.sites import Sites
from padfree.types import Match, Options, Skip

NAME = "depthwise"


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """Every stride-2 depthwise conv that is not half a BSConv pair."""
    for conv, site in strided(sites):
        if not site.dense and conv.depthwise:
            yield site_matches(sites, options, NAME, conv, site)


RULE = register(Rule(NAME, match, rewrite_site))
