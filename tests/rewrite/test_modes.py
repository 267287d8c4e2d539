"""Forwards that ask for the mode they run in: both bodies are kept, and both get the shortcut."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, Unit, convert, images, refusal
from torch import Tensor, nn
from torch.testing import assert_close


class Dropped(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.act(self.bn(self.conv(x))), 1.0, self.training)


class DroppedInside(Unit):
    """The dropout acts between the norm and the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.dropout(self.bn(self.conv(x)), 1.0, training=self.training))


class DroppedBefore(Unit):
    """The conv and so the pool read what the dropout leaves."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(F.dropout(x, 1.0, self.training))))


class DroppedBeforeByIf(Unit):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 0
        return self.act(self.bn(self.conv(x)))


class Depth(Unit):
    """Stochastic depth that always drops."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        if self.training:
            y = y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.0)
        return y


class ByChild(Unit):
    """`drop` is never called; its rate and mode are what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.act(self.bn(self.conv(x))), 1.0, self.drop.training)


class ByBoth(ByChild):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return F.dropout(y, 1.0, self.drop.training) + (1 if self.training else 0)


class Auxiliary(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn(self.conv(x)))
        return (y, self.head(F.relu(y - 1))) if self.training else y


class OtherPath(Unit):
    """In training something else is done to the same conv: no place for one sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            return self.bn(self.act(y)) * y.sigmoid()
        return self.act(self.bn(y))


def pooled(made: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what the block reads, norm of its conv, pool beside it), in the model's mode."""
    x = made.stem(x)
    y = F.conv2d(x, made.block.conv.weight, made.block.conv.bias, 2, 0, 1, 8)
    return x, made.block.bn(y), F.max_pool2d(x, 3, 2)


def expected(kind: type, made: Any, x: Tensor, training: bool) -> Any:
    x, y, pool = pooled(made, x)
    if not training:
        return F.relu(y) + pool
    if kind is DroppedInside:
        return pool
    if kind in (DroppedBefore, DroppedBeforeByIf):
        conv, bn = made.block.conv, made.block.bn
        return F.relu(bn(F.conv2d(x * 0, conv.weight, conv.bias, 2, 0, 1, 8)))
    if kind is Auxiliary:
        z = F.relu(y) + pool
        return z, made.block.head(F.relu(z - 1))
    return torch.zeros_like(pool) + (1 if kind is ByBoth else 0)


KINDS = [Dropped, DroppedInside, DroppedBefore, DroppedBeforeByIf, Depth, ByChild, ByBoth, Auxiliary]


def summed_inside(kind: type) -> bool:
    """Whether the sum comes before what the mode decides on."""
    return kind in (Dropped, Depth, ByChild, ByBoth)


@pytest.mark.parametrize("kind", KINDS)
def test_both_bodies_have_the_shortcut(kind: type) -> None:
    made = convert(Net(kind()))
    for twin in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        for training in (True, False, True):
            twin.train(training)
            wanted = expected(kind, copy.deepcopy(twin), images(), training)
            if training and summed_inside(kind):  # what drops takes the sum or only the activation along
                found = twin(images()) - wanted
                pool = pooled(copy.deepcopy(twin), images())[2]
                assert not found.any() or torch.allclose(found, pool)
            else:
                assert_close(twin(images()), wanted)


@pytest.mark.parametrize("kind", [ByChild, ByBoth])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("child", [True, False])
def test_flags_are_asked_one_by_one(kind: type, own: bool, child: bool) -> None:
    made: Any = convert(Net(kind())).eval()
    kept = made(images())
    made.block.training, made.block.drop.training = own, child
    dropped = made(images()) - (1 if own and kind is ByBoth else 0)
    pool = pooled(made, images())[2]
    if not child:
        assert_close(dropped, kept)
    else:
        assert not dropped.any() or torch.allclose(dropped, pool)


def test_a_flag_of_a_child_with_a_number_for_a_name() -> None:
    class Numbered(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.drops = nn.Sequential(nn.Dropout(1.0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.bn(self.conv(x)))
            return y * 0 - 1 if self.drops[0].training else y

    made: Any = convert(Net(Numbered())).eval()
    kept = made(images())
    made.block.drops.train()
    assert (made(images()) - kept).abs().max() > 0.5
    made.block.drops.eval()
    made.block.training = True
    assert_close(made(images()), kept)


class Tutorial(nn.Module):
    """Everything in the root's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.b0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dw, self.b1 = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b1(self.dw(F.relu(self.b0(self.c0(x))))))
        x = F.dropout(x, 0.5, self.training)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_compilers_of_a_forward_with_two_bodies() -> None:
    made = convert(Tutorial()).eval()
    wanted = made(images())
    assert_close(torch.jit.script(made)(images()), wanted)
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(images()), wanted)
    assert_close(torch.export.export(made, (images(),)).module()(images()), wanted)
    made.train()
    scripted = torch.jit.script(made)
    assert not torch.equal(scripted(images()), scripted(images()))


def test_what_has_no_place_in_training_is_refused() -> None:
    assert "does something else in training" in refusal(Net(OtherPath()))
