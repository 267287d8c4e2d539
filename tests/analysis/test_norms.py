"""Which modules are norms though their forwards are formulas, and which are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.recordings import flow_of

C = 4


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, C, 3, padding=1)


class Formula(nn.Module):
    """A norm, or something like one, as a formula of its map and of weights."""

    def __init__(self, kind: str, weights: int = C, act: nn.Module | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.g = nn.Parameter(torch.ones(1, weights, 1, 1))
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "response":
            x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        elif self.kind == "deviation":
            x = x / x.std(1, keepdim=True)
        elif self.kind == "gated":
            x = x * torch.sigmoid((x / x.std((2, 3), keepdim=True)).mean((2, 3), keepdim=True) * self.g)
        elif self.kind == "squeezed":
            x = x.mean((2, 3), keepdim=True)
        elif self.kind == "mixed":
            x = torch.einsum("nchw,cd->ndhw", x, x.mean((0, 2, 3))[:, None] * x.mean((0, 2, 3))[None])
        y = x * self.g
        return self.act(y) if hasattr(self, "act") else y


@pytest.mark.parametrize("kind", ["response", "deviation"])
@pytest.mark.parametrize("act", [None, nn.SiLU()], ids=["alone", "with its activation"])
def test_a_formula_is_a_norm(kind: str, act: nn.Module | None) -> None:
    flow = flow_of(lambda net, x: net.norm(net.conv(x)), conv=conv(), norm=Formula(kind, act=act))
    (read, norm), *more = flow.written_norms.items()
    assert not more
    chain = flow.chain(read)
    assert (chain.norm, chain.norm_path) == (norm.made, "norm")
    assert (chain.act_path, chain.end()) == ("norm.act" if act else "", flow.recording.outputs[0])
    assert flow.linear_source(norm.made) == read


def test_behind_a_norm_there_is_no_other() -> None:
    flow = flow_of(
        lambda net, x: net.like(net.norm(net.conv(x))), conv=conv(), norm=nn.BatchNorm2d(C), like=Formula("response")
    )
    (value,) = (op.outputs[0] for op in flow.ops if op.kind == "convolution")
    assert flow.chain(value).norm_path == "norm"


@pytest.mark.parametrize(
    "module",
    [
        Formula("scaled"),  # no statistic
        Formula("response", weights=1),  # one weight for all
        Formula("gated"),  # the statistic says how much of a channel goes on
        Formula("squeezed"),  # no map of the same size
        Formula("mixed"),  # a product of matrices
        Formula("response", act=nn.Conv2d(C, C, 1)),  # a layer below it
    ],
    ids=["scale", "one weight", "gate", "pool", "product", "layer"],
)
def test_no_norm(module: nn.Module) -> None:
    assert not flow_of(lambda net, x: net.norm(net.conv(x)), conv=conv(), norm=module).written_norms


def test_a_map_that_others_read_is_not_normed() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)  # type: ignore[operator]
        return net.norm(y) + y  # type: ignore[operator, no-any-return]

    assert not flow_of(forward, conv=conv(), norm=Formula("response")).written_norms
