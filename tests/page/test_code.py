"""The page's code to reproduce it, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import padfree
from padfree.files.sources import Source
from padfree.page.content import Request, content

NESTED = """
from torch import nn


class Zoo:
    @staticmethod
    def make(width=4):
        return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1, groups=width))
"""


@pytest.mark.parametrize(
    "source",
    [
        Source("bsconv", "cifar_mobilenetv1_w1d4", {}),
        Source("factory", "zoo_of_page:Zoo.make", {"width": 6}),
        Source("timm", "lcnet_035", {"num_classes": 3}),
    ],
    ids=lambda source: source.library,
)
def test_it_makes_the_converted_network(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zoo_of_page.py").write_text(NESTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    original = source.create()
    size = (3, 64, 64)
    plan = padfree.plan(original, input_size=size)
    converted = plan.apply(original)
    request = Request(original, converted, plan, padfree.compare(original, converted, size), source)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    made: dict[str, nn.Module] = {}
    exec(content(request)["code"], made)
    shapes = {key: value.shape for key, value in converted.state_dict().items()}
    assert {key: value.shape for key, value in made["converted"].state_dict().items()} == shapes
    made["converted"].load_state_dict(converted.state_dict())
    x = torch.rand(1, *size)
    torch.testing.assert_close(made["converted"].eval()(x), converted.eval()(x))
    assert "->" in capsys.readouterr().out
