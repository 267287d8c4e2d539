"""The matrix of runtimes: what is kept, what is reported, and one cell measured as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import deploy, deploy_cell, deploy_page, deploy_runtimes, int8
from benchmarks.deploy_runtimes import Ready, Runtime
from padfree.rules._toys import depthwise, net, unit

KEY = {"network": "timm:resnet18", "side": 32, "runtime": "ONNX Runtime", "bits": "fp32"}
PLAIN = {"size": {"original": 2_000_000, "padfree": 1_000_000}, "difference": {"original": 0.0, "padfree": 1e-6}}


def cell(network: str, ratio: float | None = None, **changes: Any) -> dict[str, Any]:
    figures = {} if ratio is None else {"ratio": {"median": ratio}, "control": {"median": 1 / ratio}}
    return {"key": {**KEY, "network": network, **changes}, **PLAIN, "failed": {}, **figures}


def test_the_table_has_a_row_a_runtime_and_a_mean_where_all_of_the_papers_networks_are_there() -> None:
    found = [cell(name, ratio) for name, ratio in zip(deploy.PAPER, (0.5, 2.0, 1.0, 1.0), strict=True)]
    found += [cell("timm:resnet18", 0.8), cell("timm:resnet18", runtime="Core ML")]
    found[-1]["failed"] = {"padfree": "ValueError: no such operator"}
    text = deploy_page.page(found)
    ones = "1.00 (1.00) | 1.00 (1.00)"
    assert f"| ONNX Runtime | fp32 | 32 | 0.50 (2.00) | 2.00 (0.50) | {ones} | 0.80 (1.25) | 1.00 (1.00) |" in text
    assert "| Core ML | fp32 | 32 |  |  |  |  | fails |" in text
    assert "- Core ML fp32, timm:resnet18, padfree: ValueError: no such operator" in text
    assert "2.0 / 1.0; 0e+00 / 1e-06 |" in text and "differs" not in text
    assert "downsampling" not in text
    found.append(cell("timm:resnet18", 0.25, form="downsampling-only"))
    again = deploy_page.page(found)
    assert "| ONNX Runtime | fp32 | 32 |  |  |  |  | 0.25 (4.00) |  |" in again
    assert "| ONNX Runtime | fp32 | 32 |  |  |  |  | downsampling 0.25 |" in again
    found += [
        cell(name, ratio, form="downsampling-only") for name, ratio in zip(deploy.PAPER, (0.75, 1.5), strict=False)
    ]
    assert "| ONNX Runtime | fp32 | 32 | both 0.50 | original |  |  | downsampling 0.25 |" in deploy_page.page(found)
    found[0]["difference"] = {"original": 0.0, "padfree": 0.1}
    assert "1e-01 **differs**" in deploy_page.page(found)
    assert deploy_page.geometric({name: found[0] for name in deploy.PAPER[:3]}) == ""


def test_tables_go_between_the_marks() -> None:
    page = f"before\n{deploy_page.BEGIN}\nold\n{deploy_page.END}\nafter"
    once = deploy_page.insert(page, "new")
    assert once == f"before\n{deploy_page.BEGIN}\n\nnew\n\n{deploy_page.END}\nafter"
    assert deploy_page.insert(once, "new") == once
    with pytest.raises(ValueError, match="needs the lines"):
        deploy_page.insert("nothing", "new")
    docs = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    for begin, end in ((deploy_page.BEGIN, deploy_page.END), (int8.BEGIN, int8.END)):
        assert "anew" in deploy_page.insert(docs, "anew", begin, end)


def test_cells_are_kept_and_a_runtime_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "deploy.jsonl"
    assert deploy.known(path) == []
    deploy.keep([cell("a"), cell("b")], path)
    assert deploy.known(path) == [cell("a"), cell("b")] and list(path.parent.iterdir()) == [path]
    absent = Runtime(("no_such_runtime",), ("fp32",), deploy_runtimes.fused)
    monkeypatch.setitem(deploy_runtimes.RUNTIMES, "Absent", absent)
    assert deploy.wanted(["a"], ["Absent"], 32) == []
    assert "Absent: left out: not installed (no_such_runtime)" in capsys.readouterr().err
    keys = deploy.wanted(["a"], ["ONNX Runtime"], 32)
    assert [key["bits"] for key in keys] == ["fp32", "int8"]
    alone = deploy.wanted(["a"], ["ONNX Runtime"], 32, "downsampling-only")
    assert alone == [{**key, "form": "downsampling-only"} for key in keys]


def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(key: dict[str, Any], limit: float, flags: list[str]) -> dict[str, Any]:
        asked.append(key)
        return {**cell(key["network"], 0.5), "key": key}

    monkeypatch.setattr(deploy, "measured", measured)
    page, kept = tmp_path / "page.md", tmp_path / "deploy.jsonl"
    page.write_text(f"{deploy_page.BEGIN}\n{deploy_page.END}\n")
    argv = ["deploy", "--networks", "timm:resnet18", "--runtimes", "fused eager", "torch.compile", "--json", str(kept)]
    for extra, count in (([], 2), ([], 2), (["--restart"], 4), (["--report", "--page", str(page)], 4)):
        monkeypatch.setattr(sys, "argv", [*argv, *extra])
        assert deploy.main() == 0
        assert len(asked) == count and len(deploy.known(kept)) == 2
    assert "0.50 (2.00)" in page.read_text()


def test_a_process_that_ends_without_a_cell_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashed(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], -11, "", "first\nlast words\n")

    def slow(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 3)

    monkeypatch.setattr(subprocess, "run", crashed)
    assert deploy.measured(KEY, 3, [])["failed"] == {"process": "status -11: last words"}
    monkeypatch.setattr(subprocess, "run", slow)
    assert deploy.measured(KEY, 3, [])["failed"] == {"process": "not finished after 3 s"}


def networks(name: str, side: int, variant: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(net(unit(8, 12, 1), depthwise(12), unit(12, 8, 1)).eval() for _ in range(2))  # type: ignore[return-value]


def test_a_cell_has_ratio_and_control_and_a_form_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_cell, "build", networks)
    found = deploy_cell.measure({**KEY, "runtime": "fused eager"}, 2, 2, 1e-3)
    assert found["failed"] == {} and json.loads(json.dumps(found)) == found
    assert set(found["ms"]) == {"original", "padfree", "control"} and found["ratio"]["median"] > 0
    assert max(found["difference"].values()) < 1e-5 and found["size"] == {"original": None, "padfree": None}

    def half(model: nn.Module, images: list[torch.Tensor], folder: Path, bits: str) -> Ready:
        assert folder.is_dir() and [len(batch) for batch in images] == [1, deploy_cell.CALIBRATION - 1]
        if folder.name == "padfree":
            raise ValueError("no such operator\nand more")
        return Ready(7, lambda: lambda x: 2 * model(x))

    monkeypatch.setitem(deploy_runtimes.RUNTIMES, "half", Runtime((), ("fp32",), half))
    found = deploy_cell.measure({**KEY, "runtime": "half"}, 1, 2, 1e-3)
    assert found["failed"] == {"padfree": "ValueError: no such operator"} and "ratio" not in found
    assert found["difference"]["original"] == pytest.approx(1) and found["size"] == {"original": 7}


RUNNABLE = [
    (name, bits)
    for name, runtime in deploy_runtimes.RUNTIMES.items()
    for bits in runtime.bits
    if name not in ("fused eager", "torch.compile")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), RUNNABLE)
def test_a_runtime_takes_a_padding_free_network(name: str, bits: str, tmp_path: Path) -> None:
    import padfree

    if missing := deploy_runtimes.RUNTIMES[name].missing():
        pytest.skip(f"not installed: {missing}")
    torch.manual_seed(0)
    stem = unit(3, 8, 3, 2)
    model = padfree.convert(
        net(unit(8, 12, 1), depthwise(12), unit(12, 8, 1), stem=stem), input_size=(3, 32, 32)
    ).eval()
    images = [torch.randn(count, 3, 32, 32) for count in (1, 15)]
    ready = deploy_runtimes.prepared(name, model, images, tmp_path / "a", bits)
    assert ready.size
    found = deploy_cell.difference(ready, model, images[0])
    assert found is None or found < {"fp32": 1e-4, "int8": 0.2}[bits]


def test_the_table_of_int8_takes_differences_seed_by_seed() -> None:
    key = {"data": "photos", "family": "resnet", "variant": "padfree", "steps": 640}
    figures = [(90.0, 89.0, 30.0), (80.0, 79.0, 34.0)]
    found = [
        {"key": {**key, "seed": seed}, "float": a, "int8": b, "decibels": c} for seed, (a, b, c) in enumerate(figures)
    ]
    text = int8.page(found)
    assert "| photos | resnet | padding-free | 85.0 ± 7.1 | 84.0 ± 7.1 | 1.00 ± 0.00 | 32.0 ± 2.8 |" in text
    assert "2 seed(s), 640 steps" in text
