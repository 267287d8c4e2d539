"""Every table of both commands in 80 columns, of rows that are as long as they get."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from padfree.recipes import benchmark, cli, compare, names
from padfree.recipes.checkpoints import Epoch, Progress

from padfree.advise.results import Advice, Ratio, Row
from padfree.indices import DomainId
from padfree.report.comparison import Comparison, Pair, StageMap
from padfree.report.costs import Cost
from padfree.report.display import show
from padfree.report.places import Place
from padfree.types import Match, Options, PlanData, Returned, Skip

LONG = "backbone.features.stage_3.block_11.downsampling.depthwise_convolution.conv"
SIZES = ((1120, 1120), (560, 560), (559, 559))
PLAN = PlanData(
    "Network",
    (3, 1120, 1120),
    Options(),
    tuple(Match(rule, LONG, "", DomainId(1), *SIZES, {"op": 1}) for rule in ("depthwise", "projection", "stem")),
    (Skip(LONG, "in `x` something reads maps of 7x7 and 14x14, and nothing says how their sizes must fit " * 3),),
    outputs=(Returned("features.0", (1, 64, 56, 56), (1, 64, 55, 55)),),
)
COST = Cost(123_456_789, 98_765_432_100, 1)
COMPARISON = Comparison(
    model="Network",
    input_size=(3, 1120, 1120),
    params=Pair(1_234_567_890, 1_234_567_891),
    macs=Pair(98_765_432_100, 98_765_432_101),
    maps=tuple(StageMap((1120 - n, 1119), (1119 - n, 1118)) for n in range(20)),
    minimum_input=1000,
    uncounted={f"operation_{n}_": Pair(1000, 2000) for n in range(9)},
    notes=("fvcore cannot count it: " + "RuntimeError and so on " * 9,),
    outputs=PLAN.outputs,
    init="preserve",
    new_layers=12,
    last_map_size=(3, 1200, 1200),
    last_map_macs=10**12,
    places=(Place(LONG, ("depthwise",), COST, COST, COST), Place("", (), COST, Cost(), Cost())),
)


def widest(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def test_the_comparison() -> None:
    text = str(COMPARISON)
    assert widest(text) <= 80
    assert all(f"operation_{n}_" in text for n in range(6)) and "197.531G" not in text
    assert "+98.765G" in text and "+246,913,578" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_what_padfree_convert_shows(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    show("timm:network", PLAN, COMPARISON)
    out = capsys.readouterr().out
    assert "…" not in out and "elsewhere" in out and "sum" in out
    if terminal:
        assert widest(out) <= 80
    else:  # a place a line, for grep; the tables below them fit
        items = [line for line in out.splitlines() if line.startswith("  ") and LONG in line]
        assert len(items) == 4
        assert widest("\n".join(line for line in out.splitlines()[1:] if line not in items)) <= 80


def test_advice() -> None:
    time = Ratio(10.25, 10.05, 10.55)
    figures = {"params": 123_456_789, "macs": 12_345_678_900, "milliseconds": 1234.56, "time": time}
    rows = tuple(
        Row(form, ("depthwise",), 12, **figures, minimum_input=1000)  # type: ignore[arg-type]
        for form in ("original", "stem", "downsampling", "both")
    )
    places = (
        Row(f"{LONG} and 3 more", ("dense",), 4, **figures),  # type: ignore[arg-type]
        Row("first", ("stem",), 1, reason="it is not rewritten alone, " * 9),
    )
    rules = " ".join(["rule"] * 30)
    advice = Advice("Network", (3, 1120, 1120), 1, "onnxruntime", rows, time, "both", f"because {rules}", places)
    text = str(advice)
    assert widest(text) <= 80
    begins = text.index("one place alone:")
    assert LONG in "".join(line[:21].strip() for line in text[begins:].splitlines()[1:])
    assert " ".join(text.split()).count("it is not rewritten alone") == 9


def test_list_has_a_description_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert widest(out) <= 80
    lines = out.splitlines()
    starts = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert tuple(starts) == names()
    bare = [index for index, line in enumerate(lines) if not line.startswith(" ") and len(line.split()) == 1]
    assert all(lines[index + 1].startswith(" " * 20) for index in bare)  # below a name that is too long
    assert "ResNet-20 on CIFAR-100, first set" in out


def progress(top1: float, epochs: int = 3) -> Progress:
    return Progress(tuple(Epoch(n, 0.1, 1.0, 50.0, 100, 1.0, top1, 50, 1234.5, 1.0) for n in range(1, epochs + 1)))


@pytest.mark.parametrize(("seeds", "told"), [(1, "(1 seed)"), (12, "(12 seeds)")])
def test_the_comparison_of_runs(seeds: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    top1 = tuple(90.0 + seed / 10 for seed in range(seeds))
    outcomes = tuple(
        compare.Outcome(variant, 123_456_789, 98_765_432_100, top1, 90.55, 0.36, 123_456.7)
        for variant in ("original", "downsampling-only")
    )
    compare.show(outcomes, seeds, Path("runs"))
    out = capsys.readouterr().out
    assert widest(out) <= 80 and told in out
    assert ("0.36" in out) == (seeds > 1) and ("±" in out or "+-" in out) == (seeds > 1)
    assert ("by seed" in out) == (seeds > 1) and ("91.10" in out) == (seeds > 1)


@pytest.mark.parametrize(("seeds", "epochs"), [(1, 1), (2, 3), (1, 150)])
def test_plots_count_whole_epochs_and_seeds(seeds: int, epochs: int) -> None:
    figure = compare.drawn("digits/resnet20", {"original": [progress(90.0 + n, epochs) for n in range(seeds)]})
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)
    assert axes.get_title() == f"digits/resnet20, {seeds} seed{'s' * (seeds > 1)}"
    (line,) = axes.get_lines()
    assert (line.get_marker() == "o") == (epochs == 1)  # a line of one point would not be seen


def test_seconds_of_a_forward_pass() -> None:
    named = ("torchvision:regnet_x_400mf_with_a_name_that_is_as_long_as_a_line_of_eighty_columns_is", "vgg16")
    found = [
        benchmark.Timing(name, batch, 224, "CPU x86_64", 1, 123.456789, other, None if other else "why not, " * 20)
        for batch in (16, 1)
        for name, other in zip(named, (98.7, None), strict=True)
    ]
    text = "\n".join(benchmark.lines(found))
    assert widest(text) <= 80 and "1 thread," in text
    assert "".join(text.split()).count(named[0]) == 2


@pytest.mark.parametrize("command", [[], ["train"], ["table"], ["compare"], ["evaluate"], ["benchmark"], ["list"]])
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert widest(capsys.readouterr().out) <= 80
    assert isinstance(cli._parser(), argparse.ArgumentParser)
