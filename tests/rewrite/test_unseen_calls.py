"""How calls that no operation shows are seen while a forward is traced: nothing of torch or the user is touched."""

from __future__ import annotations

import cProfile
import pstats
import sys
import threading
from typing import Any

import pytest
import torch
import torchvision
from strangers import Net, Unit, convert, depthwise
from torch import Tensor, nn

from padfree.rewrite.unseen import noting_unseen

USUAL = (torch.is_grad_enabled, torch.is_autocast_enabled, vars(torch.autocast)["__enter__"])


class Looks(Unit):
    def forward(self, x: Tensor) -> Tensor:
        same = (torch.is_grad_enabled, torch.is_autocast_enabled, vars(torch.autocast)["__enter__"]) == USUAL
        return self.act(self.bn(self.conv(x))) if same else x


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def enters(context: Any) -> None:
    with context:
        pass


CALLS = {
    "autocast": lambda: enters(torch.autocast("cpu")),
    "kept for the backward": lambda: enters(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "profiler": lambda: enters(torch.profiler.record_function("here")),
    "autograd function": lambda: Square.apply(torch.ones(1)),
    "gradients are on": torch.is_grad_enabled,
    "inference mode is on": torch.is_inference_mode_enabled,
    "autocast is on": torch.is_autocast_enabled,
    "autocast's dtype": lambda: torch.get_autocast_dtype("cpu"),
    "it is traced": lambda: torch.jit.is_tracing(),
    "it is compiled": lambda: torch.compiler.is_compiling(),
    "it is exported": lambda: torch.onnx.is_in_onnx_export(),
    "algorithms are deterministic": lambda: torch.are_deterministic_algorithms_enabled(),
}


@pytest.mark.parametrize("words", CALLS)
def test_calls_are_noted(words: str) -> None:
    with noting_unseen() as noted:
        CALLS[words]()
    assert any(words in note for note in noted)
    with noting_unseen() as noted:
        thread = threading.Thread(target=CALLS[words])
        thread.start()
        thread.join()
    assert not noted


def test_what_libraries_ask_for_themselves_is_no_matter() -> None:
    x = torch.ones(1, 1, 4, 4)
    with noting_unseen() as noted:
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        torchvision.ops.stochastic_depth(x, 0.0, "row")
        torch.jit.is_scripting()
    assert not noted


def test_torch_is_what_it_is() -> None:
    made: Any = convert(Net(Looks()))
    assert made.block.conv.padding == (0, 0)


def test_profilers_go_on() -> None:
    seen: list[str] = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        with noting_unseen():
            pass
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    profile = cProfile.Profile()
    profile.enable()
    convert(Net(Unit()))
    profile.disable()
    assert pstats.Stats(profile).total_calls > 0


def test_modes_are_not_switched_while_matching() -> None:
    calls: list[bool] = []

    class Drop(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            calls.append(mode)
            return super().train(mode)

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(Drop(0.5), depthwise(), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x)

    net = Net(Dropped())
    calls.clear()
    convert(net)
    assert not calls
