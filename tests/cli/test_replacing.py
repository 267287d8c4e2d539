"""`padfree-convert --replace`: requests, reports, and the file that comes of it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from torch import nn

import padfree
from padfree.cli.convert import main
from padfree.layers.separable import BSConvS
from padfree.rules._toys import net, unit


def build() -> nn.Module:
    return net(unit(8, 16, stride=2), unit(16, 16, 1), out=16)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(sys.modules, "own_nets", types.SimpleNamespace(build=build))  # type: ignore[arg-type]
    return ["--model", "own_nets:build", "--input-size", "3", "32", "32"]


def test_replaced_then_converted(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "net.safetensors", tmp_path / "report.json"
    wanted = ["--replace", "bsconv-s", "p=0.5", "include=1", "--replace", "learned-groups", "groups=2"]
    assert main([*command, *wanted, "--output", str(output), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "first at 3x32x32: 1 place to convert (1 bsconv_s)" in out
    assert "1.0: 8 -> 4 -> 16, 3x3: 1,152 -> 240 parameters (fresh)" in out
    assert "2.0: 16 -> 16 in 2 groups: 256 -> 64 parameters after 3 stages" in out
    assert "dense      1.0.dw: 32x32 -> 16x16 becomes 15x15" in out
    content = json.loads(report.read_text())
    assert [plan["matches"][0]["rule"] for plan in content["earlier"]] == ["bsconv_s", "learned_groups"]
    loaded = padfree.load(output, factory=build)
    assert type(loaded[1][0]) is BSConvS and list(loaded.state_dict())[-2:] == ["3.2.weight", "3.2.bias"]
    assert content["params"]["converted"] == sum(p.numel() for p in loaded.parameters())


def test_replaced_only(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--replace", "bsconv-u", "kernel_sizes=3x3,1x5", "with_bn=true", "init=svd", "exclude=0"]
    assert main([*command, *wanted, "--replace-only", "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "1.0: 8 -> 16, 3x3, norms: 1,152 -> 304 parameters (svd)" in out and "becomes" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replace", "bsconv"], "kind is 'bsconv'; it takes one of 'bsconv-u'"),
        (["--replace", "bsconv-u", "q=1"], "a key of kernel_sizes, p, with_bn, init, groups"),
        (["--replace", "bsconv-u", "svd"], "not 'svd'"),
        (["--replace", "bsconv-s", "p=a"], "--replace p=a: 'a' is nothing that p takes"),
        (["--replace", "bsconv-s", "kernel_sizes=3x3x3"], "is nothing that kernel_sizes takes"),
        (["--replace", "bsconv-s", "with_bn=1"], "is nothing that with_bn takes"),
        (["--replace", "bsconv-s", "p=1", "p=1"], "says p twice"),
        (["--replace", "bsconv-u", "kernel_sizes=7"], "nothing to replace by bsconv-u"),
        (["--replace-only"], "--replace-only is about --replace"),
        (["--replace"], "expected at least one argument"),
    ],
)
def test_requests_that_cannot_be_met(
    flags: list[str], words: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
