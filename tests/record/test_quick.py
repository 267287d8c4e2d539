"""Shapes of norms and activations without torch's own meta kernels are those that torch finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from padfree.record.quick import QuickMeta, quick_meta

LAYERS = [
    nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Hardsigmoid(),
    nn.LeakyReLU(), nn.Mish(),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_laid_out_as_torchs(
    layer: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    layer = layer.to("meta", dtype)
    x = torch.empty(2, 4, 6, 6, device="meta", dtype=dtype).to(memory_format=memory_format)
    expected = layer(x.clone())
    with QuickMeta():
        found = layer(x.clone())
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_sizes_that_do_not_fit_still_fail() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 1)).to("meta")
    with QuickMeta(), pytest.raises(RuntimeError, match="channel"):
        net(torch.empty(1, 4, 6, 6, device="meta"))


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.int64, device="meta")])
def test_everything_else_is_torchs(x: torch.Tensor) -> None:
    assert quick_meta(torch.ops.aten.relu.default, (x,)) is None
    assert quick_meta(torch.ops.aten.add.Tensor, (x, x)) is None
