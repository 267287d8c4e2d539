"""Every rule's toy examples and counterexamples, run by one test each."""

from __future__ import annotations

import copy

import pytest
import torch

import padfree
from padfree.errors import NothingToConvertError
from padfree.rules.base import Example, rules

BUILT_IN = ("depthwise", "dense", "projection", "stem")
EXAMPLES = [(name, index) for name in BUILT_IN for index in range(len(rules([name])[0].examples))]
COUNTEREXAMPLES = [(name, index) for name in BUILT_IN for index in range(len(rules([name])[0].counterexamples))]


def test_every_rule_has_examples_of_both_kinds() -> None:
    assert len(EXAMPLES) >= 20 and len(COUNTEREXAMPLES) >= 12
    for name in BUILT_IN:
        (rule,) = rules([name])
        assert rule.examples and rule.counterexamples


def _example(name: str, index: int, kind: str) -> Example:
    found: Example = getattr(rules([name])[0], kind)[index]
    return found


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_example_is_converted(name: str, index: int) -> None:
    example = _example(name, index, "examples")
    torch.manual_seed(0)
    model = example.build()
    before = copy.deepcopy(model.state_dict())
    plan = padfree.plan(model, options=example.options, input_size=example.input_size)
    assert sorted(match.name for match in plan.matches if match.rule == name) == sorted(example.expect)
    assert not [skip for skip in plan.skips if skip.rule == name]
    converted = padfree.convert(model, options=example.options, input_size=example.input_size)
    assert converted is not model and type(converted) is type(model)
    kept = [key for key in converted.state_dict() if key in before]
    assert kept == list(before)
    for key, value in before.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
        torch.testing.assert_close(converted.state_dict()[key], value, rtol=0, atol=0)
    x = torch.randn(2, *example.input_size, requires_grad=True)
    converted.train()(x).sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in converted.parameters())
    assert not torch.equal(model.eval()(x), converted.eval()(x))


@pytest.mark.parametrize(("name", "index"), COUNTEREXAMPLES)
def test_counterexample_is_refused_with_its_reason(name: str, index: int) -> None:
    example = _example(name, index, "counterexamples")
    model = example.build()
    plan = padfree.plan(model, options=example.options, input_size=example.input_size)
    reasons = " | ".join(f"{skip.name}: {skip.reason}" for skip in plan.skips)
    for words in example.expect:
        assert words in reasons
    refused = {skip.name for skip in plan.skips if skip.rule == name}
    assert refused and not refused & {match.name for match in plan.matches if match.rule == name}
    if not plan.matches:
        with pytest.raises(NothingToConvertError) as caught:
            padfree.convert(model, options=example.options, input_size=example.input_size)
        assert any(words in str(caught.value) for words in example.expect)


def test_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(padfree.PadfreeError, match=r"unknown rule 'depth'; there are depthwise"):
        padfree.plan(rules(["stem"])[0].examples[0].build(), rules=["depth"])
