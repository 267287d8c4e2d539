"""The sweep itself: its counts by hand, its isolation, its fixed sample."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import catalogue, coverage, tables
from benchmarks.measure import Result, macs, measure
from padfree.files.sources import Source
from padfree.record.recording import record
from padfree.report.macs import count_macs
from tests.benchmarks import misbehaving


def test_the_fixed_sample_has_names_that_exist() -> None:
    assert len(catalogue.SAMPLE) == len(set(catalogue.SAMPLE)) >= 60
    assert set(catalogue.SAMPLE) <= set(catalogue.all_sources()) | {
        name for name in catalogue.SAMPLE if name.startswith("bsconv:")
    }
    assert len(catalogue.bsconv_sources()) == len(set(catalogue.bsconv_sources())) == 30
    assert len(catalogue.all_sources()) > 1400


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "regnetx_002"])
def test_recorded_multiply_adds_agree_with_fvcore(name: str) -> None:
    model = timm.create_model(name)
    assert macs(record(model, (3, 96, 96))) == pytest.approx(count_macs(model, (3, 96, 96)).macs, rel=2e-3)


def test_rows_of_known_models() -> None:
    full = measure("timm:lcnet_035")
    assert (full.status, full.depthwise, full.stem, full.located) == ("full", 4, 1, full.sites)
    assert full.dw_located == full.dw_sites == 4
    assert full.params_after is not None and full.params_before is not None
    assert full.params_after > full.params_before
    nothing = measure("timm:vit_tiny_patch16_224")
    assert (nothing.status, nothing.candidates) == ("nothing", 0)
    unbuilt = measure("timm:no_such_model")
    assert unbuilt.status == "unbuilt"
    assert "timm has no model" in unbuilt.reason


def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("inside padfree")

    monkeypatch.setattr("padfree.plan", crash)
    row = measure("timm:lcnet_035")
    assert (row.status, row.reason) == ("crash", "ZeroDivisionError: inside padfree")


def test_a_worker_that_dies_or_sleeps_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = tmp_path / "asleep"
    clock = SimpleNamespace(monotonic=lambda: 1e6 if asleep.exists() else 0.0)  # it jumps once one sleeps
    monkeypatch.setattr(coverage, "_work", misbehaving.work)
    monkeypatch.setattr(coverage, "time", clock)
    names = ["a", "dies", "b", f"sleeps@{asleep}", "c"]
    rows = list(coverage.sweep(names, timeout=3, processes=1))
    assert [row["name"] for row in rows] == names
    assert [row["status"] for row in rows] == ["full", "crash", "full", "timeout", "full"]
    assert rows[1]["reason"] == "the process died with exit status 7"
    assert (rows[3]["seconds"], rows[3]["reason"]) == (1e6, "over 3 seconds")


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_work", misbehaving.work)
    cache = tmp_path / "cache" / "rows.jsonl"
    first = coverage.run(["a", "b"], cache, timeout=600)
    with cache.open("a") as file:
        file.write('{"name": "half')
    monkeypatch.setattr(
        coverage, "sweep", lambda names, timeout, features: pytest.fail(f"{names} again") if names else []
    )
    assert coverage.run(["b", "a"], cache, timeout=600) == first[::-1]


def test_the_tables(tmp_path: Path) -> None:
    rows = [
        Result("timm:a", "full", candidates=2, dw_sites=1, sites=3, located=3, depthwise_alone=True).to_dict(),
        Result("timm:b", "part", candidates=1, sites=2, located=1, missing=["x"], reason="`x`: 14 | 13").to_dict(),
        Result("bsconv:c", "crash", reason="KeyError: 1").to_dict(),
    ]
    text = "\n".join(tables.totals(rows))
    assert "3 models, 2 of them with something to convert, 1 with strided depthwise" in text
    assert "converted: 2 (1 fully, 1 in part); of those with something to convert: 2 (1 fully)" in text
    assert "strided convolutions: 5, named by a plan: 4" in text
    assert "crashes: 1; broken by conversion: 0; old keys or order changed: 0" in text
    tables.write_tables(rows, tmp_path)
    page = (tmp_path / "coverage.md").read_text()
    assert "| timm | 2 | 1 | 1 | 0 | 0 | 0 | 0 |" in page
    assert r"| 1 | `...`: n \| n |" in page
    assert "- crash: `bsconv:c`: KeyError: 1" in page
    assert len((tmp_path / "coverage.csv").read_text().splitlines()) == 4


def test_the_published_totals_are_those_of_the_published_rows() -> None:
    root = Path(__file__).parents[2]
    with (root / "docs" / "coverage.csv").open(newline="", encoding="utf-8") as file:
        rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
    page, readme = ((root / name).read_text() for name in ("docs/coverage.md", "README.md"))
    if f"timm {timm.__version__}," in page:
        assert {row["name"] for row in rows} >= {name for name in catalogue.all_sources() if name.startswith("timm:")}
    for line in tables.totals(rows):
        assert f"- {line}\n" in page
        assert f"- {line}\n" in readme


def _value(text: str) -> int | str | bool | None:
    known: dict[str, bool | None] = {"": None, "True": True, "False": False}
    return known[text] if text in known else int(text) if text.isdigit() else text


@pytest.mark.slow
def test_the_fixed_sample_converts_without_a_fault() -> None:
    assert coverage.main(["--fixed"]) == 0


def test_video_models_get_frames() -> None:
    assert catalogue.input_size(Source("torchvision", "r3d_18")) == (3, 16, 224, 224)
    assert catalogue.input_size(Source("torchvision", "resnet18")) is None
    assert torch.get_default_device() == torch.device("cpu")
