"""Every published row: built, counted, compared."""

from __future__ import annotations

import functools

import pytest
from padfree.recipes import RecipeError, load
from padfree.recipes.bsconv_table import rows
from padfree.recipes.recipe import Recipe
from padfree.recipes.tables import Line, bsconv_lines, lines, recipe_lines, tables

MAIN = {"cifar100-first": 12, "cifar100-second": 8, "stanford-dogs": 4, "imagenet": 2, "vegfru-292": 8}
OTHERS = {"cifar100-ablation": 16, "cifar100-efficientformerv2": 4}
DOCUMENTS = {"mobilenets-cifar100": 18, "mobilenet123": 12}  # see test_recipe_networks.py


@functools.cache
def measured_lines(table: str) -> tuple[Line, ...]:
    """A table's rows, built once for all tests."""
    return tuple(lines(table))


def test_the_tables_are_those_of_the_documents() -> None:
    assert set(tables()) == {*MAIN, *OTHERS, *DOCUMENTS, "bsconv"}
    assert sum(MAIN.values()) == 34


@pytest.mark.parametrize(
    "table",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "cifar100-ablation" else []) for name in (*MAIN, *OTHERS)],
)
def test_no_row_of_a_table_is_off_and_reference_figures_are_met_exactly(table: str) -> None:
    """The table's own verdict is not trusted for the paper's rows: the figures are compared once more, plainly."""
    found = measured_lines(table)
    assert len(found) == (MAIN | OTHERS)[table]
    assert [(line.recipe, line.variant, line.off) for line in found if line.off] == []
    if table == "cifar100-ablation":
        stem_and_downsampling_add_up(found)
    for line in found if table in MAIN else ():
        measured, reference = line.measured, line.reference
        assert measured["params"] == reference["params"]
        if line.convention == "bsconv":
            assert measured["flops"] == reference["flops"]
            assert measured["downsampling_pool_inputs"] == reference["downsampling_pool_inputs"]
        else:
            assert measured["conv_linear"] == reference["conv_linear"]
            assert measured["flops"] == pytest.approx(reference["flops"], rel=0.005)


@pytest.mark.parametrize("name", ["mobilenetv3-large", "parc-mobilenetv2"])
def test_a_network_of_the_ablation(name: str) -> None:
    found = tuple(recipe_lines(load(f"cifar100-ablation/{name}")))
    assert [line.off for line in found] == [()] * 4
    stem_and_downsampling_add_up(found)


def stem_and_downsampling_add_up(found: tuple[Line, ...]) -> None:
    """To the whole conversion; ParC's own parameters shrink with the map alone."""
    for name in {line.recipe for line in found}:
        params = {line.variant: line.measured["params"] for line in found if line.recipe == name}
        original, stem, down = (params[variant] for variant in ("original", "stem-only", "downsampling-only"))
        assert stem > original
        assert params["padfree"] - original == (stem - original) + (down - original)
        assert (down < original) == (name.endswith("parc-mobilenetv2"))


def test_comparison_rows_are_within_one_percent() -> None:
    wanted = {"mobilenetv3-large": 4_316_812, "parc-mobilenetv2": 2_558_004}
    wanted |= {"ghostnet": 4_091_996, "shufflenetv2-x1.0": 2_803_558}
    found = {line.recipe.split("/")[1]: line for line in measured_lines("cifar100-efficientformerv2")}
    assert {name: line.measured["layer_params"] for name, line in found.items()} == wanted
    for line in found.values():
        assert line.measured["flops"] == pytest.approx(line.published["flops_m"] * 1e6, rel=0.01)


def test_parc_rows_without_position_embeddings_are_as_published() -> None:
    found = {line.variant: line.measured["layer_params"] for line in recipe_lines(_parc())}
    assert found == {"original": 2_348_132, "padfree": 2_348_292}


def _parc() -> Recipe:
    return load("cifar100-second/parc-mobilenetv2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["figures.rows.original.reference.params=278331"], "params is 278,330"),
        (["figures.rows.original.reference.flops=41419109"], "flops is 41,419,108"),
        (["figures.rows.original.published.params_m=0.279"], "printed as 0.279M, and the recipe gives no"),
        (["model.name=cifar_resnet56"], "the reference implementation has 278,330"),
    ],
)
def test_a_wrong_figure_is_off(changes: list[str], words: str) -> None:
    line = next(iter(recipe_lines(load("cifar100-first/resnet20", changes))))
    assert any(words in fault for fault in line.off), line.off


def test_conv_and_linear_must_be_exact_under_fvcore() -> None:
    key = "figures.rows.original.reference"
    recipe = load("cifar100-second/shufflenetv2-x1.0", [f"{key}.conv_linear=45094273"])
    assert "conv_linear is 45,094,272" in next(iter(recipe_lines(recipe))).off[0]
    inside = load("cifar100-second/shufflenetv2-x1.0", [f"{key}.flops=46400000"])  # 0.4 % more
    assert next(iter(recipe_lines(inside))).off == ()
    outside = load("cifar100-second/shufflenetv2-x1.0", [f"{key}.flops=46500000"])  # 0.6 % more
    assert "flops is 46,220,416" in next(iter(recipe_lines(outside))).off[0]


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no table 'cifar10'; there are .*cifar100-first.*bsconv"):
        list(lines("cifar10"))


def test_bsconv_rows_are_counted_and_converted() -> None:
    assert len(rows()) == 54
    some = ["cifar_resnet20", "cifar_resnet20_bsconvs_p1d4", "cifar_wrn28_1_bsconvu", "cifar_wrn40_3"]
    found = {(line.recipe, line.variant): line for line in bsconv_lines(some)}
    assert list(found) == [(f"bsconv/{name}", variant) for name in some for variant in ("original", "padfree")]
    assert all(not line.off for line in found.values())
    # two of them are rows of the paper's first table, too
    for name, params, flops in (("cifar_resnet20", 282_138, 37_802_324), ("cifar_wrn40_3", 5_287_082, 668_736_868)):
        measured = found[f"bsconv/{name}", "padfree"].measured
        assert (measured["params"], measured["flops"]) == (params, flops)


@pytest.mark.slow
def test_all_bsconv_originals_match_their_published_figures() -> None:
    found = list(bsconv_lines())
    assert len(found) == 2 * 54
    assert [(line.recipe, line.off) for line in found if line.off] == []
