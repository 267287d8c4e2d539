"""Whole models of timm, torchvision and bsconv: at least one for every row of the catalogue's tables."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from bsconv.pytorch import get_model
from torch import nn

import padfree
from benchmarks.catalogue import SAMPLE

S, DW, DENSE, PROJ = "stem", "depthwise", "dense", "projection"
# name -> rules that must match; a trailing "?" marks models that keep some places as they are
TIMM: dict[str, set[str]] = {
    "mobilenetv1_100": {S, DW},
    "mobilenetv2_050": {S, DW},
    "mobilenetv3_small_050": {S, DW},
    "mobilenetv3_rw": {S, DW},
    "mobilenetv4_conv_small": {S, DW, DENSE},
    "mobilenetv4_hybrid_medium": {S, DW, DENSE},
    "mobilenet_edgetpu_v2_xs": {S, DW, DENSE},
    "efficientnet_b0": {S, DW},
    "tf_efficientnet_b0": {S, DW},
    "tf_efficientnet_cc_b0_4e": {S, DW},
    "efficientnetv2_rw_t": {S, DW, DENSE},
    "mnasnet_small": {S, DW},
    "semnasnet_075": {S, DW},
    "fbnetc_100": {S, DW},
    "hardcorenas_a": {S, DW},
    "tinynet_e": {S, DW},
    "mixnet_s": {S, DW},
    "tf_mixnet_s": {S, DW},
    "rexnet_100": {S, DW},
    "ghostnet_050": {S, DW},
    "ghostnetv2_100": {S, DW},
    "ghostnetv3_050": {S, DW},
    "repghostnet_050": {S, DW},
    "lcnet_050": {S, DW},
    "hgnetv2_b0": {S, DW, DENSE},
    "mobileone_s0": {S, DW},
    "fastvit_t8": {S, DW},
    "repvit_m0_9": {S, DW, DENSE},
    "repvgg_a0": {S, DENSE},
    "efficientvit_b0": {S, DW},
    "efficientvit_m0": {S, DENSE},
    "tiny_vit_5m_224": {S, DENSE},
    "mobilevit_xxs": {S, DW},
    "vitamin_small_224": {S, DW, PROJ},
    "pit_ti_224": {DW},
    "xception41": {S, DW, PROJ},
    "maxvit_rmlp_pico_rw_256": {S},
    "regnetx_002": {S, DENSE, PROJ},
    "resnet10t": {S, DENSE, PROJ},
    "resnet18d": {S, DENSE, PROJ},
    "resnetv2_18": {S, DENSE, PROJ},
    "resnetblur50": {S},
    "skresnet18": {S, DENSE, PROJ},
    "seresnext26d_32x4d": {S, DENSE, PROJ},
    "nf_regnet_b0": {S, DENSE, PROJ},
    "dla34": {S, DENSE, PROJ},
    "levit_conv_128s": {S, DENSE},
    "pvt_v2_b0": {S, DENSE},
    "coatnet_nano_rw_224": {S},
    "cs3darknet_s": {S, DENSE},
    "mambaout_femto": {S, DENSE},
    "selecsls42": {S, DENSE},
    "inception_v3": {S},
    "starnet_s050": {S, DENSE},
}
TORCHVISION: dict[str, set[str]] = {
    "mobilenet_v2": {S, DW},
    "mobilenet_v3_small": {S, DW},
    "mobilenet_v3_large": {S, DW},
    "efficientnet_b0": {S, DW},
    "efficientnet_v2_s": {S, DW, DENSE},
    "mnasnet0_5": {S, DW},
    "shufflenet_v2_x0_5": {S, DW},
    "regnet_x_400mf": {S, DENSE, PROJ},
    "resnet18": {S, DENSE, PROJ},
    "resnet50": {S, DENSE, PROJ},
    "densenet121": {S},
    "googlenet": {S},
    "squeezenet1_1": {S},
}
BSCONV: dict[str, set[str]] = {
    "cifar_mobilenetv1_w1d4": {S, DW},
    "cifar_mobilenetv1_w1d4_bsconvu": {S, DENSE},
    "cifar_mobilenetv2_w1d4": {S, DW},
    "cifar_mobilenetv2_w1d4_bsconvs_p1d6": {S, DW},
    "cifar_mobilenetv3_small_w1": {S, DW},
    "cifar_mobilenetv3_large_w1d2_bsconvs_p1d6": {S, DW},
    "cifar_resnet20": {S, DENSE, PROJ},
    "cifar_resnet20_bsconvu": {S, DENSE, PROJ},
    "cifar_resnet20_bsconvs_p1d4": {S, DENSE, PROJ},
    "cifar_preresnet20": {S, DENSE, PROJ},
    "cifar_wrn16_1": {S, DENSE, PROJ},
    "cifar_wrn16_1_bsconvu": {S, DENSE, PROJ},
    "resnet10": {S, DENSE, PROJ},
    "mobilenetv3_small_w7d20": {S, DW},
}
NAMES = [("timm", n) for n in TIMM] + [("torchvision", n) for n in TORCHVISION] + [("bsconv", n) for n in BSCONV]
EXPECTED = {"timm": TIMM, "torchvision": TORCHVISION, "bsconv": BSCONV}


def build(library: str, name: str) -> tuple[nn.Module, tuple[int, int, int] | None]:
    """A model with ten classes and its input size (None: its own default)."""
    if library == "timm":
        return timm.create_model(name, num_classes=10), None
    if library == "torchvision":
        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **extra), None
    return get_model(name, num_classes=10), (3, 32, 32) if name.startswith("cifar") else (3, 224, 224)


def test_the_lists_are_whole() -> None:
    assert len(TIMM) >= 40 and len(TORCHVISION) >= 12 and len(BSCONV) >= 10
    assert len(set(NAMES)) == len(NAMES) == len(TIMM) + len(TORCHVISION) + len(BSCONV)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[key], state[key]) for key in state)


# The fixed sample of `benchmarks.coverage`, which .ci/run measures, has nearly half of them: here they are slow. So are
# large ones whose kind stands there or here as a smaller network, and the last rows, whose kinds the sample has.
LARGE = {
    ("timm", "maxvit_rmlp_pico_rw_256"), ("timm", "tiny_vit_5m_224"), ("timm", "vitamin_small_224"),
    ("timm", "nf_regnet_b0"), ("timm", "seresnext26d_32x4d"), ("timm", "efficientnetv2_rw_t"),
    ("timm", "tf_efficientnet_cc_b0_4e"), ("timm", "resnetblur50"), ("torchvision", "resnet50"),
    ("torchvision", "densenet121"), ("torchvision", "efficientnet_v2_s"), ("torchvision", "efficientnet_b0"),
    ("timm", "mobilenetv2_050"), ("timm", "mobilenetv3_rw"), ("timm", "mobilenet_edgetpu_v2_xs"),
    ("timm", "semnasnet_075"), ("timm", "hardcorenas_a"), ("torchvision", "regnet_x_400mf"),
    ("torchvision", "mobilenet_v3_large"), ("timm", "levit_conv_128s"), ("timm", "skresnet18"),
    ("timm", "selecsls42"), ("timm", "mambaout_femto"), ("torchvision", "googlenet"),
    ("timm", "mobileone_s0"), ("timm", "mobilevit_xxs"),
    ("bsconv", "cifar_mobilenetv1_w1d4"), ("bsconv", "cifar_mobilenetv2_w1d4"), ("bsconv", "cifar_wrn16_1"),
    ("bsconv", "cifar_mobilenetv3_small_w1"), ("bsconv", "resnet10"), ("bsconv", "mobilenetv3_small_w7d20"),
}  # fmt: skip
SWEPT = {(library, name) for library, _, name in (source.partition(":") for source in SAMPLE)}


def test_both_kinds_are_there() -> None:
    assert len(set(NAMES) & SWEPT) >= 30 and set(NAMES) >= LARGE
    for names in EXPECTED.values():
        assert any((library, name) not in SWEPT | LARGE for library, name in NAMES if EXPECTED[library] is names)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] if pair in SWEPT | LARGE else [])
        for pair in NAMES
    ],
)
def test_model(library: str, name: str) -> None:
    torch.manual_seed(0)
    model, size = build(library, name)
    model.train()
    state, random = _state(model), torch.get_rng_state()
    plan = padfree.plan(model, input_size=size)
    assert {match.rule for match in plan.matches} == EXPECTED[library][name]
    assert torch.equal(torch.get_rng_state(), random)
    converted = plan.apply(model)  # what `convert` does with the plan that it makes
    assert _same_state(model, state) and all(module.training for module in model.modules())
    assert isinstance(converted, type(model)) and all(module.training for module in converted.modules())
    assert [key for key in converted.state_dict() if key in state] == list(state)
    assert all(torch.equal(converted.state_dict()[key], value) for key, value in state.items())
    assert padfree.convert(converted, input_size=size) is converted
    side = plan.input_size[1]
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = _logits(converted.eval()(x))
        torch.testing.assert_close(_logits(copy.deepcopy(converted)(x)), expected)
        if _pickled(model) is not None:
            restored = _pickled(converted)
            assert restored is not None and torch.equal(_logits(restored(x)), expected)
    assert torch.isfinite(expected).all()
    converted.train()
    _logits(converted(x)).square().mean().backward()
    missing = [key for key, parameter in converted.named_parameters() if "padfree_" in key and parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("pair", [("timm", "lcnet_050"), ("torchvision", "resnet18"), ("bsconv", "cifar_preresnet20")])
def test_in_place_is_the_same_network(pair: tuple[str, str]) -> None:
    model, size = build(*pair)
    plan = padfree.plan(model, input_size=size)
    converted = plan.apply(model)
    assert plan.apply(model, inplace=True) is model
    model.load_state_dict(converted.state_dict())
    x = torch.randn(2, *plan.input_size)
    with torch.no_grad():
        torch.testing.assert_close(_logits(model.eval()(x)), _logits(converted.eval()(x)))


def _pickled(model: nn.Module) -> nn.Module | None:
    """The model after a round trip, or None where it cannot make one (bsconv's bound `reg_loss`)."""
    buffer = io.BytesIO()
    try:
        pickle.dump(model, buffer)
        restored: nn.Module = pickle.loads(buffer.getvalue())
    except AttributeError:
        return None
    return restored


def _logits(output: Any) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor)
    return found
