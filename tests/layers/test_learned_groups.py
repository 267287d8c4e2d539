"""Learned group convolution: its masks, its lasso, its condensed form."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from padfree.errors import PadfreeError
from padfree.layers.learned_groups import CondensedConv2d, LearnedGroupConv2d, condense_stage, condensed, lasso

IMAGES = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))


def layer(groups: int = 2, factor: int = 4, out: int = 6, **settings: object) -> LearnedGroupConv2d:
    torch.manual_seed(1)
    return LearnedGroupConv2d(8, out, groups=groups, condense_factor=factor, **settings)  # type: ignore[arg-type]


def after_stages(conv: LearnedGroupConv2d, stages: int) -> Tensor:
    """The mask that `stages` stages leave, by loops over the definition."""
    weight = conv.weight.detach().abs().sum((2, 3))
    mask = torch.ones_like(weight)
    for _ in range(stages):
        for group in range(conv.learned_groups):
            members = [n for n in range(conv.out_channels) if n % conv.learned_groups == group]
            alive = [m for m in range(conv.in_channels) if mask[group, m]]
            sizes = {m: sum(float(weight[n, m]) for n in members) for m in alive}
            for m in sorted(alive, key=lambda m: sizes[m])[: conv.in_channels // conv.condense_factor]:
                mask[members, m] = 0
    return mask


@pytest.mark.parametrize(("groups", "factor"), [(2, 4), (4, 2), (1, 4), (8, 8)])
def test_a_stage_masks_the_smallest_inputs_of_each_group(groups: int, factor: int) -> None:
    conv = layer(groups, factor, out=16)
    assert (conv.stage, conv.stages, conv.kept) == (0, factor - 1, 8)
    for stage in range(1, factor):
        conv.condense_stage()
        expected = conv.weight * after_stages(conv, stage)[:, :, None, None]
        assert_close(conv(IMAGES), F.conv2d(IMAGES, expected))
        assert (conv.stage, conv.kept) == (stage, 8 - stage * 8 // factor)
    last = conv.mask.clone()
    conv.condense_stage()  # nothing is left to do
    assert torch.equal(conv.mask, last)


def test_what_is_masked_keeps_its_weight_and_gets_no_gradient() -> None:
    conv = layer()
    before = conv.weight.detach().clone()
    conv.condense_stage()
    conv(IMAGES).square().sum().backward()
    assert torch.equal(conv.weight, before)
    assert torch.equal(conv.weight.grad == 0, conv.masked_weight() == 0)


SETTINGS = [
    {},
    {"bias": True},
    {"stride": 2},
    {"kernel_size": 3, "padding": 1, "bias": True},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (1, 2), "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "dtype": torch.float64},
]


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("groups", "factor"), [(2, 4), (4, 4)])
def test_the_condensed_form_computes_the_same(groups: int, factor: int, settings: dict, stages: int) -> None:
    conv = layer(groups, factor, out=12, **settings).eval()
    for _ in range(stages):
        conv.condense_stage()
    images = IMAGES.to(conv.weight.dtype)
    small = conv.condensed()
    assert_close(small(images), conv(images), atol=1e-6, rtol=1e-5)
    assert small.conv.weight.numel() == int((conv.masked_weight() != 0).sum())
    assert small.conv.groups == groups
    assert not small.training and not small.conv.training


def test_the_lasso_is_the_sum_of_group_norms() -> None:
    conv = layer()
    conv.condense_stage()
    weight = conv.masked_weight().detach()
    expected = sum(
        max(float((weight[group :: conv.learned_groups, m] ** 2).sum()), 1e-6) ** 0.5
        for group in range(conv.learned_groups)
        for m in range(conv.in_channels)
    )
    assert_close(conv.lasso(), torch.tensor(expected))
    conv.lasso().backward()
    assert bool(((conv.weight.grad != 0) == (weight != 0)).all())  # what is masked is below the floor: no gradient
    conv.condense_stage()
    conv.condense_stage()
    assert float(conv.lasso()) == 0  # at the last stage


def test_a_state_dict_resumes_in_the_middle_of_the_schedule() -> None:
    conv = layer()
    conv.condense_stage()
    state = copy.deepcopy(conv.state_dict())
    assert state["mask"].dtype == torch.bool and list(state) == ["weight", "mask"]
    other = LearnedGroupConv2d(8, 6, groups=2)
    other.load_state_dict(state)
    assert other.stage == 1
    for each in (conv, other):
        each.condense_stage()
    assert torch.equal(conv.mask, other.mask)
    other.mask[0] = True
    with pytest.raises(PadfreeError, match=r"read \[4, 8\] inputs"):
        other.condensed()


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LearnedGroupConv2d(8, 8)
        self.two = self.one
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.two(self.one(x)))
        return out


def test_a_whole_model_is_condensed_as_a_copy() -> None:
    model = Shared().eval()
    seen: list[int] = []
    model.one.register_forward_hook(lambda *_: seen.append(1))
    model.one.weight.requires_grad_(False)
    assert [condense_stage(model) for _ in range(4)] == [1, 1, 1, 0]
    small = condensed(model)
    assert isinstance(small.one, CondensedConv2d) and small.two is small.one
    assert isinstance(model.one, LearnedGroupConv2d)
    expected = model(IMAGES)
    seen.clear()
    assert_close(small(IMAGES), expected)
    assert len(seen) == 2
    assert not small.one.conv.weight.requires_grad and small.norm.weight.requires_grad
    assert isinstance(condensed(model.one), CondensedConv2d)


def test_the_lasso_of_a_model_is_that_of_its_layers() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), LearnedGroupConv2d(6, 6, groups=2, condense_factor=2))
    assert_close(lasso(model), model[0].lasso() + model[2].lasso())
    assert float(lasso(nn.Conv2d(3, 3, 1))) == 0
    with pytest.raises(PadfreeError, match="has no LearnedGroupConv2d"):
        condense_stage(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize(
    ("channels", "words"),
    [((6, 8), "6 input channels are no multiple of 4"), ((8, 6), "6 output channels are no multiple of 4")],
)
def test_channels_that_cannot_be_divided_are_refused(channels: tuple[int, int], words: str) -> None:
    with pytest.raises(PadfreeError, match=words):
        LearnedGroupConv2d(*channels)
    with pytest.raises(PadfreeError, match="groups is 0; it takes a positive integer"):
        LearnedGroupConv2d(8, 8, groups=0)


@pytest.mark.parametrize("form", ["learned", "condensed"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_both_forms_are_pickled_scripted_and_exported(form: str) -> None:
    conv = layer(bias=True).eval()
    conv.condense_stage()
    model = conv if form == "learned" else conv.condensed()
    expected = model(IMAGES)
    for other in (
        pickle.loads(pickle.dumps(model)),
        torch.jit.script(model),
        torch.export.export(model, (IMAGES,)).module(),
    ):
        assert_close(other(IMAGES), expected)
