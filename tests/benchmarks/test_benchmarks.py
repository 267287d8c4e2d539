"""What the benchmarks say beside their clocks: agreement of files, kinds of operations, smallest ratios."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import agreement, latency, shares

pytest.importorskip("onnxruntime")


def test_an_exported_model_agrees() -> None:
    row = agreement.measure("timm:test_resnet")
    assert (row["status"], row["sides"]) == ("agrees", "free")
    assert 0 <= row["difference"] <= agreement.LIMIT


def test_a_file_of_another_network_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: Any, session: Any, shape: tuple[int, ...]) -> float:
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        return honest(model, session, shape)

    honest = agreement._difference
    monkeypatch.setattr(agreement, "_difference", other)
    assert agreement.measure("timm:test_resnet")["status"] == "off"


def test_what_cannot_be_compared_says_why() -> None:
    row = agreement.measure("timm:test_vit")
    assert row["status"] == "nothing to convert" and "patchify" in row["reason"]
    text = agreement.table([row])
    assert "1 models, 0 written and compared, 0 agree" in text and "patchify" in text


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("FusedConv", "convolution"),
        ("aten::native_batch_norm", "norm"),
        ("aten::maximum", "max-pool"),
        ("MaxPool", "max-pool"),
        ("aten::addmm", "matrix product"),
        ("aten::add_", "sum"),
        ("ReorderInput", "layout"),
        ("aten::hardswish_", "activation"),
        ("aten::empty", "other"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert shares.kind_of(operator) == kind


def test_the_profiler_sees_the_pools() -> None:
    found = shares.shares("mobilenetv3-large", 32, 1, "eager", runs=2)
    assert found["max-pool"][0] == 0 < found["max-pool"][1]


def test_shares_add_up_to_the_originals_time() -> None:
    found = shares.shares("timm:test_resnet", 64, 1, "onnxruntime", runs=1)
    assert sum(before for before, _ in found.values()) == pytest.approx(100)
    assert min(found["max-pool"]) > 0 and min(found["convolution"]) > 0


def test_latency_of_any_librarys_network() -> None:
    assert latency.network("ghostnet") == "ghostnet" and latency.network("timm:lcnet_035") == "timm:lcnet_035"
    with pytest.raises(argparse.ArgumentTypeError, match="no network 'ghostnets'; there are mobilenetv3-large"):
        latency.network("ghostnets")
    original, converted = latency.build("timm:lcnet_035", 64)
    assert converted.padfree_plan.input_size == (3, 64, 64) and not converted.training
    assert original(torch.randn(1, 3, 64, 64)).shape == converted(torch.randn(1, 3, 64, 64)).shape
    with pytest.raises(latency.NotHere, match="timm has no model 'nope'"):
        latency.build("timm:nope", 224)


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("[a-z]*.py")))
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__
