"""Low-rank adapters around a strided conv are one convolution; what is prepared for int8, or scripted, is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strangers import Net, Unit, convert, images, refusal
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.testing import assert_close

import padfree

SIZE = (3, 32, 32)


class Adapter(nn.Module):
    """conv(x) + up(down(x)), `up` zero at first."""

    def __init__(self, conv: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class DownFirst(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        return y + self.base(x)


class Scaled(Adapter):
    """As PEFT writes it: by name, dropout ahead, scaled, its result added in place."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, 4)
        self.lora_a, self.lora_b = nn.ModuleDict({"default": self.down}), nn.ModuleDict({"default": self.up})
        self.drop, self.scaling, self.active = nn.Dropout(0.1), {"default": 2.0}, ["default"]
        del self.down, self.up

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        for name in self.active:
            result = result + self.lora_b[name](self.lora_a[name](self.drop(x))) * self.scaling[name]
        return result


class Twice(Adapter):
    """An adapter around an adapter."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.base = Adapter(conv)  # type: ignore[assignment]


class Inside(Adapter):
    """Of full rank, with biases."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, conv.out_channels)


def unit(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, 2, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize("wrap", [Adapter, DownFirst, Scaled, Twice, Inside])
@pytest.mark.parametrize("groups", [1, 8])
def test_an_adapter_of_zeros_changes_nothing(wrap: Callable[[Any], nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), unit(8, 8, groups), nn.Conv2d(8, 4, 1))
    rules = ("dense", "depthwise")
    wanted = convert(plain, rules=rules, size=SIZE).eval()
    plain[1][0] = wrap(plain[1][0])
    try:
        made = convert(plain, rules=rules, size=SIZE).eval()
    except padfree.PadfreeError:
        return
    x = images(side=32)
    assert_close(made(x), wanted(x))


def test_adapters_are_added_to_a_converted_network() -> None:
    made: Any = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), unit(8, 8, 8), nn.Conv2d(8, 4, 1)), size=SIZE)
    x = images(side=32)
    wanted = made.eval()(x)
    made[1][0] = Adapter(made[1][0]).eval()
    assert_close(made(x), wanted)
    made.train()(x).sum().backward()
    assert made[1][0].up.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_a_network_prepared_for_int8_is_refused(training: bool) -> None:
    net = Net(Unit()).train(training)
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(net) if training else quantization.prepare(net)
    assert "convert the float model, then prepare it" in refusal(prepared)


def test_the_advice_for_int8_works() -> None:
    x = images()
    made = convert(Net(Unit())).eval()
    prepared = quantize_fx.prepare_fx(made, quantization.get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    wanted = made(x)
    assert (quantized(x) - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_scripted_helper_is_named() -> None:
    unit = Unit()
    unit.conv = torch.jit.script(unit.conv)
    assert "then script it" in refusal(Net(unit))
    assert "then script it" in refusal(Net(torch.jit.script(Unit())))
