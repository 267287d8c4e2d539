"""The three counting conventions against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from padfree.recipes.count import Count, count
from torch import Tensor, nn

from padfree import PadfreeError


class Toy(nn.Module):
    """8x8 -> conv 3x3 s2 -> 4x4, norm, ReLU, a pool as a module and one as a function, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.position = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        x = torch.nn.functional.max_pool2d(x, 3, 2)  # 4x4 -> 1x1
        y: Tensor = self.head(self.average(x).flatten(1) + self.position)
        return y


CONV = 4 * 4 * 4 * 3 * 9
MAP = 4 * 4 * 4
HEAD = 4 * 10
PARAMS = (4 * 3 * 9 + 4) + 2 * 4 + (4 * 10 + 10) + 4


def test_bsconv() -> None:
    # conv and its bias, 2 per norm element, ReLU, both max-pools' inputs, average pool, head and bias
    flops = (CONV + MAP) + 2 * MAP + MAP + MAP + MAP + 4 + (HEAD + 10)
    assert count(Toy(), 8, "bsconv") == Count("bsconv", PARAMS, 4, flops, None, MAP)


def test_fvcore() -> None:
    counted = count(Toy(), 8, "fvcore")
    assert (counted.params, counted.bare_params) == (PARAMS, 4)
    assert counted.conv_linear == CONV + HEAD
    assert counted.flops == CONV + HEAD + 2 * MAP + 4
    assert counted.downsampling_pool_inputs is None


def test_modules() -> None:
    assert count(Toy(), 8, "modules").flops == (CONV + MAP) + 2 * MAP + 4 + HEAD


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Toy().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, 8, "bsconv")
    count(model, 8, "fvcore")
    count(model, 8, "modules")
    assert model.training and model.conv.weight.device.type == "cpu"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_frozen_parameters_are_not_counted() -> None:
    model = Toy()
    model.head.requires_grad_(False)
    assert count(model, 8, "modules").params == PARAMS - 50


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(PadfreeError, match=r"no counting convention 'flops'; there are bsconv, fvcore, mod"):
        count(Toy(), 8, "flops")  # type: ignore[arg-type]
