"""Children are set anew after the conversion, where a layer of the conversion would be lost or be unlike them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import padfree
from padfree.errors import LockedStateError
from padfree.layers.stem import StemTail

SIZE = (3, 32, 32)


class Net(nn.Module):
    """A stem whose max-pool the hybrid tail takes the place of; its activations are made like `act1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maxpool(self.act1(self.bn1(self.conv1(x)))))


class Keyed(nn.Module):
    """The same in a container that the forward takes apart."""

    def __init__(self, container: Callable[[dict[str, nn.Module]], nn.Module]) -> None:
        super().__init__()
        self.layers = container(dict(Net().named_children()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x


class NormAct(nn.Module):
    """A depthwise chain whose activation is part of the norm, and moved out of it by merge="norm"."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), timm.layers.BatchNormAct2d(8)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.stem(x))) * self.scale


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return padfree.convert(model, input_size=SIZE, **settings).eval()


def moved() -> nn.Module:
    return converted(NormAct(), rules=("depthwise",), options=padfree.Options(merge="norm"))


WAYS: dict[str, Callable[[nn.Module, str, nn.Module], Any]] = {
    "assigned": setattr,
    "added": lambda module, name, value: module.add_module(name, value),
    "registered": lambda module, name, value: module.register_module(name, value),
    "by path": lambda module, name, value: module.set_submodule(name, value),
    "deleted": lambda module, name, value: delattr(module, name),
    "None": lambda module, name, value: setattr(module, name, None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: converted(Net()), "maxpool"),  # the tail's place
        (lambda: converted(Net()), "act1"),  # the tail's activations are like it
        (moved, "bn.act"),  # moved behind the sum
        (moved, "bn"),  # whose activation that was
    ],
)
def test_it_is_refused(make: Callable[[], nn.Module], path: str, way: str) -> None:
    model = make()
    holder, _, name = path.rpartition(".")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = dict(each.named_modules())
        with pytest.raises(LockedStateError, match="original model and convert again"):
            WAYS[way](each.get_submodule(holder), name, nn.SiLU())
        assert dict(each.named_modules()) == before


@pytest.mark.parametrize(
    ("container", "way"),
    [
        (lambda layers: nn.Sequential(*layers.values()), lambda layers: layers.__setitem__(3, nn.Identity())),
        (lambda layers: nn.Sequential(*layers.values()), lambda layers: layers.__setitem__(-2, nn.Identity())),
        (lambda layers: nn.ModuleList(layers.values()), lambda layers: layers.__setitem__(3, nn.Identity())),
        (lambda layers: nn.ModuleList(layers.values()), lambda layers: layers.__delitem__(3)),
        (nn.ModuleDict, lambda layers: layers.__setitem__("maxpool", nn.Identity())),
        (nn.ModuleDict, lambda layers: layers.update({"act1": nn.SiLU()})),
        (nn.ModuleDict, lambda layers: layers.pop("maxpool")),
        (nn.ModuleDict, lambda layers: layers.clear()),
    ],
)
def test_it_is_refused_in_containers(
    container: Callable[[dict[str, nn.Module]], nn.Module], way: Callable[[Any], Any]
) -> None:
    model = converted(Keyed(container))
    before = dict(model.named_modules())
    with pytest.raises(LockedStateError, match="original model and convert again"):
        way(model.layers)
    assert dict(model.named_modules()) == before


class Wrapper(nn.Module):
    """What a library puts around layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    "other",
    [
        lambda child: child,
        copy.deepcopy,
        Wrapper,
        lambda child: torch.compile(child, backend="eager"),
        lambda child: Wrapper(nn.Sequential(copy.deepcopy(child))),
    ],
)
@pytest.mark.parametrize("make", [lambda: converted(Net()), moved])
def test_the_same_is_set_again(make: Callable[[], nn.Module], other: Callable[[nn.Module], nn.Module]) -> None:
    model, x = make(), torch.randn(2, *SIZE)
    expected = model(x)

    def again(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if not isinstance(module, StemTail):
                again(child)
                setattr(module, name, other(child))

    again(model)
    with torch.no_grad():
        assert_close(model(x), expected)


def test_an_activation_like_it_is_set() -> None:
    model, x = converted(Net()), torch.randn(2, *SIZE)
    expected = model(x)
    model.act1 = nn.ReLU()
    assert_close(model(x), expected, rtol=0, atol=0)


def test_everything_else_is_set() -> None:
    model = converted(Net())
    model.head, model.factor = nn.Conv2d(8, 2, 1), 3
    del model.head
    model.head = model.extra = nn.Identity()
    assert model(torch.randn(2, *SIZE)).shape[1] == 8


def test_converted_again_it_still_is_refused() -> None:
    model = padfree.convert(converted(NormAct(), rules=("stem",)), input_size=SIZE, rules=("depthwise",))
    again = padfree.convert(converted(Net()), input_size=SIZE)
    with pytest.raises(LockedStateError):
        again.maxpool = nn.Identity()
    assert isinstance(model, NormAct)


def test_classes_stay_what_they_are_to_others() -> None:
    model = converted(Net())
    assert isinstance(model, Net) and type(model).__name__ == "Net" and type(model).__module__ == Net.__module__
    x = torch.randn(2, *SIZE)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert_close(torch.jit.script(model)(x), model(x))


def test_another_forward_of_the_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = moved(), torch.randn(2, *SIZE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(x)
    assert_close(compiled(x), expected)
    own = NormAct.forward
    monkeypatch.setattr(NormAct, "forward", lambda self, x: own(self, x) * 3)
    for run in (model, compiled):
        with pytest.raises(Exception, match="forward is another function"):  # torch.compile raises one of its own
            run(x)
    new = moved()
    new.load_state_dict(model.state_dict())
    assert_close(new(x), expected * 3)  # of the new one
    monkeypatch.setattr(NormAct, "forward", own)
    assert_close(model(x), expected)
    with pytest.raises(LockedStateError):
        new(x)


class Other(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_its_class_is_set_to_one_with_the_forward_only() -> None:
    model, x = moved(), torch.randn(2, *SIZE)
    expected, kind = model(x), type(model)
    with pytest.raises(LockedStateError, match="original model and convert again"):
        model.__class__ = Other
    model.__class__ = type("Sharded", (kind,), {})  # as FSDP does
    assert_close(model(x), expected)
    model.__class__ = kind
    parametrize.register_parametrization(model, "scale", nn.Identity())
    assert_close(model(x), expected)
    parametrize.remove_parametrizations(model, "scale")
    assert type(model) is kind
