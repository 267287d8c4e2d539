"""Both commands: what `--version` says, and that flags are written out."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from padfree.recipes import cli as recipes_cli
from torch import nn

import padfree
from padfree.cli import convert as convert_cli
from padfree.rules._toys import depthwise, unit

SMALL = ["--timm", "lcnet_035", "--input-size", "3", "64", "64", "--plan-only"]


@pytest.mark.parametrize("main", [convert_cli.main, recipes_cli.main], ids=["convert", "recipes"])
def test_the_version_is_told(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])  # type: ignore[operator]
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"padfree {padfree.__version__}") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize("words", ["C kernels: available", "C kernels: missing"])
def test_the_version_names_the_kernels(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("padfree.kernels.describe", lambda: words)
    with pytest.raises(SystemExit):
        convert_cli.main(["--version"])
    assert capsys.readouterr().out == f"padfree {padfree.__version__}; {words}\n"


@pytest.mark.parametrize(
    ("main", "argv", "flag"),
    [
        (convert_cli.main, [*SMALL, "--incl", "x"], "--incl"),
        (convert_cli.main, [*SMALL, "--stem"], "--stem"),
        (convert_cli.main, ["--tim", "lcnet_035"], "--tim"),
        (convert_cli.main, ["--vers"], "--vers"),
        (recipes_cli.main, ["train", "digits/resnet20", "--res"], "--res"),
        (recipes_cli.main, ["train", "digits/resnet20", "--see", "1"], "--see"),
        (recipes_cli.main, ["evaluate", "x", "--check", "last"], "--check"),
        (recipes_cli.main, ["table", "--rec", "x"], "--rec"),
        (recipes_cli.main, ["list", "--js"], "--js"),
        (recipes_cli.main, ["--vers"], "--vers"),
    ],
)
def test_flags_are_not_abbreviated(
    main: object, argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2  # type: ignore[operator]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (
        f"unrecognized arguments: {flag}" in err or "is required" in err or "are required" in err
    )


class Masks(nn.Module):
    """A mask of its image's sides, whatever lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(3, 8), unit(8, 8), depthwise(8), unit(8, 8))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.body(x))


def test_an_output_that_gets_smaller_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mask_makers", types.SimpleNamespace(masks=Masks))  # type: ignore[arg-type]
    command = ["--model", "mask_makers:masks", "--input-size", "3", "32", "32", "--rules", "depthwise"]
    assert convert_cli.main([*command, "--plan-only"]) == 0
    assert "0 places to convert" in capsys.readouterr().out
    assert convert_cli.main([*command, "--allow-resize"]) == 0
    out = capsys.readouterr().out
    assert "1 place to convert" in out and "32x32 -> 30x30" in out


@pytest.mark.parametrize(("flags", "passes"), [((), 1), (("--no-check",), 0)])
def test_the_real_pass_can_be_left_out(
    flags: tuple[str, ...], passes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planning, made = sys.modules["padfree.plan.planning"], []
    real_run = planning.real_run
    monkeypatch.setattr(planning, "real_run", lambda *arguments: made.append(1) or real_run(*arguments))
    assert convert_cli.main([*SMALL, *flags]) == 0
    assert "to convert" in capsys.readouterr().out and len(made) == passes
