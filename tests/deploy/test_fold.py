"""Batch norms folded into convolutions, and every place where one must be left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import padfree
from padfree import fuse
from padfree.layers.learned_groups import LearnedGroupConv2d, condensed
from tests.deploy.lived import lived_in


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def assert_same_outputs(model, fused, side):
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        assert_close(fused(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Toy(nn.Module):
    """Two foldable pairs and, beside them, one of everything that must stay."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.read_twice, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.called_twice, self.bn4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bn5, self.conv5 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.conv6, self.bn6 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.hooked, self.bn7 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.seen = []
        self.hooked.register_forward_hook(Seen(self.seen))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        y = self.read_twice(x)
        x = self.bn3(y) + y
        x = self.bn4(self.called_twice(self.bn4(self.called_twice(x))))
        x = self.conv5(torch.relu(self.bn5(x)))
        return self.bn7(self.hooked(self.bn6(self.conv6(x))))


class Seen:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, module, args, output):
        self.seen.append(output.shape)


def test_only_a_norm_that_alone_reads_a_convolution_is_folded():
    model = lived_in(Toy(), 17)
    model.seen.clear()
    fused = fuse(model, input_size=(3, 17, 17))
    assert norms(fused) == ["bn3", "bn4", "bn5", "bn6", "bn7"]
    assert fused.conv1.bias is not None and isinstance(fused.bn1, nn.Identity)
    assert model.seen == []  # the user's hooks did not fire, neither on the model nor on its copy
    assert_same_outputs(model, fused, 17)


def test_the_fold_is_the_formula():
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 9)
    conv, norm = model
    fused = fuse(model, input_size=(3, 9, 9))
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert_close(fused[0].weight, conv.weight * gain[:, None, None, None])
    assert_close(fused[0].bias, (conv.bias - norm.running_mean) * gain + norm.bias)
    assert len(fused) == 2


def test_the_original_is_untouched():
    model = lived_in(Toy(), 17)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, input_size=(3, 17, 17))
    assert list(model.state_dict()) == list(before)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert type(model.bn1) is nn.BatchNorm2d


def test_layout_and_dtype_are_kept():
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 9)
    model = model.to(memory_format=torch.channels_last).to(torch.bfloat16)
    fused = fuse(model, input_size=(3, 9, 9))
    assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fused[0].weight.dtype == fused[0].bias.dtype == torch.bfloat16


def test_shared_parameters_and_shared_norms_stay():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    twin = nn.Conv2d(3, 3, 1)
    twin.weight = conv.weight
    model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(3), twin, nn.BatchNorm2d(3)), 5)
    assert norms(fuse(model, input_size=(3, 5, 5))) == ["1", "3"]
    model = lived_in(nn.Sequential(conv, norm, nn.Conv2d(3, 3, 1), norm), 5)
    assert norms(fuse(model, input_size=(3, 5, 5))) == ["1"]


class Tied(nn.Module):
    """A decoder that reads the encoder's weight, through a view or not."""

    def __init__(self, viewed):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.viewed = viewed

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        weight = self.conv.weight.flip(2).flip(2) if self.viewed else self.conv.weight
        return F.conv_transpose2d(y, weight, padding=1) * 0.2 + x


@pytest.mark.parametrize("viewed", [False, True])
def test_a_convolution_whose_weight_is_read_twice_stays(viewed):
    model = lived_in(Tied(viewed), 9)
    fused = fuse(model, input_size=(3, 9, 9))
    assert norms(fused) == ["bn"]
    assert_same_outputs(model, fused, 9)


def test_a_subclass_that_changes_its_weight_stays():
    from timm.layers import StdConv2d

    model = lived_in(nn.Sequential(StdConv2d(3, 8, 3), nn.BatchNorm2d(8)), 9)
    assert norms(fuse(model, input_size=(3, 9, 9))) == ["1"]


def test_training_mode_is_refused_with_the_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(padfree.PadfreeError, match=r"`Sequential` is in training mode \(and 2 more\); call model"):
        fuse(model)
    model.eval()[1].train()
    with pytest.raises(padfree.PadfreeError, match="`1` is in training mode; call model"):
        fuse(model)
    with pytest.raises(padfree.PadfreeError, match="not str"):
        fuse("resnet18")


def test_a_forward_that_looks_into_its_norm_is_an_error():
    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) * self.bn.momentum

    with pytest.raises(padfree.PadfreeError, match="more than to be called"):
        fuse(Nosy().eval(), input_size=(3, 9, 9))


def test_outputs_that_are_not_finite_are_an_error():
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 9)
    model[0].weight.data[0] = float("nan")
    with pytest.raises(padfree.PadfreeError, match="the outputs of Sequential itself are not finite"):
        fuse(model, input_size=(3, 9, 9))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-4)).half().eval()
    model[0].weight.data = torch.tensor([0.011, -0.011]).view(1, 2, 1, 1).half()
    model[1].running_var.fill_(0)
    model[1].weight.data.fill_(6e4)  # a gain of 6e6; half precision ends at 65504, so the folded weight is infinite
    with pytest.raises(padfree.PadfreeError, match="the fused Sequential differs by nan"):
        fuse(model, input_size=(2, 3, 3))


class GroupsThenShuffle(nn.Module):
    """A group convolution whose channels are put into another order before the norm, by views of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3 * 4, 12, 1, groups=4), nn.BatchNorm2d(12)

    def forward(self, x):
        y = self.conv(x.repeat_interleave(4, 1))
        y = y.view(y.shape[0], 3, 4, *y.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)
        return torch.relu(self.norm(y))


SHUFFLES = {
    "by views": GroupsThenShuffle,
    "by a module": lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.ChannelShuffle(3), nn.BatchNorm2d(12)),
    "twice": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ChannelShuffle(3), nn.ChannelShuffle(2), nn.BatchNorm2d(12), nn.ReLU()
    ),
    "condensed": lambda: nn.Sequential(
        condensed(nn.Sequential(nn.Conv2d(3, 8, 1), LearnedGroupConv2d(8, 12, 3, 4, 2, bias=True))), nn.BatchNorm2d(12)
    ),
}


@pytest.mark.parametrize("build", SHUFFLES.values(), ids=SHUFFLES)
def test_a_norm_is_folded_through_a_shuffle_of_channels(build):
    torch.manual_seed(0)
    model = lived_in(build(), 8)
    fused = fuse(model, input_size=(3, 8, 8))
    assert norms(model) and not norms(fused)
    assert_same_outputs(model, fused, 8)


def test_a_norm_behind_something_that_is_no_shuffle_stays():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x).transpose(1, 2))  # rows take the place of channels

    seen = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ChannelShuffle(3), nn.BatchNorm2d(12))
    seen[1].register_forward_hook(Seen([]))
    for model in (Turned(), seen):
        fused = fuse(lived_in(model, 8), input_size=(3, 8, 8))
        assert norms(fused)
        assert_same_outputs(model, fused, 8)
