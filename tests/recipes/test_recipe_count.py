"""The counting conventions against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from padfree.recipes.count import Convention, Count, count
from torch import Tensor, nn

from padfree import PadfreeError
from padfree.layers.learned_groups import LearnedGroupConv2d, condense_stage


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


def test_macs() -> None:
    assert count(Toy(), 8, "macs") == Count("macs", PARAMS, 4, CONV + HEAD, CONV + HEAD)


def test_thop() -> None:
    # a conv's bias is counted for each of its 3 input channels, a linear layer's not at all
    counted = count(Toy(), 8, "thop")
    assert counted.flops == 3 * MAP * (9 + 1) + 10 * (2 * 4 - 1)
    assert counted.conv_linear == CONV + HEAD


def test_tf_profile() -> None:
    # both biases, 2 per norm element, 9 per output of a max-pool, the average's inputs; a sum with a vector is none
    doubled = 2 * (CONV + HEAD) + (MAP + 10) + 2 * MAP + 9 * MAP + 9 * 4 + 4 + 7 * PARAMS
    assert count(Toy(), 8, "tf-profile").flops == doubled // 2


class Summing(nn.Module):
    """Sums of two maps, however they are written, and sums that are none."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(x, x)
        y += x
        y = y.add(other=x)
        return 1 + (y + x + 3.0)


def test_residual_sums_count_an_operation_an_element() -> None:
    assert count(Summing(), 8, "tf-profile").flops == 4 * 3 * 8 * 8 // 2
    average = nn.AvgPool2d(2)
    assert count(average, 8, "tf-profile").flops == 3 * 4 * 4 * 4 // 2


@pytest.mark.parametrize("stages", [0, 2, 3])
@pytest.mark.parametrize("convention", ["bsconv", "fvcore", "modules", "macs", "thop", "tf-profile"])
def test_learned_groups_count_as_the_convolution_that_they_become(convention: Convention, stages: int) -> None:
    """A quarter of the inputs; tf-profile counts the products with the mask besides."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), LearnedGroupConv2d(8, 8))
    for _ in range(stages):
        condense_stage(model)
    standard = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, groups=4, bias=False))
    counted, wanted = count(model, 4, convention), count(standard, 4, convention)
    masks = 8 * 8 // 2 if convention == "tf-profile" else 0
    assert (counted.params, counted.flops - masks) == (wanted.params, wanted.flops) == (24 + 16, wanted.flops)
    assert [layer.stage for layer in model if isinstance(layer, LearnedGroupConv2d)] == [stages]


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
    with pytest.raises(
        PadfreeError, match=r"no counting convention 'flops'; there are bsconv, fvcore, mod.*tf-profile"
    ):
        count(Toy(), 8, "flops")  # type: ignore[arg-type]
