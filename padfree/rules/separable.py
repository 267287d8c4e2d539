"""Blueprint-separable convolutions in the place of dense ones (BSConv, CVPR 2020; `padfree.replace`).

before: conv(x, k, s, p)                    with W (N, M, k, k)
after:  dw(pw(x), k, s, p)                  BSConv-U: pw 1x1 M -> N, dw depthwise on N
        dw(pw2(pw1(x)), k, s, p)            BSConv-S: pw1 1x1 M -> M', pw2 1x1 M' -> N

1. the conv can be replaced (`_replaced`), and its kernel is among the wanted ones (3x3 and 5x5);
2. M' = min(M, max(4, ceil(p M))).

No activation comes between, and the 1x1 convs have no bias, so that zeros around x are zeros around pw(x).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from padfree.analysis.sites import Sites
from padfree.layers.spec import SeparableSpec
from padfree.rules._replaced import Kernels, Replacement, again, dense_convs, replacement
from padfree.rules.base import Editor, Rule, register
from padfree.types import Match, Options, Skip

KERNELS: Kernels = ((3, 3), (5, 5))
INITS = ("fresh", "svd")
SHARE = 0.25  # p of BSConv-S
_LEAST = 4  # channels between the 1x1 convs of BSConv-S


@dataclass(frozen=True)
class Separable(Replacement):
    """How a convolution is replaced.

    Attributes:
        mid_channels: M' of BSConv-S; None for BSConv-U.
        with_bn: norms behind the 1x1 convolutions.
        init: one of `INITS`, see `padfree.layers.spec.SeparableSpec`.
    """

    mid_channels: int | None
    with_bn: bool
    init: str

    @property
    def words(self) -> str:
        """For people."""
        (m, n), kernel = self.channels, "x".join(map(str, self.kernel))
        steps = f"{m} -> {n}" if self.mid_channels is None else f"{m} -> {self.mid_channels} -> {n}"
        norms = ", norms" if self.with_bn else ""
        return f"{steps}, {kernel}{norms}: {self.params[0]:,} -> {self.params[1]:,} parameters ({self.init})"


def separable(conv: nn.Conv2d, mid_channels: int | None, with_bn: bool, init: str) -> Separable:
    """The detail of a convolution."""
    m, n, kernel = conv.in_channels, conv.out_channels, (conv.kernel_size[0], conv.kernel_size[1])
    bias, taps = n * (conv.bias is not None), kernel[0] * kernel[1]
    points = [(m, n)] if mid_channels is None else [(m, mid_channels), (mid_channels, n)]
    small = sum(before * after + 2 * after * with_bn for before, after in points) + n * taps + bias
    return Separable(kernel, (m, n), (m * n * taps + bias, small), mid_channels, with_bn, init)


def match(
    sites: Sites,
    options: Options,
    *,
    name: str,
    kernels: Kernels = KERNELS,
    share: float = SHARE,
    with_bn: bool = False,
    init: str = "fresh",
) -> Iterator[Match | Skip]:
    """Every dense convolution with such a kernel."""
    for item in dense_convs(sites, name, kernels):
        if isinstance(item, Skip):
            yield item
            continue
        path, conv = item
        mid = min(conv.in_channels, max(_LEAST, math.ceil(share * conv.in_channels)))
        detail = separable(conv, mid if name == BSCONV_S else None, with_bn, init)
        yield replacement(sites, name, path, detail)


def planned(sites: Sites, options: Options, matches: Iterable[Match]) -> Iterator[Match]:
    """The matches of a plan, made anew of what is in the model and the settings that their details say."""
    for wanted, said, conv in again(sites, Separable, matches):
        mid = said.mid_channels
        sound = mid is None if wanted.rule == BSCONV_U else mid is not None and 1 <= mid <= conv.in_channels
        if sound and said.init in INITS:
            yield replacement(sites, wanted.rule, wanted.name, separable(conv, mid, said.with_bn, said.init))


def rewrite(found: Match, edit: Editor) -> None:
    """Put the pair in its place."""
    detail = found.detail
    assert isinstance(detail, Separable)
    edit.substitute(found.name, SeparableSpec(found.name, detail.mid_channels, detail.with_bn, detail.init))


BSCONV_U, BSCONV_S = "bsconv_u", "bsconv_s"
RULES = {
    name: register(
        Rule(
            name,
            functools.partial(match, name=name),
            rewrite,
            default=False,
            details=(Separable,),
            planned=planned,
        )
    )
    for name in (BSCONV_U, BSCONV_S)
}
