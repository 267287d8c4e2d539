"""Models built in other ways: features only, other channels and strides, scriptable, dense prediction, fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models._features import FeatureListNet
from timm.utils.model import reparameterize_model
from torch import nn

import padfree

DOWNSAMPLING = ("depthwise", "dense", "projection")


def sides(maps: Any) -> list[int]:
    return [feature.shape[-1] for feature in maps]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenetv3_small_050", [32, 15, 7, 3, 1]),
        ("ghostnet_050", [32, 15, 7, 3, 1]),
        ("resnet10t", [32, 16, 7, 3, 1]),
        ("regnetx_002", [32, 15, 7, 3, 1]),
    ],
)
def test_a_features_only_model_is_converted(name: str, expected: list[int]) -> None:
    model = timm.create_model(name, features_only=True)
    converted = padfree.convert(model).eval()
    assert sides(converted(torch.rand(1, 3, 64, 64))) == expected
    assert converted.feature_info.reduction() == model.feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002"])
def test_features_are_tapped_from_a_converted_model(name: str) -> None:
    converted = padfree.convert(timm.create_model(name, num_classes=10)).eval()
    x = torch.rand(1, 3, 64, 64)
    tapped = FeatureListNet(copy.deepcopy(converted), out_indices=(0, 1, 2, 3, 4))(x)
    maps = converted.forward_intermediates(x, intermediates_only=True)
    assert len(tapped) == len(maps) == 5
    for ours, theirs in zip(tapped, maps, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reduction_is_still_the_distance_between_neighbours() -> None:
    """`feature_info.reduction()`: an image moved by that many pixels moves the map by one, converted or not."""
    torch.manual_seed(0)
    converted = padfree.convert(timm.create_model("mobilenetv2_050", features_only=True)).eval()
    image = torch.rand(1, 3, 208, 208)
    for index, reduction in enumerate(converted.feature_info.reduction()[:3]):
        here = converted(image[..., :192, :192])[index]
        moved = converted(image[..., reduction : reduction + 192, reduction : reduction + 192])[index]
        middle = here.shape[-1] // 2
        torch.testing.assert_close(here[..., middle + 1, middle + 1], moved[..., middle, middle])
        assert not torch.allclose(here[..., middle, middle], moved[..., middle, middle])


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("mobilenetv3_small_050", {"in_chans": 1}, 5),
        ("resnet10t", {"in_chans": 4}, 7),
        ("mobilenetv2_050", {"output_stride": 16}, 4),
        ("mobilenetv3_small_050", {"exportable": True}, 5),
        ("tf_mobilenetv3_small_minimal_100", {"scriptable": True}, 5),
    ],
)
def test_models_built_with_settings(name: str, settings: dict[str, Any], count: int) -> None:
    model = timm.create_model(name, num_classes=10, **settings)
    plan = padfree.plan(model)
    assert len(plan.matches) == count and not plan.skips
    assert plan.input_size[0] == settings.get("in_chans", 3)
    assert plan.apply(model).eval()(torch.rand(1, plan.input_size[0], 97, 64)).shape == (1, 10)


def test_a_scriptable_model_is_scripted_after_conversion() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=10, scriptable=True)
    converted = padfree.convert(model).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(converted)(x), converted(x))


@pytest.mark.parametrize(("name", "count"), [("lraspp_mobilenet_v3_large", 4), ("fcn_resnet50", 3)])
def test_segmentation(name: str, count: int) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    plan = padfree.plan(model)
    assert len(plan.matches) == count and not plan.skips
    out = plan.apply(model).eval()(torch.rand(1, 3, 96, 128))["out"]
    assert out.shape == (1, 3, 96, 128) and torch.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detection(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    plan = padfree.plan(model, input_size=(3, 320, 320))
    assert len(plan.matches) >= 5
    (found,) = plan.apply(model).eval()([torch.rand(3, 320, 320)])
    assert set(found) == {"boxes", "labels", "scores"}


def test_video_networks_have_nothing_to_convert() -> None:
    with pytest.raises(padfree.PadfreeError, match=r"nothing to convert in VideoResNet.*Conv3"):
        padfree.convert(torchvision.models.video.r3d_18(weights=None))


def _settle_norms(model: nn.Module) -> None:
    """Statistics as after training, small enough that many summed branches stay finite."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.1, 0.3)
            nn.init.normal_(module.bias, std=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0",
        "fastvit_t8",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("repvit_m0_9", "mobileone_s0", "ghostnetv3_050")),
    ],
)
def test_converting_the_training_form_equals_converting_the_fused_form(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    _settle_norms(model)
    model.eval()
    with torch.no_grad():
        fused = reparameterize_model(model)
        one, other = (padfree.convert(form, rules=DOWNSAMPLING).eval() for form in (model, fused))
        new = [key for key in one.state_dict() if key not in model.state_dict()]
        new_fused = [key for key in other.state_dict() if key not in fused.state_dict()]
        state = {b: one.state_dict()[a] for a, b in zip(new, new_fused, strict=True)}
        other.load_state_dict({**other.state_dict(), **state})
        x = torch.rand(1, 3, 128, 128)
        expected = one(x)
        torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()
        with pytest.raises(padfree.PadfreeError, match="would discard the padding-free shortcut"):
            reparameterize_model(one)
