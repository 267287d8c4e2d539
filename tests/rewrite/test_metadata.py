"""What a network says of itself after conversion: sizes in its `pretrained_cfg` and `default_cfg`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.layers.test_time_pool import apply_test_time_pool
from timm.models._pretrained import PretrainedCfg
from torch import nn

import padfree
from padfree.rules._toys import net, unit

SIZE = (3, 32, 32)


def build(**fields: Any) -> nn.Sequential:
    model = net(unit(8, 8, stride=2))
    model.pretrained_cfg = model.default_cfg = {"input_size": SIZE, "pool_size": (16, 16), **fields}  # type: ignore[assignment]
    return model


def described(model: nn.Module, **arguments: Any) -> Any:
    return padfree.convert(model, **{"input_size": SIZE, **arguments}).pretrained_cfg


def test_the_pool_is_that_of_the_last_map() -> None:
    model = build(classifier="head")
    converted: Any = padfree.convert(model)
    assert converted.pretrained_cfg == {"input_size": SIZE, "pool_size": (15, 15), "classifier": "head"}
    assert converted.default_cfg is converted.pretrained_cfg
    again = converted.padfree_plan.apply(model)
    assert again.pretrained_cfg == converted.pretrained_cfg


def test_a_shared_description_is_not_written_into() -> None:
    model = build()
    shared: Any = model.pretrained_cfg
    before = copy.deepcopy(shared)
    converted: Any = padfree.convert(model, inplace=True)
    assert converted is model and shared == before and model.pretrained_cfg is not shared
    assert model.pretrained_cfg["pool_size"] == (15, 15)  # type: ignore[index]


def test_the_size_is_that_at_the_descriptions_own_input_size() -> None:
    assert described(build(input_size=(3, 64, 64), pool_size=(32, 32)))["pool_size"] == (31, 31)
    assert described(build(pool_size=[16, 16]))["pool_size"] == [15, 15]


@pytest.mark.parametrize("pool", [None, (1, 1), (7, 7), "all", ()])
def test_a_pool_that_is_no_map_of_the_network_stays(pool: Any) -> None:
    assert described(build(pool_size=pool))["pool_size"] == pool


@dataclass(frozen=True)
class Description:
    """A frozen one."""

    input_size: tuple[int, ...] = SIZE
    pool_size: tuple[int, ...] | None = (16, 16)


@pytest.mark.parametrize("kind", [Description, PretrainedCfg])
def test_dataclasses(kind: Any) -> None:
    model = build()
    cfg = model.default_cfg = kind(input_size=SIZE, pool_size=(16, 16))  # type: ignore[assignment]
    converted: Any = padfree.convert(model)
    assert type(converted.default_cfg) is kind and converted.default_cfg.pool_size == (15, 15)
    assert converted.pretrained_cfg["pool_size"] == (15, 15) and cfg.pool_size == (16, 16)


class Fixed(nn.Module):
    """It takes images of at least as many pixels as its window needs after two strided layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(unit(8, 8, stride=2), unit(8, 8, stride=2))[:3]
        self.window = nn.Conv2d(8, 4, 7)
        self.pretrained_cfg = {"input_size": (3, 40, 40), "min_input_size": (3, 28, 28), "pool_size": (10, 10)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.window(self.body(x)).mean((2, 3))
        return out


def test_a_least_image_that_is_too_small_now_becomes_the_one_converted_at() -> None:
    cfg: Any = padfree.convert(Fixed()).pretrained_cfg  # type: ignore[union-attr]
    assert cfg == {"input_size": (3, 40, 40), "min_input_size": (3, 40, 40), "pool_size": (9, 9)}


def test_a_conversion_that_fails_leaves_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree.rewrite import operations

    model = build()
    cfg = model.pretrained_cfg

    def fail(*arguments: Any) -> None:
        done(*arguments)
        if arguments[0] is model:
            raise RuntimeError("afterwards")

    done = operations._DO[operations.Describe]
    monkeypatch.setitem(operations._DO, operations.Describe, fail)
    with pytest.raises(RuntimeError, match="afterwards"):
        padfree.convert(model, inplace=True)
    assert model.pretrained_cfg is cfg and model.default_cfg is cfg and not padfree.is_converted(model)


def test_test_time_pooling_of_timm() -> None:
    converted: Any = padfree.convert(timm.create_model("resnet18")).eval()
    with torch.no_grad():
        side = converted.forward_features(torch.randn(1, 3, 224, 224)).shape[-1]
    assert converted.default_cfg["pool_size"] == (side, side) == (6, 6)
    assert timm.create_model("resnet18").default_cfg["pool_size"] == (7, 7)
    pooled, done = apply_test_time_pool(converted, {"input_size": (3, 240, 240)})
    assert done and pooled.eval()(torch.randn(1, 3, 240, 240)).shape == (1, 1000)
