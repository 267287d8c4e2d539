"""Shapes of common operations without torch's own meta kernels are those that torch finds."""

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


def laid_out(x: torch.Tensor) -> tuple[object, ...]:
    return x.shape, x.dtype, x.stride(), x.device


SHAPES = [
    (2, 4, 6, 6),
    (2, 4, 1, 1),
    (1, 4, 6, 6),
    (4, 6, 6),
    (2, 1, 6, 1),
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (2, 3, 6, 6),
    (0, 4, 6, 6),
]
BINARY = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}


@pytest.mark.parametrize("formats", [(a, b) for a in range(3) for b in range(3)])
@pytest.mark.parametrize("first", SHAPES, ids=str)
def test_sums_and_products_are_laid_out_as_torchs(first: tuple[int, ...], formats: tuple[int, int]) -> None:
    """Of every pair of shapes and layouts, in place and not; what torch refuses is still refused."""

    def make(shape: tuple[int, ...], layout: int) -> torch.Tensor:
        x = torch.empty(shape, device="meta")
        if layout == 1 and len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        return x.mT if layout == 2 else x

    for second in SHAPES:
        for name, function in BINARY.items():
            for call in (function, lambda x, y, name=name: getattr(x, f"{name}_")(y)):
                pair = make(first, formats[0]), make(second, formats[1])
                try:
                    expected = call(*pair)
                except RuntimeError:
                    with QuickMeta(), pytest.raises(RuntimeError):
                        call(*pair)
                    continue
                with QuickMeta():
                    found = call(*pair)
                assert laid_out(found) == laid_out(expected)
                assert (found is pair[0]) == (expected is pair[0])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (1,), (0, 1, 2, 3), (3,)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_means_are_laid_out_as_torchs(axes: tuple[int, ...], keep: bool, memory_format: torch.memory_format) -> None:
    x = torch.empty(2, 4, 6, 6, device="meta").to(memory_format=memory_format)
    with QuickMeta():
        found = x.mean(axes, keepdim=keep)
    assert laid_out(found) == laid_out(x.mean(axes, keepdim=keep))
    with QuickMeta(), pytest.raises((RuntimeError, IndexError)):
        x.mean((4,))
    with QuickMeta(), pytest.raises(RuntimeError):
        x.mean((1, -3))
    with QuickMeta():
        assert x.mean((1,), dtype=torch.float64).dtype == torch.float64


def test_what_counts_stays_what_it_is() -> None:
    counter = torch.zeros((), dtype=torch.int64, device="meta")
    assert quick_meta(torch.ops.aten.add_.Tensor, (counter, 1)) is counter
    assert quick_meta(torch.ops.aten.add_.Tensor, (counter, 1.5)) is None
    with QuickMeta():
        assert counter.add_(1) is counter
        with pytest.raises(RuntimeError):
            counter.add_(1.5)
