"""Source models and their variants."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.losses import orthonormal_loss
from padfree.recipes.train import Run, train
from padfree.recipes.variants import variants
from torch import nn

from padfree import PadfreeError

BASES = sorted(
    {
        f"{row['table']}/{row['model']}"
        for row in json.loads((Path(__file__).parents[1] / "data" / "paper_rows.json").read_text())
        if row["measured"]["params"] is not None
    }
)


def test_there_are_seventeen_base_models() -> None:
    assert len(BASES) == 17


@pytest.mark.parametrize(  # at 224 pixels with other names alone: one of them stands for all
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("stanford", "vegfru")) else []) for name in BASES],
)
def test_the_padding_free_network_runs_and_learns(name: str) -> None:
    recipe = load(name)
    model = recipe.build("padfree", seed=0)
    side = recipe.model.input_side
    logits = model(torch.randn(2, 3, side, side))
    assert logits.shape == (2, recipe.model.num_classes)
    logits.square().mean().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("variant", ["original", "padfree", "efficientformerv2"])
def test_equal_seeds_build_equal_networks_and_leave_the_random_state(variant: str) -> None:
    recipe = load("cifar100-second/shufflenetv2-x1.0")
    before = torch.get_rng_state()
    first, second, other = (recipe.build(variant, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    weight = next(iter(first.state_dict()))
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_original_and_padding_free_start_from_the_same_values() -> None:
    recipe = load("cifar100-first/resnet20")
    original, converted = recipe.build("original", seed=1), recipe.build("padfree", seed=1)
    values = converted.state_dict()
    shared = {key: value for key, value in original.state_dict().items() if key in values}
    assert len(shared) == len(original.state_dict())
    torch.testing.assert_close({key: values[key] for key in shared}, shared, rtol=0, atol=0)


def test_variants_are_those_that_the_recipe_has() -> None:
    assert "efficientformerv2" in variants(load("cifar100-second/ghostnet"))
    recipe = load("cifar100-first/resnet20")
    assert "efficientformerv2" not in variants(recipe)
    with pytest.raises(PadfreeError, match=r"no variant 'efficientformerv2'; it has original, padfree, stem"):
        recipe.build("efficientformerv2")


def test_the_plan_is_that_of_the_variant() -> None:
    recipe = load("cifar100-first/resnet20")
    stem: Any = recipe.build("stem-only")
    assert {match.rule for match in stem.padfree_plan.matches} == {"stem"}
    down: Any = recipe.build("downsampling-only")
    rules = [match.rule for match in down.padfree_plan.matches]
    assert sorted(rules) == ["dense"] * 2 + ["projection"] * 2
    whole: Any = recipe.build("padfree")
    assert whole.padfree_plan.options.stem_residual
    assert sorted(match.rule for match in whole.padfree_plan.matches) == ["dense"] * 2 + ["projection"] * 2 + ["stem"]


BSCONV = ("model.builder=bsconv", "model.name=cifar_resnet20_bsconvu")


def test_strides_are_set_by_path(small: Path) -> None:
    model = load(small, [*BSCONV, "model.strides={backbone.stage2.unit1.conv2.conv.dw: 2}"]).build("original")
    assert model.get_submodule("backbone.stage2.unit1.conv2.conv.dw").stride == (2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.strides={nowhere: 2}", "ResNet has no module 'nowhere'"),
        ("model.strides={backbone.data_bn: 2}", "'backbone.data_bn' is a BatchNorm2d, not a conv"),
        ("model.name=resnet1000", "builder bsconv cannot make resnet1000"),
        ("model.arguments={width: 3}", "builder bsconv cannot make .* with {'width': 3}"),
        ("efficientformerv2={blocks: [nowhere]}", "ResNet has no 'nowhere'"),
        ("efficientformerv2={blocks: [backbone.stage1]}", "blocks that halve a square map"),
    ],
)
def test_what_cannot_be_built_is_told(change: str, words: str, small: Path) -> None:
    variant = "efficientformerv2" if change.startswith("eff") else "original"
    with pytest.raises(PadfreeError, match=words):
        load(small, [*BSCONV, change]).build(variant)


@pytest.mark.parametrize(
    ("builder", "name", "argument", "words"),
    [
        ("timm", "resnet18", "global_pool: nope", "AssertionError: Invalid pool type: nope"),
        ("timm", "resnet18", "checkpoint_path: /nowhere", "may not set 'checkpoint_path'"),
        ("timm", "resnet18", "pretrained: true", "may not set 'pretrained': it builds a network without weights"),
        ("torchvision", "resnet18", "weights: DEFAULT", "may not set 'weights'"),
        ("timm", "hf-hub:timm/resnet18", "in_chans: 3", "timm has no model 'hf-hub:timm/resnet18'"),
    ],
)
def test_what_a_library_refuses_or_would_download_is_told(
    builder: str, name: str, argument: str, words: str, small: Path
) -> None:
    changes = [f"model.builder={builder}", f"model.name={name}", f"model.arguments={{{argument}}}"]
    with pytest.raises(PadfreeError, match=rf"builder {builder} cannot make {name} with .*: .*{words}"):
        load(small, changes).build("original")


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        (
            "vit_tiny_patch16_224",
            "img_size: 32",
            r"does not take images of 16 pixels \(model.input_side\): Input height",
        ),
        ("resnet18", "features_only: true", r"makes list of two images and must make \(2, 10\)"),
    ],
)
def test_a_network_of_another_size_is_told_before_there_is_a_run(
    name: str, argument: str, words: str, small: Path, tmp_path: Path
) -> None:
    changes = ["model.builder=timm", f"model.name={name}", f"model.arguments={{{argument}}}"]
    with pytest.raises(PadfreeError, match=words):
        train(Run(load(small, changes), "original", folder=tmp_path / "run", cpu=True, quiet=True))
    assert not (tmp_path / "run").exists()


def test_parc_takes_whole_maps_only() -> None:
    with pytest.raises(PadfreeError, match=r"got input side 100"):
        load("vegfru-292/parc-mobilenetv2", ["model.input_side=100"]).build("original")


# -- BSConv-S ---------------------------------------------------------------------------------------

BSCONVS = "cifar100-first/mobilenetv3-large-bsconvs"


def test_bsconvs_is_plain_mobilenetv3_but_for_its_loss() -> None:
    plain, separable = load("cifar100-first/mobilenetv3-large"), load(BSCONVS)
    one, two = plain.build("padfree", seed=0).eval(), separable.build("padfree", seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(one(images), two(images))
    assert not hasattr(one, "reg_loss") and hasattr(two, "reg_loss")


def test_the_orthonormal_loss_is_its_formula() -> None:
    model = load(BSCONVS).build("original")
    wanted = 0.0
    weights = [p for key, p in model.named_parameters() if key.endswith("conv3.conv.weight")]
    assert len(weights) == 15
    for weight in weights:
        rows = weight.detach().double()[:, :, 0, 0].numpy()
        gram = rows @ rows.T
        for index in range(len(gram)):
            gram[index, index] -= 1
        wanted += float((gram**2).sum() ** 0.5)
    assert orthonormal_loss(model).item() == pytest.approx(0.1 * wanted, rel=1e-5)
    assert orthonormal_loss(model, 0.3).item() == pytest.approx(0.3 * wanted, rel=1e-5)


@pytest.mark.parametrize("made_by", ["convert", "deepcopy"])
def test_a_copy_carries_a_loss_of_its_own_weights(made_by: str) -> None:
    recipe = load(BSCONVS)
    converted = recipe.build("padfree")
    model = converted if made_by == "convert" else copy.deepcopy(converted)
    before = model.reg_loss().item()
    other = recipe.build("original") if made_by == "convert" else converted
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert model.reg_loss().item() == before
    model.reg_loss().backward()
    touched = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {key for key, _ in model.named_parameters() if key.endswith("conv3.conv.weight")}
    assert all(parameter.grad is None for parameter in other.parameters())


def test_the_loss_of_a_network_without_bottlenecks_is_refused() -> None:
    with pytest.raises(PadfreeError, match=r"Linear has no linear bottleneck .*orthonormal_weight to 0"):
        orthonormal_loss(nn.Linear(2, 2))
