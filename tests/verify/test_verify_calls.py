"""Decisions on a map's size outside of what was rewritten: what a smaller map would change is given up, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import SIDE, Net, Unit, convert, images, refusal
from torch import Tensor, nn

import padfree


class Body(nn.Module):
    """A stem and a strided unit (16 -> 8, padding-free 7), then what a subclass makes of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net(Unit())
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(9)])
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).mean((2, 3))

    def head(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class AtLeast(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.a(y) if y.shape[-1] >= 8 else y


class Below(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.a(y) if min(y.shape[2:]) < 8 else y


class Equal(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.a(y) if y.shape[-2:] == (8, 8) else self.b(y)


class ByParity(Body):
    def head(self, y: Tensor) -> Tensor:
        return (self.a, self.b)[y.shape[-1] % 2](y)  # type: ignore[no-any-return]


class ByArea(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.a(y) if y.flatten(2).shape[-1] > 60 else y


class Indexed(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.layers[y.shape[-1]](y)  # type: ignore[no-any-return]


class Counted(Body):
    def head(self, y: Tensor) -> Tensor:
        for layer in self.layers[: y.shape[-1]]:
            y = layer(y)
        return y


class Repeats(Body):
    def head(self, y: Tensor) -> Tensor:
        side = y.shape[-1]
        while side > 2:
            y, side = self.a(y), side // 2
        return y if side % 2 else self.b(y)


class Reorders(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.b(self.a(y)) if y.shape[-1] >= 8 else self.a(self.b(y))


class FunctionFallsOut(Body):
    def head(self, y: Tensor) -> Tensor:
        return F.max_pool2d(y, 2) if y.shape[-1] % 2 == 0 else y


class FunctionComesIn(Body):
    def head(self, y: Tensor) -> Tensor:
        return y if y.shape[-1] >= 8 else y.sigmoid()


class Shuffles(Body):
    def head(self, y: Tensor) -> Tensor:
        return F.pixel_unshuffle(y, 2).relu() if y.shape[-1] % 2 == 0 else y.repeat(1, 4, 1, 1).relu()


class InTraining(Body):
    def head(self, y: Tensor) -> Tensor:
        return self.a(y) if self.training and y.shape[-1] >= 8 else y


class FunctionInTraining(Body):
    def head(self, y: Tensor) -> Tensor:
        return y * 2 if self.training and y.shape[-1] == 8 else y


class NoisyLeaf(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y.neg() if self.training and y.shape[-1] == 8 else y


class LeafInTraining(Body):
    def __init__(self) -> None:
        super().__init__()
        self.noise = NoisyLeaf()

    def head(self, y: Tensor) -> Tensor:
        return self.noise(y)  # type: ignore[no-any-return]


class LeafDecides(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y.relu() if y.shape[-1] > 7 else y


class InLeaf(Body):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = LeafDecides()

    def head(self, y: Tensor) -> Tensor:
        return self.leaf(y)  # type: ignore[no-any-return]


class InScript(Body):
    def __init__(self) -> None:
        super().__init__()
        self.scripted = nn.Sequential(torch.jit.script(LeafDecides()))

    def head(self, y: Tensor) -> Tensor:
        return self.scripted(y)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            AtLeast,
            "the model's own forward decides by a map's size what it runs: it would call `a` 0 times instead of 1",
        ),
        (Below, "it would call `a` 1 time instead of 0 times"),
        (Equal, "it would call `a` 0 times instead of 1 time"),
        (ByParity, "it would call `a` 0 times instead of 1 time"),
        (ByArea, "it would call `a` 0 times instead of 1 time"),
        (Indexed, "it would call `layers.8` 0 times instead of 1 time"),
        (Counted, "it would call `layers.7` 0 times instead of 1 time"),
        (Repeats, "it would call `b` 0 times instead of 1 time"),
        (Reorders, "in which order it runs what: `b` would run in the place of `a`"),
        (FunctionFallsOut, "it would run max_pool2d_with_indices 0 times instead of 1 time"),
        (FunctionComesIn, "it would run sigmoid 1 time instead of 0 times"),
        (Shuffles, "it would run pixel_unshuffle 0 times instead of 1 time"),
        (InTraining, "in train mode the model's own forward decides by a map's size what it runs: it would call `a` 0"),
        (FunctionInTraining, "in train mode the model's own forward decides"),
        (
            LeafInTraining,
            "in train mode the forward of `noise` decides by a map's size what it runs: it would run neg 0",
        ),
        (InScript, "the forward of `scripted` decides by a map's size what it runs: it would run relu 0 times"),
        (InLeaf, "the forward of `leaf` decides by a map's size what it runs: it would run relu 0 times"),
    ],
)
def test_a_decision_that_a_smaller_map_would_flip(kind: type[nn.Module], words: str) -> None:
    text = refusal(kind())
    assert words in text and "`body.block.conv`" in text


class Steady(Body):
    """The same decisions, which 7 and 8 pixels answer alike."""

    def head(self, y: Tensor) -> Tensor:
        y = self.a(y) if y.shape[-1] >= 7 else y
        y = self.layers[y.shape[-1] // 5](y)
        if self.training and y.shape[-1] > 2:
            y = self.drop(y)
        return y + 1 if y.numel() > 1 else y


class Scans(Body):
    """A recurrent layer has a step for each pixel: torch's own leaves may do as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def head(self, y: Tensor) -> Tensor:
        return self.rnn(y.flatten(2).transpose(1, 2))[0].transpose(1, 2).unsqueeze(-1)  # type: ignore[no-any-return]


class Mends(Body):
    """A crop and an interpolation back to a size that only the original needed are lost, and nothing else is."""

    def head(self, y: Tensor) -> Tensor:
        even = y if y.shape[-1] == 7 else F.interpolate(y, size=(7, 7))
        return even[..., :7, :7].reshape(len(y), 8, 7, 7)


class Draws(Body):
    """Layers dropped at random are the same ones in both networks."""

    def head(self, y: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()).item() < 0.5:
                y = layer(y)
        return y


@pytest.mark.parametrize("kind", [Steady, Scans, Mends, Draws])
def test_what_a_smaller_map_changes_in_no_way_that_matters(kind: type[nn.Module]) -> None:
    made = convert(kind().eval())
    assert made(images()).shape == (2, 8)


def test_only_the_domain_at_fault_is_given_up() -> None:
    class Twice(AtLeast):
        """32 -> 16 -> 8: where the first unit is converted, the second makes 8 of 15 as it stands."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Net(Unit()), Unit())

    plan = padfree.plan(Twice(), rules=["depthwise"], input_size=(3, 2 * SIDE, 2 * SIDE))
    assert [match.name for match in plan.matches] == ["body.0.block.conv"]
    assert [skip.name for skip in plan.skips] == ["body.1.conv"]
    assert "`a` 0 times" in plan.skips[0].reason


@torch.fx.wrap
def halved(y: Tensor) -> Tensor:
    return y.sigmoid() if y.shape[-1] >= 8 else y


class Wrapped(Unit):
    """A function that tracing does not look into decides within the rewritten forward."""

    def forward(self, x: Tensor) -> Tensor:
        return halved(self.act(self.bn(self.conv(x))))  # type: ignore[no-any-return]


def test_a_decision_within_a_rewritten_forward() -> None:
    assert "it would run sigmoid 0 times instead of 1 time" in refusal(Net(Wrapped()))


class PadsAndPools(nn.Module):
    """A rewritten forward may lose its pads and pools and win a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.conv, self.pool = nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, 2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.conv(self.pad(x)) + self.pool(x))


def test_what_a_rewrite_changes_itself_is_no_decision() -> None:
    made = convert(Net(PadsAndPools()), rules=("dense", "projection"))
    assert made(images()).shape == (2, 8, 7, 7)
