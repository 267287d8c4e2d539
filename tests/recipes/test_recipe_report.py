"""Tables in 80 columns and wider ones, of rows that are made up."""

from __future__ import annotations

import re

import pytest
from padfree.recipes.report import narrow_console, show_narrow, show_wide, wide_console
from padfree.recipes.tables import Line

LONG = "mobilenets-cifar100/mobilenetv2-gc-expansion-lgc-projection"


def line(recipe: str, variant: str = "original", count: str = "bsconv", **settings: object) -> Line:
    values: dict[str, object] = {
        "published": {"params_m": 3.3, "flops_m": 627.0, "top1": 77.1} if variant == "original" else {},
        "digits": {"params": 1, "flops": 0},
        "measured": {"params": 3_309_476, "flops": 626_511_600, "fvcore": 618_205_184},
        "reference": {},
        "off": (),
        "remarks": (),
    }
    return Line(recipe, variant, count, **{**values, **settings})  # type: ignore[arg-type]


def shown(lines: list[Line], capsys: pytest.CaptureFixture[str]) -> list[str]:
    show_narrow(lines, narrow_console())
    found = [text.rstrip() for text in capsys.readouterr().out.splitlines()]
    assert max(map(len, found)) <= 80
    assert not any("…" in text for text in found)
    return found


def test_a_network_is_a_row_with_its_padding_free_form_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    padfree = {"params": 3_311_940, "flops": 560_013_216}
    found = shown([line("a/b", count="tf-profile"), line("a/b", "padfree", "tf-profile", measured=padfree)], capsys)
    assert found[0] == "a: operations by tf-profile, a convention that is inferred: within 0.35%"
    assert found[1].split() == ["padfree", "padfree"]
    assert found[2].split() == ["model", "params", "FLOPs", "params", "FLOPs"]
    assert found[3] == "b     3.309 (3.3) 626.5 (627)   3.312   560.0"
    assert found[-1] == "Millions: measured (printed). All figures: --wide, or --json FILE."


def test_the_widest_figures_and_names_fit(capsys: pytest.CaptureFixture[str]) -> None:
    printed = {"published": {"params_m": 35.79, "flops_m": 5180.42}, "digits": {"params": 2, "flops": 2}}
    measured = {"params": 35_790_000, "flops": 5_180_420_000}
    bsconv = [line("bsconv/cifar_resnet110_bsconvs_p1d4", variant, **printed, measured=measured) for variant in PAIR]
    found = shown([*bsconv, *(line(LONG, variant, remarks=("why " * 40,)) for variant in PAIR)], capsys)
    text = " ".join(found)
    assert text.count("35.790 (35.79) 5180.4 (5180.42)") == 2
    assert re.search(r"mobilenetv2-gc-expansion-\S*", text) and "projection" in text


PAIR = ("original", "padfree")


def test_a_name_leaves_room_for_headings_that_are_wider_than_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    small = {"params": 853_620, "flops": 67_945_176}
    published = {"published": {"params_m": 1.074, "flops_m": 119.0}, "digits": {"params": 3, "flops": 0}}
    found = shown([line(LONG, "original", **published), line(LONG, "padfree", measured=small)], capsys)
    assert any(text.endswith("3.309 (1.074) 626.5 (119)   0.854    67.9") for text in found)
    assert found[1].split() == ["padfree", "padfree"]


def test_other_variants_are_rows_below_and_conventions_tables_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line("a/b", name) for name in ("original", "padfree", "stem-only")]
    found = shown([*lines, line("a/c", count="macs"), line("d/e", "efficientformerv2", "modules")], capsys)
    assert [text.partition(":")[0] for text in found if "operations by" in text] == ["a", "a", "d"]
    (below,) = (text for text in found if text.startswith("  stem-only "))
    beside = next(text for text in found if text.startswith("b "))
    assert below.split() == ["stem-only", "3.309", "626.5"] and len(below) == len(beside)
    last = found.index("d: operations by modules, a convention that is inferred: within 1.00%")
    assert found[last + 1].split() == ["efficientformerv2"] * 2
    assert found[last + 3].split() == ["e", "3.309", "626.5"]


def test_what_is_off_and_what_there_is_to_say_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line("a/b", remarks=("printed cut",)),
        line("a/b", "padfree", off=("params is 3",), measured={}),
        line("a/c"),
    ]
    found = shown(lines, capsys)
    marked = [text.split()[-1] for text in found if text.startswith(("b ", "c "))]
    assert marked == ["OFF*", "(627)"]
    assert found.index("* a/b original: printed cut") < found.index("OFF a/b padfree: params is 3")


def test_the_wide_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show_wide([line("a/b"), line("a/b", "padfree", off=("no",), measured={})], wide_console())
    out = capsys.readouterr().out
    wanted = ("3,309,476", "3.3", "+0.01", "626,511,600", "627", "-0.5", "618,205,184", "77.10")
    assert all(figure in out for figure in wanted)
    assert out.splitlines()[2].split() == ["a/b", "padfree", "bsconv", "-", "-", "OFF"]
