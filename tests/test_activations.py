"""Activations with a class of their own: which of them are part of the one pass."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from padfree import onepass
from tests.test_onepass import built, chain, passes

CLOSE = {"rtol": 1e-5, "atol": 3e-5}
SLOPE = 0.0


def act_of(forward):
    return type("Act", (nn.Module,), {"forward": forward})().eval()


def helper(x):
    return F.relu(x)


def leaking(self, x):
    return F.relu(x) if self.training or SLOPE == 0 else x


UNDERSTOOD = {
    "relu": act_of(lambda self, x: F.relu(x)),
    "torch.relu": act_of(lambda self, x: torch.relu(x)),
    "in place": act_of(lambda self, x: nn.functional.silu(x, inplace=True)),
    "gelu by tanh": act_of(lambda self, x: torch.nn.functional.gelu(x, approximate="tanh")),
    "timm's gelu": timm.layers.get_act_layer("gelu")(),
    "timm's gelu by tanh": timm.layers.get_act_layer("gelu_tanh")(),
}
CALLED = {
    "twice as much": act_of(lambda self, x: F.relu(x) * 2),
    "of a sum": act_of(lambda self, x: F.relu(x + 1)),
    "two functions": act_of(lambda self, x: F.gelu(F.relu(x))),
    "by the size": act_of(lambda self, x: F.relu(x) if x.shape[-1] < 5 else x),
    "by an attribute": act_of(lambda self, x: F.relu(x) if self.training else F.silu(x)),
    "by a global": act_of(leaking),
    "by a helper": act_of(lambda self, x: helper(x)),
    "a method": act_of(lambda self, x: x.relu()),
    "another function": act_of(lambda self, x: F.mish(x)),
    "of two things": act_of(lambda self, x, y=1: F.relu(x) * y),
    "nothing": act_of(lambda self, x: x),
}


@built
@pytest.mark.parametrize("name", UNDERSTOOD | CALLED)
def test_activations_of_ones_own(name):
    act = (UNDERSTOOD | CALLED)[name]
    conv, norm, _ = chain(8, 3, 2, 0)
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = onepass.downsample(x, 3, 0, (conv, norm, act))
        assert_close(found, act(norm(conv(x))) + F.max_pool2d(x, 3, 2), **CLOSE)
    assert seen == ["AFTER_ACTIVATION" if name in UNDERSTOOD else "BESIDE"]


@built
def test_an_activation_that_becomes_another():
    act = act_of(lambda self, x: F.relu(x))
    conv, norm, _ = chain(8, 3, 2, 0)
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        onepass.downsample(x, 3, 0, (conv, norm, act))
        type(act).forward = lambda self, x: F.gelu(x) * 3
        found = onepass.downsample(x, 3, 0, (conv, norm, act))
        assert_close(found, act(norm(conv(x))) + F.max_pool2d(x, 3, 2), **CLOSE)
    assert seen == ["AFTER_ACTIVATION", "BESIDE"]
