"""`padfree.replace`: what is replaced, what stays, what is left alone, and plans of it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from bsconv.pytorch import BSConvS_Replacer, BSConvU_Replacer, get_model
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
from padfree.errors import NothingToConvertError, PlanError
from padfree.layers.learned_groups import LearnedGroupConv2d, condense_stage, condensed
from padfree.layers.separable import BSConvS, BSConvU
from padfree.replacing.replace import plan_replacement

SIZE = (3, 16, 16)
IMAGES = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *layers)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def make_separable(model: nn.Module) -> nn.Module:
    """Every dense kernel becomes one that is a BSConv-U pair."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and max(conv.kernel_size) > 1:
            n, m, *kernel = conv.weight.shape
            points, taps = torch.randn(n, m, 1, 1), torch.randn(n, 1, *kernel)
            conv.weight.data = (points * taps / m).to(conv.weight)
    return model


def replaced(model: nn.Module, kind: str = "bsconv-u", **settings: Any) -> nn.Module:
    return padfree.replace(model, kind, **{"input_size": SIZE, **settings})


def test_the_count_of_resnet18() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
    small = padfree.replace(model, "bsconv-u")
    assert sum(p.numel() for p in model.parameters()) == 11_181_642
    assert sum(p.numel() for p in small.parameters()) == 1_451_338
    plan = small.padfree_plan
    assert len(plan.matches) == 16 and not plan.skips
    assert 11_181_642 + sum(m.detail.params[1] - m.detail.params[0] for m in plan.matches) == 1_451_338
    assert "layer4.1.conv2: 512 -> 512, 3x3: 2,359,296 -> 266,752 parameters (fresh)" in str(plan)


def mixed() -> nn.Module:
    return network(
        nn.Conv2d(8, 12, 3, 2, padding=1), nn.Conv2d(12, 6, 5, padding=2, padding_mode="reflect"), nn.Conv2d(6, 8, 1),
        nn.Conv2d(8, 8, 3, dilation=2, padding="same"), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 40, 3, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("with_bn", [False, True])
@pytest.mark.parametrize(("kind", "replacer", "p"), [("u", BSConvU_Replacer, {}), ("s", BSConvS_Replacer, {"p": 0.6})])
def test_fresh_values_are_the_packages(kind: str, replacer: Any, p: dict[str, float], with_bn: bool) -> None:
    model = seeded(mixed)
    torch.manual_seed(1)
    ours = replaced(model, f"bsconv-{kind}", with_bn=with_bn, **p)
    torch.manual_seed(1)
    theirs = replacer(with_bn=with_bn, **p).apply(copy.deepcopy(model))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    assert_close(ours.train()(IMAGES), theirs.train()(IMAGES))


CONVS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(8, 12, 3, 2, padding=1),
    lambda: nn.Conv2d(8, 12, 5, padding=4, dilation=2, bias=False),
    lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    lambda: nn.Conv2d(8, 4, 3, padding="same", padding_mode="replicate"),
    lambda: Conv2dSame(8, 12, 3, 2),
    lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 4, 3, 2)),
    lambda: nn.Conv2d(8, 4, 3, padding=1).to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("build", CONVS)
def test_a_separable_network_stays_what_it_computes(build: Callable[[], nn.Module]) -> None:
    model = make_separable(seeded(lambda: network(build()))).eval()
    for kind, settings in [("bsconv-u", {}), ("bsconv-s", {"p": 1.0}), ("bsconv-u", {"with_bn": True})]:
        small = replaced(model, kind, init="svd", **settings).eval()
        assert len(small.padfree_plan.matches) == 2
        assert_close(small(IMAGES), model(IMAGES), atol=2e-6, rtol=1e-5)


def test_what_stays() -> None:
    model = seeded(mixed).double()
    conv = model[3].eval()
    conv.weight.requires_grad_(False)
    seen: list[tuple[int, ...]] = []
    conv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model[4].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = replaced(model, "bsconv-s", with_bn=True)
    assert type(small) is type(model) and type(small[3]) is BSConvS
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.float64, torch.int64}
    assert [part.training for part in small[3].children()] == [False] * 5
    assert all(part.training for part in small[4].children())
    assert {name: p.requires_grad for name, p in small[3].named_parameters()} == {
        **dict.fromkeys(("pw1.weight", "bn1.weight", "bn1.bias", "pw2.weight", "bn2.weight", "bn2.bias"), False),
        "dw.weight": False,
        "dw.bias": True,
    }
    assert not any(p.requires_grad for p in small[4].parameters())
    assert not seen  # hooks do not run while the network is looked at
    small(IMAGES.double())
    assert seen == [(2, 12, 8, 8)]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert type(model[3]) is nn.Conv2d and len(model[3]._forward_hooks) == 1


class Twice(nn.Module):
    """One convolution under two names, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.listed = nn.ModuleList([self.first, nn.Conv2d(3, 3, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.listed[1](self.again(self.first(x)))
        return out


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_layer_stays_shared(inplace: bool) -> None:
    model = make_separable(seeded(Twice))
    expected = model(IMAGES)
    small = replaced(model, init="svd", inplace=inplace)
    assert (small is model) == inplace
    assert type(small.first) is BSConvU and small.again is small.first and small.listed[0] is small.first
    assert len(small.padfree_plan.matches) == 2
    assert_close(small(IMAGES), expected, atol=2e-6, rtol=1e-5)


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Squared(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.square())


class Reading(nn.Module):
    """Looks into its convolution instead of calling it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.mean()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    return model


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.training else x


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Scaled(8, 8, 3), r"`3`: its forward \(Scaled\) does more than a convolution"),
        (lambda: Squared(8, 8, 3), r"`3`: its forward \(Squared\) runs pow besides the convolution"),
        (lambda: StdConv2d(8, 8, 3), r"`3`: its weight is computed in its forward \(StdConv2d\)"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "`3`: its weight is computed"),
        (tied, "`3.0`: `3.0` and `3.1` share one weight"),
        (Idle, "`3.conv`: no forward in eval mode calls it"),
        (Reading, "`3.conv`: .*no attribute 'weight'"),
    ],
)
def test_left_alone_with_the_reason(build: Callable[[], nn.Module], words: str) -> None:
    model = network(build())
    with pytest.raises(NothingToConvertError, match=f"nothing to replace by bsconv-u in Sequential.*{words}"):
        replaced(model, exclude="0")
    small = replaced(model)
    assert [match.name for match in small.padfree_plan.matches] == ["0"]
    assert {skip.name for skip in small.padfree_plan.skips} >= {skip.name for skip in plan_replacement(
        model, "bsconv-u", exclude="0", input_size=SIZE).skips} - {"0"}  # fmt: skip


def test_a_bare_convolution_and_twice_the_same() -> None:
    with pytest.raises(NothingToConvertError, match="the model is this convolution itself"):
        replaced(nn.Conv2d(3, 8, 3))
    with pytest.raises(NothingToConvertError, match="it has no dense"):
        replaced(nn.Sequential(nn.Conv2d(3, 8, 7)))
    small = replaced(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert replaced(small) is small


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("bsconv", {}, "kind is 'bsconv'; it takes one of 'bsconv-u', 'bsconv-s', 'learned-groups'"),
        ("bsconv-u", {"p": 0.5}, "'bsconv-u' takes no p; its settings are kernel_sizes, with_bn, init"),
        ("bsconv-s", {"p": 2}, "p is 2; it takes a number from 0 to 1"),
        ("bsconv-s", {"groups": 4}, "takes no groups"),
        ("bsconv-u", {"kernel_sizes": [(3, 3, 3)]}, "kernel_sizes is"),
        ("bsconv-u", {"kernel_sizes": 3}, "kernel_sizes is 3; it takes a list"),
        ("bsconv-u", {"init": "zero"}, "init is 'zero'; it takes one of"),
        ("bsconv-u", {"with_bn": 1}, "with_bn is 1"),
        ("learned-groups", {"condense_factor": 0}, "condense_factor is 0"),
        ("learned-groups", {"batches": [IMAGES]}, "batches are for the values of bsconv-u and bsconv-s"),
        ("bsconv-u", {"batches": [IMAGES], "init": "fresh"}, "with init='fresh'"),
        ("bsconv-u", {"norms": True}, "norms is about batches, and none are given"),
        ("bsconv-u", {"include": "layer9"}, "include='layer9' matches none of the places found: 0"),
    ],
)
def test_wrong_arguments(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(padfree.PadfreeError, match=words.replace("(", r"\(")):
        replaced(network(), kind, **settings)


def test_places_by_name_and_kernel() -> None:
    model = seeded(mixed)
    plan = plan_replacement(model, "bsconv-u", kernel_sizes=[5, (1, 1)], input_size=SIZE)
    assert [match.name for match in plan.matches] == ["4", "5"]
    plan = plan_replacement(model, "bsconv-u", include=["3", "4"], exclude="re:4", input_size=SIZE)
    assert [match.name for match in plan.matches] == ["3"]
    assert {skip.name for skip in plan.skips} == {"0", "4", "6", "8"}


@pytest.mark.parametrize("kind", ["bsconv-u", "bsconv-s"])
def test_a_plan_is_written_down_and_carried_out_again(kind: str) -> None:
    model = make_separable(seeded(mixed)).eval()
    settings = {"init": "svd", "exclude": "0"} | ({"p": 0.7} if kind == "bsconv-s" else {})
    small = replaced(model, kind, **settings)
    plan = padfree.Plan.from_dict(json.loads(json.dumps(small.padfree_plan.to_dict())))
    assert plan == small.padfree_plan == plan_replacement(model, kind, input_size=SIZE, **settings)
    assert_close(plan.apply(model)(IMAGES), small(IMAGES))
    again = padfree.replace(plan.apply(model), kind, include="0", input_size=SIZE).padfree_plan
    assert again.earlier == plan
    assert list(again.apply(model).state_dict()) == list(replaced(small, kind, include="0").state_dict())
    with pytest.raises(PlanError, match="does not find `3`"):
        plan.apply(small)
    wrong = plan.to_dict()
    wrong["matches"][0]["detail"] |= {"mid_channels": 10**9}
    with pytest.raises(PlanError, match="does not find `3`"):
        padfree.Plan.from_dict(wrong).apply(model)


def test_replace_then_convert_is_converting_the_packages_network() -> None:
    theirs = get_model("cifar_resnet20_bsconvu", num_classes=100).eval()
    small = padfree.replace(get_model("cifar_resnet20", num_classes=100), "bsconv-u", input_size=(3, 32, 32)).eval()
    small.load_state_dict(theirs.state_dict())
    options = padfree.Options(stem_residual=True)
    ours, expected = (
        seeded(lambda model=model: padfree.convert(model, options=options, input_size=(3, 32, 32))).eval()
        for model in (small, theirs)
    )
    assert sum(p.numel() for p in ours.parameters()) == 50_378
    assert ours.padfree_plan.matches == expected.padfree_plan.matches
    images = torch.randn(2, 3, 32, 32)
    assert_close(ours(images), expected(images))


def test_convert_then_replace() -> None:
    model = seeded(lambda: network(nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())).eval()
    ours = replaced(padfree.convert(model, input_size=SIZE, rules=["dense"]), "bsconv-s", include="3")
    assert ours.padfree_plan.earlier is not None
    assert ours[3].dw.padding == (0, 0)  # padding-free, as it was made
    again = ours.padfree_plan.apply(model).eval()
    again.load_state_dict(ours.state_dict())
    assert_close(again(IMAGES), ours(IMAGES))
    assert again(IMAGES).shape == (2, 8, 7, 7)


def saved_network() -> nn.Module:
    return network(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))


def test_a_replaced_network_is_saved_and_loaded(tmp_path: Any) -> None:
    small = replaced(replaced(seeded(saved_network), "bsconv-s"), "learned-groups").eval()
    condense_stage(small)
    deployed = condensed(small)
    for model in (small, deployed, padfree.fuse(deployed)):
        padfree.save(model, tmp_path / "small.safetensors", f"{__name__}:saved_network")
        loaded = padfree.load(tmp_path / "small.safetensors", factory=saved_network)
        assert type(loaded[3]) is BSConvS and type(loaded[4]) is type(model[4])
        assert_close(loaded(IMAGES), model(IMAGES))
        assert loaded.state_dict().keys() == model.state_dict().keys()


def test_the_loss_of_a_replaced_and_converted_network_survives_pickling() -> None:
    small = replaced(seeded(lambda: network(nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU())), "bsconv-s")
    for model in (small, padfree.convert(small, input_size=SIZE)):
        kept = pickle.loads(pickle.dumps(model))
        loss = padfree.orthonormal_loss(kept)
        assert_close(loss, padfree.orthonormal_loss(model))
        loss.backward()
        assert kept.get_submodule("3.pw1").weight.grad is not None and model.get_submodule("3.pw1").weight.grad is None
        assert_close(kept(IMAGES), model(IMAGES))


def separable_block(expand: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, expand, 1), nn.BatchNorm2d(expand), nn.ReLU6(),
        nn.Conv2d(expand, expand, 3, 2, padding=1, groups=expand, bias=False), nn.BatchNorm2d(expand), nn.ReLU6(),
        nn.Conv2d(expand, 8, 1, bias=False), nn.BatchNorm2d(8),
    )  # fmt: skip


def test_learned_groups_compute_the_same_and_are_condensed_after_a_conversion(tmp_path: Any) -> None:
    model = seeded(lambda: network(separable_block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    learned = replaced(model, "learned-groups", groups=2, condense_factor=4)
    assert [m.name for m in learned.padfree_plan.matches] == ["3.0", "3.6"]
    assert "8 -> 16 in 2 groups: 144 -> 48 parameters after 3 stages" in str(learned.padfree_plan)
    assert_close(learned(IMAGES), model(IMAGES), rtol=0, atol=0)
    assert [key for key in learned.state_dict() if "mask" not in key] == list(model.state_dict())
    same = replaced(model, "learned-groups", inplace=True, include="3.6")
    assert isinstance(same[3][6], LearnedGroupConv2d)
    with pytest.raises(NothingToConvertError, match="8 input channels are no multiple of 16"):
        replaced(model, "learned-groups", groups=16, include="3.0")

    converted = padfree.convert(learned, input_size=SIZE).eval()
    condense_stage(converted)
    condense_stage(converted)
    resumed = copy.deepcopy(converted)
    assert condense_stage(resumed) == 2 == condense_stage(converted)
    small = condensed(converted)
    assert_close(small(IMAGES), converted(IMAGES), atol=1e-5, rtol=1e-5)
    for form in (converted, small):
        assert_close(padfree.fuse(form)(IMAGES), converted(IMAGES), atol=1e-5, rtol=1e-5)
