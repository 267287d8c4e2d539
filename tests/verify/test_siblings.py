"""Methods beside forward: those that agree with it stay, those that no longer do raise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.errors import SiblingError
from padfree.record.recording import record
from padfree.rules._toys import unit
from padfree.verify.siblings import disagreeing

SIZE = (3, 32, 32)


class Block(nn.Module):
    """A strided block, two of whose methods run its layers past its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.conv(x)))
        return out

    def forward_tap(self, x: Tensor) -> Tensor:
        """What its norm reads."""
        out: Tensor = self.act(self.conv(x))
        return out

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Something that its forward does not compute, made of what its norm reads."""
        return self.forward_tap(x).mean((2, 3))


class Network(nn.Module):
    """Stem, a strided block, head; with methods beside forward as timm's networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.stem(x))
        return out

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Agreeing(Network):
    """The same layers in turn."""

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        stem = self.stem(x)
        out = self.block(stem)
        return out, [stem, out]


class Layers(Network):
    """The parts of the block, not the block."""

    def forward_intermediates(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        out: Tensor = self.block.norm(self.block.act(self.block.conv(stem)))
        return out


class Sized(Network):
    """It works out the sides that the block gave."""

    def forward_intermediates(self, x: Tensor) -> Tensor:
        tokens = self.block(self.stem(x)).flatten(2)
        return tokens.reshape(x.shape[0], 8, x.shape[2] // 2, x.shape[3] // 2)


class Shaped(Network):
    """It works out one side, and the channels take what is left."""

    def get_intermediate_layers(self, x: Tensor) -> list[Tensor]:
        out = self.block(self.stem(x))
        rows = 8 if out.shape[-1] == 16 else 225
        return [out.reshape(x.shape[0], rows, 8, -1)]


class Headed(Network):
    """The head pools by the map's size as it was."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(2)[:, :, :256].sum(2) / 256)
        return out


class Training(Network):
    """It takes something else than images."""

    def forward_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), labels)


def converted(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return padfree.convert(kind().eval(), input_size=SIZE)


@pytest.mark.parametrize("kind", [Network, Agreeing, Training])
def test_methods_that_agree_stay(kind: type[Network]) -> None:
    model = converted(kind)
    x = torch.randn(1, *SIZE)
    features = model.forward_features(x)
    assert features.shape[-1] == 15
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    if kind is Agreeing:
        out, (stem, last) = model.forward_intermediates(x)
        torch.testing.assert_close(out, features, rtol=0, atol=0)
        assert stem.shape[-1] == 32 and last is out
    if kind is Training:
        assert model.forward_loss(x, torch.tensor([1])).shape == ()


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        (Layers, "forward_intermediates", "tensor 0 that it returns is not what the forward has there"),
        (Sized, "forward_intermediates", "it fails with RuntimeError: shape '[1, 8, 16, 16]' is invalid"),
        (Network, "block.forward_tap", "tensor 0 that it returns is not what the forward has there"),
        (Network, "block.forward_pooled", "tensor 0 that it returns is made of other values than the forward's"),
    ],
)
def test_methods_that_differ_raise(kind: type[Network], method: str, why: str) -> None:
    model = converted(kind)
    x = torch.randn(1, *SIZE)
    path, _, name = method.rpartition(".")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(each, kind)
        torch.testing.assert_close(each(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(each.forward_features(x).mean((2, 3)), model.forward_features(x).mean((2, 3)))
        given = x if not path else model.stem(x)
        with pytest.raises(SiblingError, match="does not agree with the converted forward") as caught:
            getattr(each.get_submodule(path), name)(given)
        assert why in str(caught.value) and "convert a network whose forward is what you need" in str(caught.value)


def test_the_original_and_its_class_keep_their_methods() -> None:
    torch.manual_seed(0)
    model = Sized().eval()
    padfree.convert(model, input_size=SIZE)
    x = torch.randn(1, *SIZE)
    torch.testing.assert_close(model.forward_intermediates(x), model.forward_features(x), rtol=0, atol=0)
    assert type(model) is Sized


def test_a_plan_and_a_second_conversion_let_the_same_methods_raise() -> None:
    torch.manual_seed(0)
    plan = padfree.plan(Sized().eval(), include=["block"], input_size=SIZE)
    first = plan.apply(Sized().eval())
    second = padfree.convert(first, input_size=SIZE)
    assert second.padfree_plan.earlier == plan
    for model in (first, second, plan.apply(Sized())):
        with pytest.raises(SiblingError, match="forward_intermediates"):
            model.forward_intermediates(torch.randn(1, *SIZE))
        model.forward_features(torch.randn(1, *SIZE))


def test_a_side_worked_out_wrongly_shows_in_the_channels() -> None:
    """One side is what it was, and a free axis takes what is left."""
    model = Shaped().eval()
    with pytest.raises(SiblingError, match=r"would be of shape \(1, 225, 8, 1\) instead of \(1, 8, 8, 32\)"):
        padfree.convert(model, input_size=SIZE).get_intermediate_layers(torch.randn(1, *SIZE))  # type: ignore[operator]


def test_a_head_alone_is_compared_behind_the_features() -> None:
    recording = record(Headed().eval(), SIZE)
    assert disagreeing(recording, Headed().eval().to("meta")) == ()


ACTED: list[str] = []


class Embedding(Block):
    """Methods of any name that run the layers of a forward anew; only parts of them may be asked for."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.conv(x)))
        return out * 2

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.conv(x)))
        return out

    def energy(self, x: Tensor) -> Tensor:
        return torch.relu(self.act(self.conv(x))).square()

    def normalise(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def learn(self, x: Tensor) -> Tensor:
        ACTED.append("learn")
        out: Tensor = self.norm(self.act(self.conv(x)))
        out.sum().backward()
        return out

    def noise(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.randn_like(x)) + torch.rand(1)
        return out

    def weigh(self) -> Tensor:
        return self.conv.weight.square().sum()

    def score(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(x), labels)

    @property
    def width(self) -> int:
        return self.conv.out_channels


class Embedded(Network):
    def __init__(self) -> None:
        super().__init__()
        self.block = Embedding()


def test_methods_of_any_name_over_the_children_of_a_rewritten_block() -> None:
    model = Embedded().eval()
    state = torch.get_rng_state()
    plan = padfree.plan(model, input_size=SIZE)
    assert torch.equal(state, torch.get_rng_state()) and not ACTED
    made: Any = plan.apply(model).eval()
    block, x = made.block, torch.randn(2, 8, 32, 32)
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        for name in ("embed", "energy"):
            with pytest.raises(SiblingError, match=name):
                getattr(twin, name)(x)
        assert twin.width == 8 and twin.weigh() > 0 and twin.score(x, twin(x)) == 0
        assert torch.equal(twin.normalise(x), twin.norm(x))
    plain = Embedding().eval()
    assert torch.equal(plain.embed(x) * 2, plain(x))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.dw, self.norm = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 4)

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.point(torch.relu(self.norm(self.dw(self.stem(x)))))
        return out

    def classify(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.point(torch.relu(self.norm(self.dw(self.stem(x))))).mean((2, 3)))
        return out


@pytest.mark.parametrize("first", [False, True])
def test_a_fused_network_has_no_methods_over_layers_that_are_gone(first: bool) -> None:
    x = torch.randn(2, *SIZE)
    made: Any = converted(Strided).eval() if first else Strided().eval()
    fused = padfree.fuse(made, input_size=SIZE)
    wanted = made(x)
    for twin in (fused, pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), wanted)
        if first:
            with pytest.raises(SiblingError, match="embed"):
                twin.embed(x)
        else:
            torch.testing.assert_close(twin.classify(twin.embed(x).mean((2, 3))), wanted)
        assert twin.classify(torch.ones(1, 16)).shape == (1, 4)


class Positioned(Block):
    """A convolution of the forward reads nothing that is made of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(1, 8, 1)
        self.register_buffer("place", torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.encode(self.place)

    def forward_whole(self, x: Tensor) -> Tensor:
        return self(x)


def test_a_convolution_of_no_image_has_no_pool_beside_it() -> None:
    model: Any = Network()
    model.block = Positioned()
    made: Any = padfree.convert(model, input_size=SIZE).eval()
    x = torch.randn(2, 8, 32, 32)
    assert made.block(x).shape == (2, 8, 15, 15)
    with pytest.raises(SiblingError, match="forward_tap"):
        made.block.forward_tap(x)
    assert torch.equal(made.block.forward_whole(x), made.block(x))
