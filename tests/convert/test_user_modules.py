"""Networks that are no catalogue models: what users write converts to what the paper's formula says."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections import namedtuple
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from strangers import SIDE, Basic, Net, Unit, check, convert, depthwise, expected, images, refusal, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import padfree

T = TypeVar("T")
Pair = namedtuple("Pair", "out aux")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- forwards -----------------------------------------------------------------------------------


class FunctionalRelu(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class DroppedResult(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        F.relu_(y)
        return y


class DroppedModuleResult(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.act(y)
        return y


class InPlaceOnInputAfter(Unit):
    """The conv's input is overwritten after the conv: the pool must have read it before."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        x.relu_()
        return self.act(y), x


class Locals(Unit):
    """Locals, a loop, an inner function, a lambda, a walrus."""

    def forward(self, x: Tensor) -> Tensor:
        def normed(t: Tensor) -> Tensor:
            return self.bn(t)

        for step in (self.conv, normed, lambda t: self.act(t)):
            x = (y := step(x))
        return y


class InputByKeyword(Unit):
    def forward(self, input: Tensor, *, flag: bool = True, scale: float = 1.0) -> Tensor:
        y = self.bn(self.conv(input))
        return (self.act(y) if flag else y) * scale


class Prints(Unit):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.act(self.bn(self.conv(x)))
        except ValueError:
            return x


class Helper(Unit):
    def _norm_act(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._norm_act(self.conv(x))


class Super(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Property(Unit):
    @property
    def body(self) -> nn.Module:
        return self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.body(x)))


@pytest.mark.parametrize(
    "kind",
    [
        Unit,
        FunctionalRelu,
        DroppedResult,
        DroppedModuleResult,
        Locals,
        InputByKeyword,
        Prints,
        Helper,
        Super,
        Property,
    ],
)
def test_forwards(kind: type[nn.Module]) -> None:
    made = check(kind())
    assert type(made.block) is not kind and isinstance(made.block, kind)
    assert type(made.block).__name__ == kind.__name__


def test_input_changed_in_place_after_the_conv() -> None:
    made = convert(Net(InPlaceOnInputAfter()))
    twin = copy.deepcopy(made)
    x = twin.stem(images())
    with torch.no_grad():  # the original cannot be trained either
        found, passed = made(images())
    assert_close(found, expected(twin.block, x))
    assert_close(passed, x.relu())


def test_input_changed_in_place_before_the_conv() -> None:
    class Shift(Unit):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x.add_(1)
            return self.act(self.bn(self.conv(x))), x

    made = convert(Net(Shift()))
    twin = copy.deepcopy(made)
    shifted = twin.stem(images()) + 1
    found, passed = made(images())
    assert_close(found, expected(twin.block, shifted))
    assert_close(passed, shifted)


class Stats(Unit):
    def forward(self, batch: dict[str, Tensor], ctx: Any = None, times: int = 2) -> dict[str, Any]:
        return {"out": self.act(self.bn(self.conv(batch["x"]))), "times": times, "ctx": ctx}


def test_arguments_and_results_of_other_kinds() -> None:
    class Caller(Net):
        def forward(self, x: Tensor) -> Any:
            return self.block({"x": self.stem(x)}, times=5)

    made = convert(Caller(Stats()))
    twin = copy.deepcopy(made)
    found = made(images())
    assert found["times"] == 5 and found["ctx"] is None
    assert_close(found["out"], expected(twin.block, twin.stem(images())))


def test_a_list_of_tensors_goes_in_and_a_tuple_comes_out() -> None:
    class Two(Unit):
        def forward(self, xs: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, None, list[Tensor]]:
            return self.act(self.bn(self.conv(xs[0]))), None, [xs[1]]

    class Caller(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.stem(x)
            return self.block([y, y + 1], mask=None)

    made = convert(Caller(Two()))
    twin = copy.deepcopy(made)
    out, nothing, (passed,) = made(images())
    assert nothing is None
    assert_close(passed, twin.stem(images()) + 1)
    assert_close(out, expected(twin.block, twin.stem(images())))
    with pytest.raises(RuntimeError, match="traced with 2 tensors in xs and got 1"):
        made.block([images(channels=8)])
    with pytest.raises(RuntimeError, match="traced with mask=None"):
        made.block([images(channels=8), images(channels=8)], mask=images())


def test_a_namedtuple_result() -> None:
    class Named(Unit):
        def forward(self, x: Tensor) -> Pair:
            return Pair(self.act(self.bn(self.conv(x))), x)

    made = check(Named())
    assert isinstance(made(images()), Pair)


def test_flags_of_the_forward_are_checked_when_it_is_called() -> None:
    class Flag(Unit):
        def forward(self, x: Tensor, linear: bool = False) -> Tensor:
            y = self.bn(self.conv(x))
            return y if linear else self.act(y)

    made = check(Flag())
    with pytest.raises(RuntimeError, match="traced with linear=False and got True"):
        made.block(images(channels=8), linear=True)


# -- layers -------------------------------------------------------------------------------------


class LayerNormLast(nn.Module):
    """LayerNorm over channels of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.gamma.shape, self.gamma, self.beta)
        return y.permute(0, 3, 1, 2)


NORMS = [
    nn.GroupNorm(2, 8),
    nn.InstanceNorm2d(8),
    nn.InstanceNorm2d(8, affine=True),
    nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    LayerNormLast(8),
    nn.Identity(),
    nn.SyncBatchNorm(8),
]


@pytest.mark.parametrize("norm", NORMS[:-1], ids=lambda norm: type(norm).__name__)
def test_norms(norm: nn.Module) -> None:
    unit = Unit()
    unit.bn = copy.deepcopy(norm)
    check(unit)


class HandNorm(nn.Module):
    """Mean and variance over channels, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * self.g + self.b


def test_a_norm_written_by_hand() -> None:
    unit = Unit()
    unit.bn = HandNorm()
    check(unit)


class ResponseNorm(nn.Module):
    """Filter response normalisation, as its paper writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g, self.b = (nn.Parameter(torch.full((1, channels, 1, 1), value)) for value in (1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6) * self.g + self.b


def test_a_stem_with_a_norm_written_by_hand() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), ResponseNorm(8), nn.ReLU())
    plan = padfree.plan(nn.Sequential(stem, Unit()), input_size=(3, 32, 32))
    assert [match.rule for match in plan.matches] == ["stem", "depthwise"]


ACTS = [nn.PReLU(8), nn.PReLU(), nn.GELU(), nn.SiLU(inplace=True), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Mish()]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
def test_activations(act: nn.Module) -> None:
    unit = Unit()
    unit.act = copy.deepcopy(act)
    check(unit, act=None)


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_and_bias(kernel: int, bias: bool) -> None:
    unit = Unit()
    unit.conv = depthwise(kernel=kernel, bias=bias)
    check(unit)


def test_padding_is_kept_as_the_kind_of_thing_it_was() -> None:
    unit = Unit()
    unit.conv = depthwise(kernel=5)
    made = check(unit)
    assert made.block.conv.padding == (1, 1)


def test_a_dilated_conv() -> None:
    unit = Unit()
    unit.conv = depthwise(dilation=2, padding=2)
    made = convert(Net(unit)).eval()
    x = made.stem(images())
    y = F.conv2d(x, made.block.conv.weight, made.block.conv.bias, 2, 1, 2, 8)
    assert_close(made(images()), F.relu(made.block.bn(y)) + F.max_pool2d(x, 3, 2))


def test_a_channel_multiplier() -> None:
    unit = Unit()
    unit.conv, unit.bn = depthwise(multiplier=2), nn.BatchNorm2d(16)
    made = convert(Net(unit)).eval()
    x = made.stem(images())
    y = F.conv2d(x, made.block.conv.weight, made.block.conv.bias, 2, 0, 1, 8)
    pooled = F.max_pool2d(x, 3, 2)
    repeated = torch.stack((pooled, pooled), 2).flatten(1, 2)
    assert_close(made(images()), F.relu(made.block.bn(y)) + repeated)


class PadsByFunction(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(F.pad(x, (1, 1, 1, 1)))))


class PadsByModule(Unit):
    """TensorFlow's way: one line at the bottom and right."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.pad(x))))


class PadsItself(nn.Conv2d):
    """SAME padding, computed in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        rest = (-x.shape[-1]) % 2
        x = F.pad(x, (rest, 1, rest, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kind", [PadsByFunction, PadsByModule])
@pytest.mark.parametrize("padding", [0, "valid"])
def test_padding_before_the_conv_goes(kind: type[Unit], padding: Any) -> None:
    unit = kind()
    unit.conv = depthwise(padding=padding)
    check(unit)


def test_padding_inside_a_conv_of_ones_own_goes() -> None:
    unit = Unit()
    unit.conv = PadsItself(8, 8, 3, 2, 0, groups=8)
    made = check(unit)
    assert isinstance(made.block.conv, PadsItself)


# -- networks -----------------------------------------------------------------------------------


def test_a_residual_block_by_hand() -> None:
    made = convert(Net(Basic()), rules=("dense", "projection"))
    assert list(made.state_dict())[: len(Net(Basic()).state_dict())] == list(Net(Basic()).state_dict())
    for training in (True, False):
        made.train(training)
        twin = copy.deepcopy(made)
        block, x = twin.block, twin.stem(images())
        y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, None, 2)))
        y = y + block.padfree_shortcut.conv(F.max_pool2d(x, 3, 2))
        y = block.bn2(block.conv2(y))
        reduce = block.padfree_reduce
        side = reduce.norm(F.conv2d(x, reduce.conv.weight, None, 2, groups=8))
        side = block.down[1](F.conv2d(side, block.down[0].weight))
        assert_close(made(images()), F.relu(y + side))
    made(images()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_a_flat_sequential() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), depthwise(), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    made = convert(model).eval()
    x = made[0](images())
    y = F.relu(made[2](F.conv2d(x, made[1].weight, made[1].bias, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    assert_close(made(images()), made[6](y.mean((2, 3))))
    assert list(made.state_dict()) == list(model.state_dict())


def test_nested_sequentials_in_a_list_and_a_dict() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            part = nn.ModuleDict({"conv": depthwise(), "bn": nn.BatchNorm2d(8), "act": nn.ReLU()})
            self.parts = nn.ModuleList([part, nn.Sequential(nn.Sequential(depthwise(), nn.BatchNorm2d(8)), nn.ReLU())])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            part = self.parts[0]
            x = part["act"](part["bn"](part["conv"](x)))
            return self.parts[1](x)

    made = convert(Tree()).eval()
    x = made.stem(images())
    part, last = made.parts[0], made.parts[1]
    x = F.relu(part["bn"](F.conv2d(x, part["conv"].weight, part["conv"].bias, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    conv, norm = last[0]
    x = F.relu(norm(F.conv2d(x, conv.weight, conv.bias, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    assert_close(made(images()), x)


class Staged(nn.Module):
    """Stages that are plain Sequentials of one strided conv, the last with a projection beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32))
        self.downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        return F.relu(self.layer2(x) + self.downsample(x))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Staged()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * 2 - 1).mean((2, 3))


def test_a_network_inside_another_is_converted_as_it_is_alone_and_hooks_see_what_is_read_on() -> None:
    alone, inside = padfree.convert(Staged(), input_size=(3, 65, 65)), padfree.convert(Around(), input_size=(3, 65, 65))
    assert {f"body.{key}" for key in alone.state_dict()} == set(inside.state_dict())
    assert any(key.startswith("layer1.padfree_shortcut.") for key in alone.state_dict())
    seen: dict[str, Tensor] = {}
    inside.get_submodule("body.layer1").register_forward_hook(lambda module, given, out: seen.update(returned=out))
    inside.get_submodule("body.layer2").register_forward_pre_hook(lambda module, given: seen.update(read=given[0]))
    inside(images(side=65))
    assert_close(seen["returned"], seen["read"], rtol=0, atol=0)


class Plain(nn.Module):
    """A whole network in one forward, functions for what has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = depthwise(bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu6(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


def test_convs_in_the_root_forward() -> None:
    made = padfree.convert(Plain(), input_size=(3, 32, 32)).eval()
    assert [match.name for match in made.padfree_plan.matches] == ["conv1", "conv2"]
    x = images(side=32)
    x = F.relu(made.bn1(F.conv2d(x, made.conv1.weight, None, 2, 1)))
    tail = made.padfree_stem
    left = F.relu(tail.norm1(F.conv2d(x, tail.conv_dw.weight, None, 1, 1, 1, 8)))
    both = torch.cat((left, F.max_pool2d(x, 3, 1, 1)), 1)
    x = F.relu(tail.norm2(F.conv2d(both, tail.conv_pw.weight)))
    x = F.relu6(made.bn2(F.conv2d(x, made.conv2.weight, None, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    x = F.relu(made.bn3(F.conv2d(x, made.conv3.weight)))
    assert_close(made(images(side=32)), made.fc(x.mean((2, 3))))


class Classic(nn.Module):
    """Stem conv, norm, act, max-pool as modules, then a unit."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm, act
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.block = Unit()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.maxpool(self.act1(self.norm1(self.conv1(x)))))


STEM_NORMS = [nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True), LayerNormLast(8), nn.Identity()]


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.PReLU(8), nn.GELU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("norm", STEM_NORMS, ids=lambda norm: type(norm).__name__)
def test_a_stem_with_its_pool_by_hand(norm: nn.Module, act: nn.Module) -> None:
    made = padfree.convert(Classic(copy.deepcopy(norm), copy.deepcopy(act)), input_size=(3, 64, 64)).eval()
    assert [match.rule for match in made.padfree_plan.matches] == ["stem", "depthwise"]
    tail = made.maxpool
    for parameter in [*tail.norm1.parameters(), *tail.norm2.parameters()]:
        assert parameter.unique().tolist() in ([0.0], [1.0])
    assert not list(tail.norm1.parameters()) or {1.0} <= {p.unique().item() for p in tail.norm1.parameters()}
    x = made.act1(made.norm1(F.conv2d(images(side=64), made.conv1.weight, None, 2, 3)))
    left = copy.deepcopy(act)(copy.deepcopy(tail.norm1)(F.conv2d(x, tail.conv_dw.weight, None, 2, 1, 1, 8)))
    both = torch.cat((left, F.max_pool2d(x, 3, 2, 1)), 1)
    y = copy.deepcopy(act)(copy.deepcopy(tail.norm2)(F.conv2d(both, tail.conv_pw.weight)))
    assert_close(made(images(side=64)), expected(made.block, y))
    made.train()(images(side=64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [tail.conv_dw.weight, tail.conv_pw.weight])


@pytest.mark.parametrize("size", [(3, 15, 15), (3, 17, 23), (3, 16, 32), (1, 20, 20)])
def test_sizes_and_channels(size: tuple[int, ...]) -> None:
    made = convert(Net(Unit(), in_channels=size[0]), size=size).eval()
    x = torch.randn(3, *size)
    assert_close(made(x), expected(made.block, made.stem(x)))
    assert made(x).shape[2:] == ((size[1] - 3) // 2 + 1, (size[2] - 3) // 2 + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    made = convert(Net(Basic()).to(dtype), rules=None)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert {b.dtype for b in made.buffers()} == {dtype, torch.int64}
    assert made(images().to(dtype)).dtype is dtype


def test_bf16_values() -> None:
    made = convert(Net(Unit()).to(torch.bfloat16)).eval()
    x = images().to(torch.bfloat16)
    assert_close(made(x), expected(made.block, made.stem(x)))


def test_channels_last() -> None:
    model = Net(Basic()).to(memory_format=torch.channels_last)
    made = convert(model, rules=None).eval()
    x = images()
    found = made(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, copy.deepcopy(made).to(memory_format=torch.contiguous_format)(x), rtol=1e-4, atol=1e-4)


def test_frozen_parameters_stay_frozen_and_new_ones_train() -> None:
    model = Net(Basic())
    model.requires_grad_(False)
    made = convert(model, rules=("dense", "projection"))
    old = set(model.state_dict())
    assert {name for name, p in made.named_parameters() if p.requires_grad} == set(dict(made.named_parameters())) - old


def test_partial_modes_are_kept() -> None:
    model = Net(Basic()).train()
    model.block.bn1.eval()
    made = convert(model, rules=None)
    assert [name for name, m in made.named_modules() if not m.training] == ["block.bn1"]
    assert not any(m.training for m in convert(Net(Basic()).eval(), rules=None).modules())


# -- parametrized, lazy, scripted, compiled, wrapped ---------------------------------------------


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_convs(parametrize: Any) -> None:
    unit = Unit()
    parametrize(unit.conv)
    made = convert(Net(unit)).eval()
    assert "block.conv.parametrizations.weight.0" in dict(made.named_modules()) or made.block.conv.parametrizations
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_old_spectral_norm() -> None:
    unit = Unit()
    nn.utils.spectral_norm(unit.conv)
    made = convert(Net(unit)).eval()
    made(images())
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_a_conv_parametrized_after_converting() -> None:
    made = convert(Net(Unit())).eval()
    parametrizations.weight_norm(made.block.conv)
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_lazy_modules_once_they_are_initialised() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), Unit())
    assert "run it on" in refusal_text(model)
    model(images())
    made = convert(model).eval()
    x = F.relu(made[1](made[0](images())))
    assert_close(made(images()), expected(made[3], x))


def refusal_text(model: nn.Module) -> str:
    with pytest.raises(padfree.PadfreeError) as caught:
        convert(model)
    return str(caught.value)


def test_a_scripted_child_and_a_compiled_child() -> None:
    class Scripted(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.after = torch.jit.script(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.act(self.bn(self.conv(x))))

    made = convert(Net(Scripted())).eval()
    assert_close(made(images()), F.relu(expected(made.block, made.stem(images()))))
    model = Net(Unit())
    model.block = torch.compile(model.block, backend="eager")  # type: ignore[assignment]
    made = convert(model).eval()
    assert_close(made(images()), expected(made.block._orig_mod, made.stem(images())))


def test_compiled_in_place() -> None:
    model = Net(Unit()).eval()
    model.compile(backend="eager")
    model(images())
    made = convert(model, inplace=True)
    assert made is model
    assert_close(made(images()), expected(made.block, made.stem(images())))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=reentrant)

    made = convert(Checkpointed(Unit())).train()
    twin = copy.deepcopy(made)
    wanted = expected(twin.block, twin.stem(images()))
    found = made(images())
    assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert_close(made.block.conv.weight.grad, twin.block.conv.weight.grad)


# -- modules of odd classes ----------------------------------------------------------------------


def test_getattr_that_answers_to_everything() -> None:
    class Any_(Net):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    made = convert(Any_(Unit())).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_a_wrapper_that_delegates_attributes() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.model, name)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    made = convert(Wrapper(Net(Unit()))).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_a_setattr_that_refuses() -> None:
    class Frozen(Unit):
        def __setattr__(self, name: str, value: Any) -> None:
            if "act" in self.__dict__.get("_modules", {}) and name != "training":
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    made = check(Frozen())
    with pytest.raises(RuntimeError, match="frozen"):
        made.block.anything = 1


def test_slots_survive_inplace_conversion() -> None:
    class Slotted(Unit):
        __slots__ = ("extra",)

    model = Net(Slotted())
    model.block.extra = [1]
    made = convert(model, inplace=True)
    assert made.block.extra == [1]


def test_dataclass_generic_and_abstract_modules() -> None:
    @dataclasses.dataclass(eq=False)
    class Data(nn.Module):
        channels: int = 8

        def __post_init__(self) -> None:
            nn.Module.__init__(self)
            self.conv, self.bn = depthwise(self.channels), nn.BatchNorm2d(self.channels)

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value) if "_modules" not in self.__dict__ else super().__setattr__(
                name, value
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)))

    class Base(nn.Module, Generic[T], abc.ABC):
        @abc.abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

    class Concrete(Unit, Base[int]):
        pass

    check(Data())
    made = check(Concrete())
    assert isinstance(made.block, Base)
    assert not isinstance(Concrete(), type(made.block))


def test_none_children_and_buffers() -> None:
    class Nones(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.down = None
            self.register_buffer("scale", torch.full((1,), 1.0))
            self.register_buffer("none", None)
            self.register_parameter("gamma", None)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.bn(self.conv(x)))
            y = y * self.gamma if self.gamma is not None else y
            return y if self.down is None else y + self.down(x)

    check(Nones())


def test_a_block_registered_twice_under_two_names() -> None:
    class Alias(Net):
        def __init__(self) -> None:
            super().__init__(Unit())
            self.alias = self.block

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.stem(x))

    made = convert(Alias()).eval()
    assert made.alias is made.block
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_a_root_forward_of_its_own_on_the_instance() -> None:
    model = Net(Unit())
    model.forward = lambda x: model.block(model.stem(x)) * 2  # type: ignore[method-assign]
    made = convert(model).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())) * 2)
    made.block.bn.weight.data.fill_(5)
    assert model.block.bn.weight.unique().item() == 1


def test_call_overrides() -> None:
    class Louder(Unit):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + 1

    made = convert(Net(Louder())).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())) + 1)


# -- several at once -----------------------------------------------------------------------------


def test_two_models_side_by_side() -> None:
    one, two = convert(Net(Unit())).eval(), convert(Net(Unit())).eval()
    two.block.bn.bias.data.fill_(3)
    assert type(one.block) is type(two.block)
    assert_close(one(images()), expected(one.block, one.stem(images())))
    assert_close(two(images()), expected(two.block, two.stem(images())))


class Two(nn.Module):
    """Two strided convs in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1, self.c2, self.n2 = depthwise(), nn.BatchNorm2d(8), depthwise(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


def test_converted_in_two_steps_or_in_one() -> None:
    model = Net(Two()).eval()
    half = convert(model, include="block.c1")
    assert [skip.name for skip in half.padfree_plan.skips] == ["block.c2"]
    whole = convert(half, include="re:block.*")
    at_once = convert(model)
    assert type(whole.block).__mro__.count(Two) == 1 and len(type(whole.block).__mro__) == len(type(half.block).__mro__)
    assert_close(whole(images(side=24)), at_once(images(side=24)))
    x = at_once.stem(images(side=24))
    for conv, norm in ((at_once.block.c1, at_once.block.n1), (at_once.block.c2, at_once.block.n2)):
        x = F.relu(norm(F.conv2d(x, conv.weight, conv.bias, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    assert_close(at_once(images(side=24)), x)


def test_a_converted_model_is_returned_as_it_is() -> None:
    made = convert(Net(Unit()), rules=None)
    before = snapshot(made)
    assert convert(made, rules=None) is made
    assert snapshot(made) == before


def test_exclude_leaves_a_place_alone() -> None:
    made = convert(Net(Two()), exclude="*.c2").eval()
    x = made.stem(images())
    x = F.relu(made.block.n1(F.conv2d(x, made.block.c1.weight, made.block.c1.bias, 2, 0, 1, 8))) + F.max_pool2d(x, 3, 2)
    x = F.relu(made.block.n2(F.conv2d(x, made.block.c2.weight, made.block.c2.bias, 2, 1, 1, 8)))
    assert_close(made(images()), x)


CONTEXTS = [
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    lambda: torch.device("meta"),
]


@pytest.mark.parametrize("context", CONTEXTS, ids=["no_grad", "inference_mode", "autocast", "meta"])
def test_what_surrounds_the_call_does_not_matter(context: Any) -> None:
    model = Net(Basic())
    with context():
        made = convert(model, rules=None)
    assert made.padfree_plan == convert(model, rules=None).padfree_plan
    assert all(p.requires_grad and p.device.type == "cpu" for p in made.parameters())
    made(images()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = Net(Basic())
    made = convert(model, rules=None)
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
    assert made(images().to("meta")).shape == (2, 16, 7, 7)


def test_a_root_that_looks_at_values_runs_on_real_tensors() -> None:
    class Looks(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.mean().item() > 1e9:
                return x
            return super().forward(x + torch.from_numpy(x.detach().numpy() * 0))

    model = Looks(Unit())
    before = snapshot(model)
    padfree.plan(model, input_size=(3, SIDE, SIDE))
    assert snapshot(model) == before
    made = convert(model).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_a_conv_that_keeps_its_settings_as_integers() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 1, 3, 3)), None
            self.stride, self.padding = 2, 1

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, None, self.stride, self.padding, 1, 8)

    unit = Unit()
    unit.conv = Own()  # type: ignore[assignment]
    made = convert(Net(unit)).eval()
    assert made.block.conv.padding == 0
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_other_input_sizes_than_the_recorded_one() -> None:
    made = convert(Net(Unit()), size=(3, SIDE, SIDE)).eval()
    for side in (3, 9, 40):
        x = images(side=side)
        assert_close(made(x), expected(made.block, made.stem(x)))
    with pytest.raises(RuntimeError):
        made(images(side=2))


def test_refusal_helper_sees_a_change() -> None:
    """The oracle itself: a refusal that leaves a mark is noticed."""

    class Marks(Unit):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return super().forward(x)

    model = Net(Marks())
    assert "writes its own attribute `last`" in refusal(model)
    before = snapshot(model)
    model.block.last = 1
    assert snapshot(model) != before


# -- lists, helpers, lengths that depend on values ------------------------------------------------


class Extends(Unit):
    """A feature pyramid's last level: it puts its map into the list it is given."""

    def forward(self, maps: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        maps.append(super().forward(maps[-1]))
        names.append("last")
        return maps, names


@pytest.mark.parametrize("reads", ["the result", "its own list"])
def test_a_block_that_changes_the_list_it_is_given(reads: str) -> None:
    class Pyramid(Net):
        def forward(self, x: Tensor) -> Tensor:
            maps, names = [self.stem(x)], ["first"]
            found, _ = self.block(maps, names)
            assert len(maps) == len(names) == 2 and found is maps
            return (found if reads == "the result" else maps)[-1]

    made = convert(Pyramid(Extends())).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))


def to_map(tokens: Tensor, sides: list[int]) -> Tensor:
    height, width = sides
    if height * width != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no {height}x{width} map")
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


class Tokens(Unit):
    def forward(self, tokens: Tensor, sides: list[int]) -> Tensor:
        return super().forward(to_map(tokens, sides))


def test_a_helper_function_that_cannot_be_traced_is_kept_whole() -> None:
    class Vision(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.block(x.flatten(2).transpose(1, 2), [*x.shape[2:]])

    made = convert(Vision(Tokens())).eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))
    with pytest.raises(ValueError, match="tokens are no"):
        made.block(torch.zeros(1, 12, 8), [3, 3])


def test_outputs_whose_length_depends_on_pixels() -> None:
    class Detector(Net):
        def forward(self, x: Tensor) -> list[Tensor]:
            scores = self.block(self.stem(x))
            return [image[torch.nonzero(image > 0.5, as_tuple=True)] for image in scores]

    model = Detector(Unit())
    assert len(model.eval()(images())[0]) != len(convert(model).eval()(images())[0])


def test_the_stem_behind_a_resized_batch_is_still_the_stem() -> None:
    class Resizes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.interpolate((x - 0.5) / 0.25, scale_factor=2.0, mode="bilinear")
            batch = x.new_full((len(x), 3, 80, 80), 0.0)
            batch[:, :, : x.shape[2], : x.shape[3]].copy_(x)
            return super().forward(batch)

    model = Resizes(Unit())
    model.stem = nn.Sequential(model.stem, nn.BatchNorm2d(8), nn.ReLU())  # type: ignore[assignment]
    plan = padfree.plan(model, input_size=(3, SIDE, SIDE))
    assert [match.rule for match in plan.matches if match.name.startswith("stem")] == ["stem"]


class StandardisedSame(nn.Conv2d):
    """SAME padding behind a flag, standardised weights."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.same = True

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            rest = max((-x.shape[-1] % self.stride[0]) + self.kernel_size[0] - self.stride[0], 0)
            x = F.pad(x, (rest // 2, rest - rest // 2) * 2)
        weight = (self.weight - self.weight.mean()) / (self.weight.std() + 1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_same_padded_projection() -> None:
    block = Basic()
    block.conv1 = StandardisedSame(8, 16, 3, 2, bias=False)
    block.down[0] = StandardisedSame(8, 16, 1, 2, bias=False)
    made = convert(Net(block), rules=("dense", "projection"))
    assert (block.down[0].stride, made.block.down[0].stride) == ((2, 2), (1, 1))
    assert made.block.conv1.same is False
    assert made(images()).shape[2:] == ((SIDE - 3) // 2 + 1,) * 2


def test_a_quantizable_model_is_a_float_model() -> None:
    class Quantizable(Net):
        def __init__(self, block: nn.Module) -> None:
            super().__init__(block)
            self.total = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.total.add_relu(y, y)

    made = convert(Quantizable(Unit())).eval()
    assert_close(made(images()), F.relu(2 * expected(made.block, made.stem(images()))))
