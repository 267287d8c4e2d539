"""Linear branches of one map: one convolution in the fused network, with the shortcut of the padding-free form kept."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import padfree
from tests.deploy.lived import drawn


class Branch(nn.Sequential):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=None, groups=1):
        padding = kernel // 2 if padding is None else padding
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class Summed(nn.Module):
    """Branches of one map and their sum."""

    def __init__(self, *branches, crop=0, norm=None, begin=None):
        super().__init__()
        self.branches, self.norm = nn.ModuleList(branches), norm
        self.crop, self.begin = crop, begin

    def forward(self, x):
        total = 0 if self.begin == 0 else None
        for index, branch in enumerate(self.branches):
            y = branch(x[:, :, self.crop : -self.crop, self.crop : -self.crop] if self.crop and index else x)
            total = y if total is None else total + y
        return F.relu(total if self.norm is None else self.norm(total))


def convs(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def assert_same(model, fused, side=9):
    x = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


MERGED = {  # what builds the branches of 4 channels, and the kernel and padding of the one convolution
    "RepVGG": (lambda: Summed(Branch(4, 4, 3), Branch(4, 4, 1), nn.BatchNorm2d(4)), 3, 1),
    "more channels": (lambda: Summed(Branch(4, 6, 3), Branch(4, 6, 1)), 3, 1),
    "strided": (lambda: Summed(Branch(4, 6, 3, 2), Branch(4, 6, 1, 2)), 3, 1),
    "padding-free": (lambda: Summed(Branch(4, 6, 3, 2, 0), Branch(4, 6, 1, 2), crop=1), 3, 0),
    "padding-free 5x5": (lambda: Summed(Branch(4, 4, 5, 2, 1), Branch(4, 4, 1, 2), crop=1), 5, 1),
    "depthwise": (lambda: Summed(Branch(4, 4, 5, groups=4), Branch(4, 4, 3, groups=4), nn.Identity()), 5, 2),
    "grouped": (lambda: Summed(Branch(4, 4, 3, groups=2), Branch(4, 4, 1, groups=2), nn.BatchNorm2d(4)), 3, 1),
    "begun at 0": (lambda: Summed(Branch(4, 4, 1), Branch(4, 4, 1), begin=0), 1, 0),
    "a norm behind": (lambda: Summed(Branch(4, 4, 3), nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), 3, 1),
    "identity alone beside": (lambda: Summed(Branch(4, 4, 3), nn.Identity()), 3, 1),
}


@pytest.mark.parametrize("name", MERGED)
def test_branches_become_one_convolution(name):
    build, kernel, padding = MERGED[name]
    model = drawn(nn.Sequential(build()))
    fused = padfree.fuse(model, input_size=(4, 9, 9))
    (conv,) = convs(fused)
    assert (conv.kernel_size, conv.padding) == ((kernel, kernel), (padding, padding))
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = sum(p.numel() for p in fused.parameters())
    assert parameters == conv.weight.numel() + conv.bias.numel()
    for side in (9, 10, 13):
        assert_same(model, fused, side)


def test_the_merged_weight_is_the_sum():
    """A 3x3 convolution, a 1x1 one and the identity, without norms: read off by hand."""
    model = nn.Sequential(Summed(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Identity())).eval()
    (conv,) = convs(padfree.fuse(model, input_size=(4, 9, 9)))
    large, small, _ = model[0].branches
    expected = large.weight.detach().clone()
    expected[:, :, 1, 1] += small.weight.detach()[:, :, 0, 0] + torch.eye(4)
    assert_close(conv.weight, expected)
    assert_close(conv.bias, (large.bias + small.bias).detach())


LEFT = {
    "other strides": lambda: Summed(Branch(4, 4, 3, 2), nn.MaxPool2d(3, 2, 1)),
    "other groups": lambda: Summed(Branch(4, 4, 3, groups=4), Branch(4, 4, 1)),
    "an activation within": lambda: Summed(Branch(4, 4, 3), nn.Sequential(Branch(4, 4, 1), nn.ReLU())),
    "zeros around a crop": lambda: Summed(Branch(4, 4, 3, 2, 0), Branch(4, 4, 3, 2, 1), crop=1),
    "dilated": lambda: Summed(nn.Conv2d(4, 4, 3, padding=2, dilation=2), Branch(4, 4, 1)),
    "reflected": lambda: Summed(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), Branch(4, 4, 1)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_sum_of_branches_stays(name):
    model = drawn(nn.Sequential(LEFT[name]()))
    fused = padfree.fuse(model, input_size=(4, 9, 9))
    assert len(convs(fused)) == len(convs(model))
    assert_same(model, fused)


def test_a_branch_with_a_hook_or_a_second_reader_stays():
    model = drawn(nn.Sequential(Summed(Branch(4, 4, 3), Branch(4, 4, 1)), Summed(Branch(4, 4, 3), Branch(4, 4, 1))))
    model[0].branches[0].register_forward_hook(lambda *_: None)
    model[1].branches[1][0].weight = model[0].branches[1][0].weight
    assert len(convs(padfree.fuse(model, input_size=(4, 9, 9)))) == 4


def test_a_network_that_is_made_to_be_merged():
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=3)
    converted = drawn(padfree.convert(model, input_size=(3, 64, 64)))
    fused = padfree.fuse(converted)
    assert sum(p.numel() for p in fused.parameters()) < 0.95 * sum(p.numel() for p in converted.parameters())
    assert len(convs(fused)) < 0.6 * len(convs(converted))
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = converted.double()(x.double())
        assert_close(fused(x).double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
