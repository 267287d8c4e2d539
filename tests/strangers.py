"""Small networks as a stranger writes them, and what their padding-free form computes, by hand.

`Unit` and `Net` live in a module so that whole models can be pickled. The oracles use nothing of padfree.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree

SIDE = 16
Function = Callable[[Tensor], Tensor]


def depthwise(channels: int = 8, kernel: int = 3, multiplier: int = 1, **settings: Any) -> nn.Conv2d:
    """A stride-2 depthwise conv with the usual padding."""
    settings = {"stride": 2, "padding": kernel // 2, **settings}
    return nn.Conv2d(channels, channels * multiplier, kernel, groups=channels, **settings)


class Unit(nn.Module):
    """conv -> norm -> act; subclasses write other forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise()
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Basic(nn.Module):
    """A residual block with in-place operations and a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return F.relu_(y)


class Net(nn.Module):
    """A stride-1 stem conv and one block."""

    def __init__(self, block: nn.Module, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(self.stem(x))


class Fusable(Unit):
    """A unit that can fold its norm, and so would lose a shortcut."""

    def fuse(self) -> None:
        self.conv, self.bn = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def images(count: int = 2, side: int = SIDE, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(7))


def convert(model: nn.Module, *, rules: Any = ("depthwise",), size: Any = None, **settings: Any) -> nn.Module:
    return padfree.convert(model, rules=rules, input_size=size or (3, SIDE, SIDE), **settings)


def expected(unit: Any, x: Tensor, act: Function | None = F.relu, kernel: int = 3) -> Tensor:
    """act(norm(conv without its padding)) + max-pool, from the parameters of `unit` (`act` None: its own)."""
    conv = unit.conv
    y = F.conv2d(x, conv.weight, conv.bias, 2, (kernel - 3) // 2, 1, x.shape[1])
    return (act or unit.act)(unit.bn(y)) + F.max_pool2d(x, 3, 2)


def check(block: nn.Module, act: Function | None = F.relu, **settings: Any) -> nn.Module:
    """Convert `Net(block)`, compare values, gradients and statistics with the closed form, return it."""
    made = convert(Net(block).train(), **settings)
    kernel = block.conv.kernel_size[0]  # type: ignore[union-attr,index]
    x = images()
    for training in (True, False):
        made.train(training)
        twin = copy.deepcopy(made)
        found = first(made(x))
        wanted = expected(twin.block, twin.stem(x), act, kernel)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(dict(made.named_buffers()), dict(twin.named_buffers()))
        if training:
            made.zero_grad()
            found.square().sum().backward()
            wanted.square().sum().backward()
            grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (made, twin)]
            assert {"stem.weight", "block.conv.weight"} <= set(grads[0]) == set(grads[1])
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
            made.zero_grad()
    return made


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, and the random generators, that padfree must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "classes": [(name, type(module)) for name, module in modules],
        "ids": [id(module) for _, module in modules] + [id(tensor) for _, tensor in tensors],
        "training": [module.training for _, module in modules],
        "hooks": [[list(getattr(module, name).items()) for name in hooks] for _, module in modules],
        "plain": [sorted(module.__dict__) for _, module in modules],
        "settings": [
            [getattr(module, name, None) for name in ("stride", "padding", "kernel_size")] for _, module in modules
        ],
        "grad": [(name, tensor.requires_grad, tensor.grad is None) for name, tensor in tensors],
        "bits": [tensor.detach().clone().view(torch.uint8).tolist() for _, tensor in tensors if tensor.dim()],
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


def refusal(model: nn.Module, **settings: Any) -> str:
    """The text with which `convert` refuses; the model must come out as it went in."""
    before = snapshot(model)
    try:
        convert(model, **settings)
    except padfree.PadfreeError as error:
        assert snapshot(model) == before
        return str(error)
    raise AssertionError("converted, where a refusal was expected")
