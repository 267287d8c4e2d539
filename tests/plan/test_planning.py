"""Plans as data: what they hold, how they are narrowed, saved and applied."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import padfree
from padfree.errors import NothingToConvertError, PlanError
from tests.strangers import Unit


@pytest.fixture(scope="module")
def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", num_classes=10).eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10).eval()


def names(plan: padfree.Plan) -> list[str]:
    return [match.name for match in plan.matches]


def test_a_plan_survives_json(resnet: nn.Module) -> None:
    plan = padfree.plan(resnet, options=padfree.Options(projection="dense", stem_residual=True), include="layer*")
    assert plan.matches and plan.skips
    again = padfree.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and isinstance(again, padfree.Plan)
    assert str(again) == str(plan) and "layer2.0.conv1" in str(plan)


def test_a_damaged_plan_is_refused(mobilenet: nn.Module) -> None:
    data = padfree.plan(mobilenet).to_dict()
    for broken in (
        {**data, "format": 99},
        {**data, "matches": [{"rule": "stem"}]},
        {**data, "options": {"merge": "x"}},
        {},
    ):
        with pytest.raises(padfree.PadfreeError):
            padfree.Plan.from_dict(broken)


def test_sizes_are_those_of_the_converted_network(mobilenet: nn.Module) -> None:
    plan = padfree.plan(mobilenet)
    sizes = [(m.size, m.out_before, m.out_after) for m in plan.matches if m.rule == "depthwise"]
    assert [before for _, before, _ in sizes] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [after for *_, after in sizes] == [(55, 55), (27, 27), (13, 13), (6, 6)]


def test_rules_select(resnet: nn.Module) -> None:
    assert names(padfree.plan(resnet, rules=("stem",))) == ["conv1.0"]
    downsampling = padfree.plan(resnet, rules=("depthwise", "dense", "projection"))
    assert {match.rule for match in downsampling.matches} == {"dense", "projection"}
    with pytest.raises(NothingToConvertError, match="needs rule 'projection'"):
        padfree.convert(resnet, rules=("dense",))


def test_include_and_exclude(resnet: nn.Module) -> None:
    whole = names(padfree.plan(resnet))
    assert names(padfree.plan(resnet, include="layer2.*")) == [n for n in whole if n.startswith("layer2.")]
    assert names(padfree.plan(resnet, include=["conv1.0"])) == ["conv1.0"]
    assert names(padfree.plan(resnet, include=["conv1", "layer4"])) == [
        n for n in whole if n.startswith(("conv1.", "layer4."))
    ]
    without = padfree.plan(resnet, exclude="re:layer3\\..*conv1")
    assert names(without) == [n for n in whole if not n.startswith("layer3.")]
    reasons = {skip.name: skip.reason for skip in without.skips}
    assert "`layer3.0.conv1`" in reasons["layer3.0.downsample.0"]  # half a domain is never converted


@pytest.mark.parametrize("pattern", ["layer9.*", "re:nothing", "conv"])
def test_a_pattern_that_matches_nothing_raises(resnet: nn.Module, pattern: str) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"matches none of the places found: .*layer2\.0\.conv1"):
        padfree.plan(resnet, include=pattern)
    with pytest.raises(padfree.PadfreeError, match="matches none"):
        padfree.convert(resnet, exclude=[pattern])


def test_a_bad_regular_expression_is_named(resnet: nn.Module) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"re:\( ?.* is not a regular expression"):
        padfree.plan(resnet, include="re:(")


def test_apply_does_what_convert_does(mobilenet: nn.Module) -> None:
    plan = padfree.Plan.from_dict(padfree.plan(mobilenet).to_dict())
    torch.manual_seed(1)
    applied = plan.apply(mobilenet)
    torch.manual_seed(1)
    converted = padfree.convert(mobilenet)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(applied(x), converted(x))
    assert list(applied.state_dict()) == list(converted.state_dict())


def test_a_plan_for_another_model_is_refused(mobilenet: nn.Module, resnet: nn.Module) -> None:
    plan = padfree.plan(resnet)
    before = [type(module) for module in mobilenet.modules()]
    with pytest.raises(PlanError, match="does not fit this MobileNetV3"):
        plan.apply(mobilenet, inplace=True)
    assert [type(module) for module in mobilenet.modules()] == before


def test_two_conversions_one_after_another_are_remembered(mobilenet: nn.Module) -> None:
    first = padfree.convert(mobilenet, rules=("stem",))
    second = padfree.convert(first, rules=("depthwise",))
    plan = padfree.Plan.from_dict(second.padfree_plan.to_dict())
    assert plan.earlier is not None and {m.rule for m in plan.earlier.matches} == {"stem"}
    again = plan.apply(mobilenet)
    again.load_state_dict(second.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), second(x))
    assert list(padfree.convert(mobilenet).state_dict()) == list(second.state_dict())


@pytest.mark.parametrize("bad", [{"merge": "bn"}, {"pool": "2x2"}, {"projection": ""}, {"stem_residual": 1}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(padfree.PadfreeError, match=f"Options.{next(iter(bad))}"):
        padfree.Options(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(3, 224), (0, 32, 32), "big", (3, 32.5, 32), 224])
def test_input_sizes_are_checked(mobilenet: nn.Module, size: object) -> None:
    with pytest.raises(padfree.PadfreeError, match="three positive integers"):
        padfree.plan(mobilenet, input_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("merge", ["conv", "norm", "activation"])
def test_merge_points_of_a_fused_norm_and_activation(mobilenet: nn.Module, merge: str) -> None:
    """BatchNormAct2d of timm runs its activation inside; a sum at the norm comes before it all the same."""
    options = padfree.Options(merge=merge)  # type: ignore[arg-type]
    converted = padfree.convert(mobilenet, rules=("depthwise",), options=options)
    old, new = mobilenet.blocks[1][0], converted.blocks[1][0]
    x = torch.randn(2, old.conv_pw.in_channels, 17, 17)
    wide = old.bn1(old.conv_pw(x))
    pooled = F.max_pool2d(wide, 3, 2)
    conv = F.conv2d(wide, old.conv_dw.weight, stride=2, groups=wide.shape[1])
    at_conv = pooled if merge == "conv" else 0
    bn = old.bn2
    normed = F.batch_norm(conv + at_conv, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    acted = bn.act(normed + (pooled if merge == "norm" else 0)) + (pooled if merge == "activation" else 0)
    torch.testing.assert_close(new(x), old.bn3(old.conv_pwl(old.se(acted))))


def test_what_never_had_anything_to_convert_is_refused_with_what_was_seen() -> None:
    with pytest.raises(NothingToConvertError, match="patchify stem"):
        padfree.convert(timm.create_model("vit_tiny_patch16_224"))
    with pytest.raises(NothingToConvertError, match="no odd stride-2 convolution"):
        padfree.convert(timm.create_model("vgg11"))
    with pytest.raises(NothingToConvertError, match="no convolution modules"):
        padfree.convert(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), input_size=(3, 8, 8))


def test_an_input_the_model_does_not_take_is_refused_with_a_hint(mobilenet: nn.Module) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"does not run on a 7x64x64 input.*Hint: pass input_size"):
        padfree.plan(mobilenet, input_size=(7, 64, 64))


class Forked(nn.Module):
    """Two strided branches that meet; the forward of one of them cannot be replaced by a graph."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain, self.odd = nn.Conv2d(3, 8, 3, padding=1), Unit(), Counting()

    def forward(self, x):
        y = self.stem(x)
        return self.plain(y) + self.odd(y)


class Counting(Unit):
    def forward(self, x):
        self.count = getattr(self, "count", 0) + 1
        return super().forward(x)


def test_the_match_that_stops_a_domain_is_named():
    class Twofold(nn.Module):
        def __init__(self):
            super().__init__()
            self.forked, self.more = Forked(), Unit()

        def forward(self, x):
            return self.more(self.forked(x))

    plan = padfree.plan(Twofold(), input_size=(3, 32, 32), rules=("depthwise",))
    reasons = {skip.name: skip.reason for skip in plan.skips}
    assert [match.name for match in plan.matches] == ["more.conv"]
    assert "`forked.odd`" in reasons["forked.odd.conv"] and "same map" not in reasons["forked.odd.conv"]
    assert reasons["forked.plain.conv"].startswith("`forked.odd.conv` enters the same map and cannot be converted: ")
