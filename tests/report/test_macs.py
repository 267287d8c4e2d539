"""fvcore's total, and padfree's own operator in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import padfree
from padfree.report.macs import count_macs


def test_a_fused_chain_counts_as_its_convolutions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU()),
        nn.Conv2d(8, 12, 1),
    )
    converted = padfree.convert(network.eval(), input_size=(3, 16, 16), rules=("depthwise",))
    fused = padfree.fuse(converted)
    count = count_macs(fused, (3, 16, 16))
    assert count.macs == 16 * 16 * 8 * 3 * 9 + 7 * 7 * (8 * 9 + 12 * 8)
    assert count.macs == count_macs(converted, (3, 16, 16)).macs
    assert "max_pool2d" not in count.uncounted, "the pool is in the chain: nothing was fused, and nothing is tested"


@pytest.mark.parametrize("point", [True, False])
def test_a_chain_without_a_convolution_behind(point: bool) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU()]
    behind = [nn.Conv2d(8, 16, 1)] if point else [nn.Sigmoid()]
    network = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]), *behind).eval()
    fused = padfree.fuse(padfree.convert(network, input_size=(3, 16, 16), rules=("depthwise",)))
    assert count_macs(fused, (3, 16, 16)).macs == 16 * 16 * 8 * 3 * 9 + 7 * 7 * 8 * (9 + 16 * point)
