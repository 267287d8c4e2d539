"""The converted networks are the paper's: golden logits, exact parameters, exact operation counts."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import golden_values as golden
import pytest
import torch
from bsconv.pytorch import ModelProfiler
from fvcore.nn import FlopCountAnalysis
from paper_networks import GOLDEN, NETWORKS

import padfree

ROWS: list[dict[str, Any]] = [
    row
    for row in json.loads((Path(__file__).parents[1] / "data" / "paper_rows.json").read_text())
    if (row["table"], row["model"]) in NETWORKS and row["variant"] in ("original", "padfree")
]


def _id(row: dict[str, Any]) -> str:
    return f"{row['table']}/{row['model']}/{row['variant']}"


def test_all_rows_are_there() -> None:
    assert len(ROWS) == 30
    assert len({(row["table"], row["model"]) for row in ROWS}) == len(NETWORKS) == 15


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(name: str) -> None:
    build, options = NETWORKS[GOLDEN[name]]
    side, reference = golden.load(name)
    torch.manual_seed(0)
    model = build()
    converted = padfree.convert(model, options=options, input_size=(3, side, side))
    x = golden.batch(side)
    assert golden.relative_error(golden.fill(converted)(x), reference) < 1e-4
    assert golden.relative_error(golden.fill(model)(x), reference) > 0.1


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits_notice_a_wrong_reading(name: str) -> None:
    build, options = NETWORKS[GOLDEN[name]]
    side, reference = golden.load(name)
    wrong = padfree.Options(
        merge="conv" if options.merge == "activation" else "activation", projection=options.projection
    )
    converted = padfree.convert(build(), options=wrong, input_size=(3, side, side))
    assert golden.relative_error(golden.fill(converted)(golden.batch(side)), reference) > 4e-3


def _large(row: dict[str, Any]) -> bool:
    """At 224 pixels, or a hundred layers: the recipes' own table tests the same figures of these by default."""
    return row["input_side"] > 64 or "110" in row["model"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=_id(row), marks=[pytest.mark.slow] if _large(row) else []) for row in ROWS]
)
def test_row(row: dict[str, Any]) -> None:
    build, options = NETWORKS[row["table"], row["model"]]
    side, measured = row["input_side"], row["measured"]
    model = build()
    if row["variant"] == "padfree":
        model = padfree.convert(model, options=options, input_size=(3, side, side))
    model.eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == measured["params"]
    if row["count"] == "bsconv":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # activations the profiler does not count
            counted = ModelProfiler(copy.deepcopy(model), (1, 3, side, side)).total_flop_count
        assert counted + measured["downsampling_pool_inputs"] == measured["flops"]
    else:
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        analysis = FlopCountAnalysis(model, torch.zeros(1, 3, side, side))
        by_operator = analysis.by_operator()
        assert by_operator["conv"] + by_operator["linear"] == measured["conv_linear"]
        assert analysis.total() == pytest.approx(measured["flops"], rel=5e-3)


def test_bsconvs_loss_of_the_copy_reads_the_copy() -> None:
    build, options = NETWORKS["cifar100-first", "mobilenetv3-large-bsconvs"]
    model = build()
    converted = padfree.convert(model, options=options, input_size=(3, 32, 32))
    before = model.reg_loss()
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if name.endswith("conv3.conv.weight"):
                parameter.zero_()
    torch.testing.assert_close(model.reg_loss(), before)
    assert not torch.isclose(converted.reg_loss(), before)
    converted.reg_loss().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in converted.parameters())
