"""Both commands: what `--version` says, and that flags are written out."""

from __future__ import annotations

import pytest
from padfree.recipes import cli as recipes_cli

import padfree
from padfree.cli import convert as convert_cli

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
