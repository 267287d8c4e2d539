"""ParC operators, and the rule that lets them follow their map."""

from __future__ import annotations

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.parc import ParC, ParCMobileNetV2, ParCPair
from padfree.recipes.parc_rule import RULE, ensure_registered
from padfree.recipes.variants import conversion
from torch import nn

import padfree
from padfree import PadfreeError

RULES = ("depthwise", "stem", "parc")


def operators(model: nn.Module) -> dict[str, ParC]:
    return {path: module for path, module in model.named_modules() if isinstance(module, ParC)}


@pytest.mark.parametrize("axis", ["h", "w"])
def test_an_operator_is_a_circular_correlation(axis: str) -> None:
    """out[i] = bias + sum over j of weight[j] * in[(i + j) mod m], along its axis only."""
    torch.manual_seed(0)
    side = 5
    operator = ParC(3, side, "h" if axis == "h" else "w", position=True)
    shape = (2, 3, side, 4) if axis == "h" else (2, 3, 4, side)
    x = torch.randn(shape)
    dim = 2 if axis == "h" else 3
    assert operator.position is not None
    lines = x + operator.position
    weight = operator.conv.weight.reshape(3, side)
    wanted = operator.conv.bias.reshape(1, 3, 1, 1) + sum(
        weight[:, j].reshape(1, 3, 1, 1) * lines.roll(-j, dim) for j in range(side)
    )
    torch.testing.assert_close(operator(x), wanted)


def test_a_pair_gives_the_first_half_to_the_height() -> None:
    pair = ParCPair(4, 6, position=False)
    x = torch.randn(1, 4, 6, 6)
    out = pair(x)
    torch.testing.assert_close(out[:, :2], pair.vertical(x[:, :2]))
    torch.testing.assert_close(out[:, 2:], pair.horizontal(x[:, 2:]))
    with pytest.raises(PadfreeError, match=r"got 3; give an even number"):
        ParCPair(3, 6, position=False)


@pytest.mark.parametrize(("side", "sides"), [(32, [8, 8, 8, 4]), (224, [14, 14, 14, 7])])
def test_operators_are_sized_to_their_maps(side: int, sides: list[int]) -> None:
    found = operators(ParCMobileNetV2(10, side))
    assert [operator.side for operator in found.values()] == [side for side in sides for _ in "hw"]
    with_position = [path for path, operator in found.items() if operator.position is not None]
    assert len(with_position) == 6  # both operators of the first unit of three rows


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("cifar100-second/parc-mobilenetv2", (8, 4), (7, 3)), ("vegfru-292/parc-mobilenetv2", (14, 7), (13, 6))],
)
def test_the_rule_resizes_every_operator(name: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    recipe = load(name)
    old, new = operators(recipe.build("original")), operators(recipe.build("padfree"))
    assert list(old) == list(new) and len(old) == 8
    assert [o.side for o in old.values()] == [before[0]] * 6 + [before[1]] * 2
    assert [o.side for o in new.values()] == [after[0]] * 6 + [after[1]] * 2
    for path, operator in new.items():
        assert operator.conv.kernel_size == tuple(operator.conv.weight.shape[2:])
        assert (operator.position is None) == (old[path].position is None)
        if operator.position is not None:
            assert operator.position.shape[2:] == operator.conv.weight.shape[2:]


def test_resized_values_are_interpolated_from_the_old_ones() -> None:
    recipe = load("cifar100-second/parc-mobilenetv2")
    original = recipe.build("original")
    for operator in operators(original).values():
        with torch.no_grad():
            ramp = torch.linspace(0, 1, operator.side).reshape(operator.span(operator.side))
            operator.conv.weight.copy_(ramp.expand_as(operator.conv.weight))
    converted = padfree.convert(original, **conversion(recipe, "padfree"))
    for operator in operators(converted).values():
        line = operator.conv.weight[0, 0].flatten()
        steps = line.diff()
        assert (steps > 0).all()  # a ramp stays a ramp
        torch.testing.assert_close(line.mean(), torch.tensor(0.5))
    assert {operator.side for operator in operators(original).values()} == {8, 4}  # the original is untouched


def test_the_stem_alone_resizes_nothing() -> None:
    model = load("cifar100-second/parc-mobilenetv2").build("stem-only")
    assert {operator.side for operator in operators(model).values()} == {8, 4}


def test_without_the_rule_the_maps_of_parc_are_left_alone() -> None:
    original = load("cifar100-second/parc-mobilenetv2").build("original")
    plan = padfree.plan(original, rules=("depthwise", "stem"), input_size=(3, 32, 32))
    assert not any(match.rule == "depthwise" and match.name.startswith("rows.3") for match in plan.matches)
    skipped = {skip.name: skip.reason for skip in plan.skips}
    assert skipped.get("rows.3.0.mix.0")


def test_a_plan_with_the_rule_applies_word_for_word() -> None:
    ensure_registered()
    recipe = load("cifar100-second/parc-mobilenetv2")
    original = recipe.build("original")
    plan = padfree.plan(original, **conversion(recipe, "padfree"))
    assert sum(match.rule == "parc" for match in plan.matches) == 8
    again = padfree.Plan.from_dict(plan.to_dict())
    shapes = {key: value.shape for key, value in recipe.build("padfree").state_dict().items()}
    assert {key: value.shape for key, value in again.apply(original).state_dict().items()} == shapes


def test_the_rule_is_no_default() -> None:
    ensure_registered()
    ensure_registered()
    assert not RULE.default
    (example,) = RULE.examples
    plan = padfree.plan(example.build(), rules=RULES, input_size=example.input_size)
    assert tuple(match.name for match in plan.matches if match.rule == "parc") == example.expect
