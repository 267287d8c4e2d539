"""What the benchmarks say beside their clocks: agreement of files, kinds of operations, smallest ratios."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import timm
import torch

import padfree
from benchmarks import agreement, clock, floor, latency, onepass, shares
from padfree import native

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
    assert found["one pass"][0] == 0 < found["one pass"][1]


def test_shares_add_up_to_the_originals_time() -> None:
    found = shares.shares("shufflenetv2-x1.0", 32, 1, "onnxruntime", runs=3)
    assert sum(before for before, _ in found.values()) == pytest.approx(100)
    assert found["max-pool"][1] > found["max-pool"][0] > 0
    assert found["other"][0] < 50


@pytest.mark.parametrize("copying", [True, False])
def test_an_ideal_pass_keeps_the_shapes_and_is_taken_away_again(copying: bool) -> None:
    converted = padfree.convert(timm.create_model("mobilenetv3_small_050").eval())
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = converted(image)
        ideal = floor.IdealPass(copying)
        with ideal():
            first, second = converted(image), converted(image)
        torch.testing.assert_close(converted(image), wanted, rtol=0, atol=0)
        with latency.plain_pools():
            torch.testing.assert_close(converted(image), wanted)
    assert first.shape == wanted.shape
    assert not torch.allclose(first, wanted)  # nothing was computed
    assert ideal.results and torch.equal(first, second)  # the maps are made once and never written to


def test_the_floors_table_has_the_geometric_mean() -> None:
    def row(network: str, time: float) -> dict[str, Any]:
        made: dict[str, Any] = {"network": network, "side": 32, "batch": 1, "macs": time, "bytes": time}
        for layout in floor.LAYOUTS:
            made[f"convs {layout}"] = {"median": time}
            made[f"whole {layout}"] = {key: {"median": time} for key in ("now", "modules", "copy", "free")}
        return made

    *_, last = floor.table([row("a", 0.5), row("b", 2.0)]).splitlines()
    assert last == "| geometric mean | 32 | 1 |" + " 1.00 |" * 12


@pytest.mark.skipif(native.extension is None, reason="the C extension was not built")
@pytest.mark.parametrize("layout", onepass.LAYOUTS)
def test_the_pass_is_measured_beside_its_modules(layout: str) -> None:
    x = torch.randn(1, 8, 15, 16).contiguous(memory_format=onepass.LAYOUTS[layout])
    with torch.inference_mode():
        rows = [
            onepass.measure("a chain", layout, onepass.chain(x, 3, 0, (3, 0), "relu"), rounds=1),
            onepass.measure("a stem", layout, onepass.stem(x), rounds=1),
            onepass.measure("a mix", layout, onepass.mix(x, 3, 0, 5), rounds=1),
        ]
    assert [list(row["microseconds"]) for row in rows] == [["chain", "modules", "pass"]] * 2 + [["apart", "together"]]
    *_, heads, _, last = onepass.table(rows, clock.machine()).splitlines()
    assert heads.endswith("| layout | apart | together | together / apart |")
    assert last.startswith(f"| a mix | {layout} | ")


def test_latency_of_any_librarys_network() -> None:
    assert latency.network("ghostnet") == "ghostnet" and latency.network("timm:lcnet_035") == "timm:lcnet_035"
    with pytest.raises(argparse.ArgumentTypeError, match="no network 'ghostnets'; there are mobilenetv3-large"):
        latency.network("ghostnets")
    original, converted = latency.build("timm:lcnet_035", 64)
    assert converted.padfree_plan.input_size == (3, 64, 64) and not converted.training
    assert original(torch.randn(1, 3, 64, 64)).shape == converted(torch.randn(1, 3, 64, 64)).shape
    with pytest.raises(latency.NotHere, match="timm has no model 'nope'"):
        latency.build("timm:nope", 224)
