"""The networks of the documents that no library has: golden logits, exact figures, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_values as golden
import pytest
import torch
from padfree.recipes import load, names
from padfree.recipes.count import count
from padfree.recipes.networks import NETWORKS, create
from padfree.recipes.networks.mobilenetv2_cifar import GroupConv1x1
from padfree.recipes.schedules import make_optimizer, make_schedule
from padfree.recipes.tables import lines
from padfree.recipes.transforms import compose
from torch import nn

import padfree
from padfree import PadfreeError
from padfree.layers.learned_groups import condense_stage, condensed, learned_group_convs

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "document_rows.json").read_text())
TABLES = ("mobilenets-cifar100", "mobilenet123")
IN_DEFAULT = ("mobilenetv1-w0.25",)  # padding-free forms counted


def _name(row: dict[str, Any]) -> str:
    return f"{row['table']}/{row['model']}"


def test_golden_logits_of_mobilenetv1_and_its_padding_free_form() -> None:
    model = create("mobilenetv1-cifar", 100)
    converted = padfree.convert(model, input_size=(3, 32, 32))
    for name, network in (("original", model), ("padfree", converted)):
        side, reference = golden.load(f"s2-mobilenetv1-w1-{name}")
        logits = golden.fill(network)(golden.batch(side))
        assert golden.relative_error(logits, reference) < 1e-4


def test_golden_logits_of_learned_groups_masked_and_condensed() -> None:
    model = golden.fill(create("mobilenetv2-cifar", 100, expand="learned", project="learned"))
    side, reference = golden.load("s2-mobilenetv2-lgc-original")
    assert golden.relative_error(model(golden.batch(side)), reference) > 0.1
    assert [condense_stage(model) for _ in range(4)] == [34, 34, 34, 0]
    for network in (model, condensed(model)):
        assert golden.relative_error(network(golden.batch(side)), reference) < 1e-4


def test_golden_logits_of_mobilenetv3() -> None:
    side, reference = golden.load("s3-mobilenetv3-large-padfree")
    converted = padfree.convert(create("mobilenetv3", 100, size="large"), input_size=(3, side, side))
    assert golden.relative_error(golden.fill(converted)(golden.batch(side)), reference) < 1e-4


def test_recipes_hold_every_row() -> None:
    assert len(ROWS) == 29 and {row["table"] for row in ROWS} == set(TABLES)
    assert {name for name in names() if name.startswith(TABLES)} == {_name(row) for row in ROWS}
    for row in ROWS:
        recipe = load(_name(row))
        assert recipe.figures is not None
        figures = recipe.figures.rows[row["variant"]]
        published = figures.published.model_dump(exclude_none=True)
        assert published == {key: row["published"][key] for key in row["published"] if not key.startswith("top5")} or (
            row["model"] == "mobilenetv1-net" and published == {"top1": 68.848}
        )
        keys = ("params", "flops", "conv_linear", "fvcore", "bsconv")
        assert figures.reference.model_dump(exclude_none=True) == {key: row["measured"][key] for key in keys}
        assert recipe.figures.count == row["count"]
        assert (recipe.model.num_classes, recipe.model.input_side) == (row["num_classes"], row["input_side"])


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row["variant"] == "original" or row["model"] in IN_DEFAULT],
    ids=lambda row: f"{row['model']}-{row['variant']}",
)
def test_row(row: dict[str, Any]) -> None:
    """Parameters and operations under the document's convention and in multiply-adds, exactly."""
    side = row["input_side"]
    model = load(_name(row)).build("original")
    if row["variant"] == "padfree":
        model = padfree.convert(model, input_size=(3, side, side), check=False)
    counted = count(model, side, row["count"])
    measured = row["measured"]
    assert (counted.params, counted.flops, counted.conv_linear) == tuple(
        measured[key] for key in ("params", "flops", "conv_linear")
    )
    printed = row["published"].get("flops_m")
    if printed is not None:
        assert counted.flops / 1e6 == pytest.approx(printed, rel=0.0035 if row["count"] == "tf-profile" else 0.01)
        assert round(counted.flops / 1e6, 1 if printed == 42.5 else 0) == printed
    if "params_dense" in measured:  # before its condensing stages, of which counting takes no note
        assert sum(parameter.numel() for parameter in model.parameters()) == measured["params_dense"]


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_no_row_of_a_table_is_off(table: str) -> None:
    """All forms, counted by fvcore and bsconv's profiler, too."""
    found = list(lines(table))
    assert [(line.recipe, line.variant, line.off) for line in found if line.off] == []
    for row in (row for row in ROWS if row["table"] == table):
        line = next(line for line in found if (line.recipe, line.variant) == (_name(row), row["variant"]))
        for key in ("params", "flops", "conv_linear", "fvcore", "bsconv"):
            assert line.measured[key] == row["measured"][key]
    dearer = {row["model"] for row in ROWS if row["variant"] == "padfree" and _dearer(row)}
    assert dearer == {"mobilenetv3-small-w1", "mobilenetv3-small-w0.75"}
    told = {line.recipe.split("/")[1] for line in found if any("dearer" in text for text in line.remarks)}
    assert told == (dearer if table == "mobilenet123" else set())


def _dearer(row: dict[str, Any]) -> bool:
    originals = [other for other in ROWS if _name(other) == _name(row) and other["variant"] == "original"]
    return any(row["measured"]["fvcore"] > other["measured"]["fvcore"] for other in originals)


# -- networks -----------------------------------------------------------------------------------------


def test_the_shuffle_behind_grouped_expansions_is_the_inverse_of_shufflenets() -> None:
    layer = GroupConv1x1(4, 8, 4)
    with torch.no_grad():
        layer.conv.weight.fill_(1)
    x = torch.arange(4.0).reshape(1, 4, 1, 1)
    # outputs of the groups: 0 0 1 1 2 2 3 3; as rows of 4 columns, read by columns
    assert layer(x).flatten().tolist() == [0, 2, 0, 2, 1, 3, 1, 3]
    with pytest.raises(PadfreeError, match="6 and 8 channels cannot both be divided in 4 groups"):
        GroupConv1x1(6, 8, 4)


def test_adapting_shortcuts_are_plain_convolutions() -> None:
    model = create("mobilenetv2-cifar", 10)
    shortcuts = [unit.shortcut for unit in model.get_submodule("features") if hasattr(unit, "shortcut")]
    adapting = [layer for layer in shortcuts if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in adapting] == [(32, 16), (16, 24), (24, 32), (64, 96)]
    assert all(layer.bias is None and layer.groups == 1 for layer in adapting)
    assert [layer is None for layer in shortcuts].count(True) == 3  # two strides, and the unit to 320 channels


def test_the_size_and_the_width_of_mobilenetv3() -> None:
    """Widths are rounded up, the stem's is not scaled, and the head's only where the factor is over 1."""
    small, wide = create("mobilenetv3", 10, width=0.75), create("mobilenetv3", 10, size="large", width=1.4)
    expanded = [block.conv[0].out_channels for block in list(small.get_submodule("features"))[1:-4]]
    assert expanded == [16, 56, 72, 72, 184, 184, 96, 112, 216, 432, 432]
    assert small.get_submodule("features.0.0").out_channels == 16 == wide.get_submodule("features.0.0").out_channels
    assert small.get_submodule("classifier.1").in_features == 1280
    assert wide.get_submodule("classifier.1").in_features == 1792
    assert "features.1.conv.5.fc.2.weight" in small.state_dict()
    with pytest.raises(PadfreeError, match="size is 'tiny'; there are large, small"):
        create("mobilenetv3", 10, size="tiny")


def test_the_pool_of_the_given_mobilenetv1_keeps_its_last_stride() -> None:
    fixed, adaptive = create("mobilenetv1", 10), create("mobilenetv1", 10, adaptive_pool=True)
    plans = [padfree.plan(model, input_size=(3, 224, 224)) for model in (fixed, adaptive)]
    assert [len(plan.matches) for plan in plans] == [4, 5]
    assert [skip.name for skip in plans[0].skips] == ["model.12.0"] and not plans[1].skips


def test_initial_values_are_tensorflows() -> None:
    torch.manual_seed(0)
    model = create("mobilenetv2-cifar", 100, expand="learned")
    last = model.get_submodule("features.18.0")
    depthwise = model.get_submodule("features.17.depthwise.0")
    learned = model.get_submodule("features.17.expand.0")
    for layer, std in ((last, (2 / 320) ** 0.5), (learned, (2 / 160) ** 0.5)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert layer.weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6  # cut at two deviations
    assert depthwise.weight.std().item() == pytest.approx(0.01 * 0.8796, rel=0.05)
    head = model.get_submodule("classifier")
    assert head.bias.abs().max() == 0 and head.weight.abs().max() <= (6 / 1380) ** 0.5
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.1)}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("mobilenetv9", {}, f"no network 'mobilenetv9'; there are {', '.join(NETWORKS)}"),
        ("mobilenetv2-cifar", {"expand": "sparse"}, "expand is 'sparse'; there are dense, groups, learned"),
        ("mobilenetv2-cifar", {"project": "groups"}, "project is 'groups'; there are dense, learned"),
        ("mobilenetv2-cifar", {"stem_channels": 18, "expand": "learned"}, "18 input channels are no multiple of 4"),
    ],
)
def test_what_cannot_be_made_is_told(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PadfreeError, match=words):
        create(name, 10, **arguments)


# -- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names() if name.startswith(TABLES[0])])
def test_settings_of_the_document_on_learned_groups(name: str) -> None:
    recipe = load(name)
    training = recipe.training
    learned = "lgc" in name
    assert (training.epochs, training.batch_size, training.lasso_weight) == (400, 64, 0)
    assert training.condense_before == ((66, 132, 198) if learned else ())
    optimizer = recipe.optimizer
    assert optimizer.name == "sgd" and optimizer.nesterov
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    assert [next(iter(step)) for step in recipe.data.train] == [
        "ToTensor",
        "Normalize",
        "RandomHorizontalFlip",
        "RandomCrop",
    ]


def test_an_image_is_padded_with_its_mean_colour() -> None:
    from PIL import Image

    recipe = load("mobilenets-cifar100/mobilenetv1-w1")
    torch.manual_seed(0)
    image = compose(recipe.data.train)(Image.new("RGB", (32, 32), (255, 255, 255)))
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image[0].unique(), torch.tensor([0.0, (1 - 0.50707516) / 0.26733429]))


def test_the_rate_of_an_epoch_is_that_of_its_last_step() -> None:
    """0.05 (1 + cos(pi ((e - 1) 782 + 781) / (400 * 782))), e from 1, by a schedule that goes on from a state."""
    from math import cos, pi

    recipe = load("mobilenets-cifar100/mobilenetv1-w0.25")
    optimizer = make_optimizer(recipe, nn.Linear(1, 1))
    schedule = make_schedule(recipe, optimizer)
    for epoch in range(1, 401):
        wanted = 0.05 * (1 + cos(pi * ((epoch - 1) * 782 + 781) / (400 * 782)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
        if epoch == 200:
            state = schedule.state_dict()
            schedule = make_schedule(recipe, make_optimizer(recipe, nn.Linear(1, 1)))
            schedule.load_state_dict(state)
            optimizer = schedule.optimizer
        optimizer.step()
        schedule.step()


def test_settings_of_mobilenet123() -> None:
    for name in ("mobilenetv3-large-w1", "mobilenetv3-small-w0.75"):
        recipe = load(f"mobilenet123/{name}")
        assert (recipe.training.epochs, recipe.training.batch_size, recipe.schedule.name) == (150, 256, "cosine")
        assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (0.05, 4e-5)
        dropout = [module.p for module in recipe.build("original").modules() if isinstance(module, nn.Dropout)]
        assert dropout == [0.0]
    recipe = load("mobilenet123/mobilenetv1-net")
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.schedule.name) == (90, 256, "step")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (0.1, 1e-4)


def test_the_digits_recipe_has_learned_groups_throughout() -> None:
    recipe = load("digits/mobilenetv2-lgc")
    assert len(learned_group_convs(recipe.build("original"))) == 10
    assert len(learned_group_convs(recipe.build("padfree"))) == 10
