"""Projection shortcuts in the one pass: a strided depthwise convolution and the 1x1 convolution that follows it."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

import padfree
from tests.strangers import Basic, Net, depthwise
from tests.test_onepass import LAYOUTS, built, modules_only, passes
from tests.test_pointwise import FAR
from tests.test_sequence import expected_of, image, lively

pytestmark = built
NETWORKS = {
    "ghostnet": (lambda: timm.create_model("ghostnet_050"), 64, 3),
    "resnet": (torchvision.models.resnet18, 64, 3),
    "basic": (lambda: Net(Basic()), 32, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, layout):
    torch.manual_seed(0)
    build, side, count = NETWORKS[name]
    model = lively(padfree.convert(build(), input_size=(3, side, side))).to(memory_format=layout)
    x = image(side, layout=layout)
    with torch.no_grad(), passes(lambda merge, leads, mixed: (merge.name, mixed)) as seen:
        found = model(x)
    assert seen.count(("BESIDE", True)) == count + 1  # and the stem's tail
    expected = expected_of(model, x)
    assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class GhostLike(nn.Module):
    """A shortcut as GhostNet writes it: a depthwise and a 1x1 convolution in one Sequential."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = depthwise(), nn.BatchNorm2d(8)
        self.down = nn.Sequential(depthwise(bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.down(x)
        return y


def plus_one(module, inputs, output):
    return output + 1


CHANGES = {
    "none": lambda m: None,
    "a hook on the shortcut": lambda m: m.down.register_forward_hook(plus_one),
    "a pre-hook on it": lambda m: m.down.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "a hook on a convolution": lambda m: m.down[0].register_forward_hook(plus_one),
    "a hook on the last norm": lambda m: m.down[-1].register_forward_hook(plus_one),
    "a norm in training": lambda m: m.down[1].train(),
    "another norm": lambda m: m.down.__setitem__(1, nn.Identity()),
    "statistics in place": lambda m: m.down[-1].running_mean.add_(1),
    "no shortcut": lambda m: setattr(m, "down", nn.AvgPool2d(3, 2)),
}
REDUCTION = {
    "none": lambda m: None,
    "a hook": lambda m: m.padfree_reduce.register_forward_hook(plus_one),
    "a hook on its norm": lambda m: m.padfree_reduce.norm.register_forward_hook(plus_one),
    "a hook behind it": lambda m: m.down.register_forward_hook(plus_one),
    "a hook further behind": lambda m: m.down[1].register_forward_hook(plus_one),
    "another norm": lambda m: setattr(m.padfree_reduce, "norm", nn.Identity()),
}


@pytest.mark.parametrize("again", [False, True], ids=["before", "after a first call"])
@pytest.mark.parametrize(
    ("kind", "change"), [*((GhostLike, change) for change in CHANGES), *((Basic, change) for change in REDUCTION)]
)
def test_a_change_is_seen(kind, change, again):
    torch.manual_seed(0)
    model = lively(padfree.convert(Net(kind()), input_size=(3, 32, 32)))
    twin, x = copy.deepcopy(model), torch.randn(2, 8, 32, 32)
    with torch.no_grad(), passes() as seen:
        if again:
            model.block(x)
            assert "MIXED" in seen
        for net in (model, twin):
            (CHANGES if kind is GhostLike else REDUCTION)[change](net.block)
        found = model.block(x)
        with modules_only():
            assert_close(found, twin.block(x), **FAR)


def test_a_reduction_is_a_sequential_with_the_old_keys():
    model = padfree.convert(Net(Basic()), input_size=(3, 32, 32))
    reduction = model.block.padfree_reduce
    assert isinstance(reduction, nn.Sequential)
    assert [name for name, _ in reduction.named_parameters()] == ["conv.weight", "norm.weight", "norm.bias"]
