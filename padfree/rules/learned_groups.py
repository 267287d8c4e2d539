"""Learned group convolutions in the place of dense 1x1 ones (CondenseNet, CVPR 2018; `padfree.replace`).

before: conv(x)                             with W (N, M, 1, 1)
after:  conv(x) with W * mask               the mask all ones: the same outputs, until stages condense it

1. the conv can be replaced (`_replaced`), and its kernel is among the wanted ones (1x1);
2. M is a multiple of the groups and of the condense factor, N of the groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from padfree.analysis.sites import Sites
from padfree.layers.learned_groups import LearnedGroupConv2d, not_divisible
from padfree.layers.spec import LearnedGroupsSpec
from padfree.rules._replaced import Kernels, Replacement, again, dense_convs, replacement
from padfree.rules.base import Editor, Rule, register
from padfree.types import Match, Options, Skip

NAME = "learned_groups"
KERNELS: Kernels = ((1, 1),)
GROUPS = CONDENSE_FACTOR = 4


@dataclass(frozen=True)
class LearnedGroups(Replacement):
    """How a convolution is replaced; `params` counts those that are left after the last stage.

    Attributes:
        groups: G. condense_factor: C.
    """

    groups: int
    condense_factor: int

    @property
    def words(self) -> str:
        """For people."""
        m, n = self.channels
        condensed = f"{self.params[0]:,} -> {self.params[1]:,} parameters after {self.condense_factor - 1} stages"
        return f"{m} -> {n} in {self.groups} groups: {condensed}"


def learned_groups(conv: nn.Conv2d, groups: int, condense_factor: int) -> LearnedGroups:
    """The detail of a convolution."""
    weights, bias = conv.weight.numel(), conv.out_channels * (conv.bias is not None)
    kernel, channels = (conv.kernel_size[0], conv.kernel_size[1]), (conv.in_channels, conv.out_channels)
    params = (weights + bias, weights // condense_factor + bias)
    return LearnedGroups(kernel, channels, params, groups, condense_factor)


def match(
    sites: Sites,
    options: Options,
    *,
    kernels: Kernels = KERNELS,
    groups: int = GROUPS,
    condense_factor: int = CONDENSE_FACTOR,
) -> Iterator[Match | Skip]:
    """Every dense convolution with such a kernel."""
    for item in dense_convs(sites, NAME, kernels):
        if isinstance(item, Skip):
            if not isinstance(sites.recording.modules[item.name], LearnedGroupConv2d):  # replaced before
                yield item
            continue
        path, conv = item
        why = _trouble(conv, groups, condense_factor)
        if why:
            yield Skip(path, why, NAME)
        else:
            yield replacement(sites, NAME, path, learned_groups(conv, groups, condense_factor))


def planned(sites: Sites, options: Options, matches: Iterable[Match]) -> Iterator[Match]:
    """The matches of a plan, made anew of what is in the model and the settings that their details say."""
    for wanted, said, conv in again(sites, LearnedGroups, matches):
        if not _trouble(conv, said.groups, said.condense_factor):
            yield replacement(sites, NAME, wanted.name, learned_groups(conv, said.groups, said.condense_factor))


def rewrite(found: Match, edit: Editor) -> None:
    """Put the layer in its place."""
    detail = found.detail
    assert isinstance(detail, LearnedGroups)
    edit.substitute(found.name, LearnedGroupsSpec(found.name, detail.groups, detail.condense_factor))


def _trouble(conv: nn.Conv2d, groups: int, condense_factor: int) -> str:
    why = not_divisible(conv.in_channels, conv.out_channels, groups, condense_factor)
    if why:
        return why
    padding = conv.padding if isinstance(conv.padding, str) else max(conv.padding)
    if type(conv) is not nn.Conv2d and (padding or max(conv.kernel_size) > 1):
        return (
            f"a {type(conv).__name__} with a window may pad in its own way, and a learned group convolution would not"
        )
    return ""


RULE = register(Rule(NAME, match, rewrite, default=False, details=(LearnedGroups,), planned=planned))
