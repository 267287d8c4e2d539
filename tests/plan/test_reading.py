"""Plans as anybody may write them: format 1, lies, repetitions, far too much of it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padfree
from padfree.errors import PlanError
from padfree.layers.stem import StemTail
from padfree.rules._downsampling import Downsampling
from padfree.rules._toys import Residual, depthwise, net, unit
from padfree.rules.base import Rule, Shortcut, registered, rules
from padfree.rules.projection import Pool, Projection
from padfree.rules.stem import Stem
from padfree.types import Detail

SIZE = (3, 32, 32)


def build() -> nn.Module:
    """A stem, a strided block whose shortcut is a pool, and a strided depthwise conv."""
    torch.manual_seed(0)
    main = unit(8, 16, stride=2)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    return net(Residual(main, shortcut), depthwise(16), out=16).eval()


FORMAT_1: dict[str, Any] = {
    "format": 1,
    "model": "Sequential",
    "input_size": [3, 32, 32],
    "options": {
        "merge": "activation",
        "pool": "3x3",
        "projection": "depthwise",
        "stem_residual": False,
        "allow_resize": False,
    },
    "matches": [
        {
            "rule": "stem",
            "name": "0.0",
            "block": "",
            "domain": -1,
            "size": [32, 32],
            "out_before": [32, 32],
            "out_after": [32, 32],
            "detail": {
                "op": 0,
                "channels": 8,
                "stride": 1,
                "norm": "0.1",
                "act": "0.2",
                "function": "",
                "preact": 0,
                "value": 11,
                "norm_last": 0,
                "absorbs": 0,
                "place": "0.2",
            },
        },
        {
            "rule": "dense",
            "name": "1.main.0",
            "block": "1",
            "domain": 13,
            "size": [32, 32],
            "out_before": [16, 16],
            "out_after": [15, 15],
            "detail": {
                "op": 4,
                "kernel": 3,
                "padding": 0,
                "channels": [8, 16],
                "points": [],
                "source": 11,
                "merge": 22,
                "anchor": 4,
                "project": 1,
                "pool": [3, 0],
                "repeat": 1,
            },
        },
        {
            "rule": "projection",
            "name": "1.shortcut.0",
            "block": "1",
            "domain": 13,
            "size": [32, 32],
            "out_before": [16, 16],
            "out_after": [15, 15],
            "detail": {"op": 8, "source": 11, "dense": 0, "norm": "1.shortcut.1"},
        },
        {
            "rule": "depthwise",
            "name": "2.0",
            "block": "2",
            "domain": 37,
            "size": [16, 16],
            "out_before": [8, 8],
            "out_after": [7, 7],
            "detail": {
                "op": 13,
                "kernel": 3,
                "padding": 0,
                "channels": [16, 16],
                "points": [],
                "source": 35,
                "merge": 46,
                "anchor": 13,
                "project": 0,
                "pool": [3, 0],
                "repeat": 1,
            },
        },
    ],
    "skips": [],
    "earlier": None,
}
"""What the version before wrote for `build()`."""


def detail_of(plan: padfree.Plan, name: str) -> Any:
    return next(match.detail for match in plan.matches if match.name == name)


def test_format_1_is_read_and_carried_out_as_it_says() -> None:
    """Its stem's tail takes the activation's place, where this version puts it at the entry of the next block."""
    plan = padfree.Plan.from_dict(json.loads(json.dumps(FORMAT_1)))
    now = padfree.plan(build(), input_size=SIZE)
    assert plan.matches[1:] == now.matches[1:]
    assert (now.matches[0].block, detail_of(now, "0.0").place) == ("1", None)
    assert detail_of(plan, "1.main.0") == Downsampling(
        4, 3, 0, channels=(8, 16), shortcut=Shortcut(source=11, anchor=4, merge=22, project=True)
    )
    assert detail_of(plan, "1.shortcut.0") == Projection(8, source=11, dense=False, norm="1.shortcut.1")
    assert detail_of(plan, "0.0").place == "0.2" and detail_of(plan, "0.0").function is None
    torch.manual_seed(1)
    applied = plan.apply(build())
    assert isinstance(applied.get_submodule("0.2"), StemTail)
    converted = now.apply(build())
    weights = {
        key.replace("0.2.", "1.padfree_stem.").replace(".end.", "."): w for key, w in applied.state_dict().items()
    }
    converted.load_state_dict(weights)
    x = torch.rand(2, *SIZE)
    torch.testing.assert_close(applied(x), converted(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("depthwise", {"op": 7, "kernel": 5, "padding": 1, "lead": "a.b"}, Downsampling(7, 5, 1, largest="a.b")),
        ("projection", {"op": 7, "kept": 1}, Pool(7, kept=True)),
        ("projection", {"op": 7}, Pool(7)),
        (
            "projection",
            {"op": 7, "source": 3, "dense": 1, "norm": "", "own_norm": 9},
            Projection(7, 3, dense=True, norm=None, own_norm=9),
        ),
        (
            "stem",
            {
                **{
                    "op": 7,
                    "channels": 8,
                    "stride": 2,
                    "norm": "n",
                    "act": "",
                    "function": "elu",
                    "settings": [1.0, 1],
                },
                **{"preact": 0, "value": 9, "norm_last": 0, "absorbs": 1, "end": 8, "pool": 6},
            },
            Stem(7, 8, 2, "n", None, "elu", (1.0, 1), False, False, True, 9, end=8, pool=6),
        ),
    ],
)
def test_details_of_format_1(rule: str, old: dict[str, Any], new: Any) -> None:
    match = {**FORMAT_1["matches"][1], "rule": rule, "detail": old}
    plan = padfree.Plan.from_dict({**FORMAT_1, "matches": [match]})
    assert plan.matches[0].detail == new
    assert padfree.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_each_rule_names_the_details_that_it_makes() -> None:
    made: set[type] = set()
    for name in ("depthwise", "dense", "projection", "stem"):
        for example in rules([name])[0].examples:
            plan = padfree.plan(example.build(), options=example.options, input_size=example.input_size)
            made |= {type(match.detail) for match in plan.matches}
            assert all(type(match.detail) in registered()[match.rule].details for match in plan.matches)
            assert padfree.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert {kind.__name__ for kind in made} == {"Downsampling", "Projection", "Pool", "Stem"}


# -- what is wrong is refused when it is read --------------------------------------------------------------------


def written() -> dict[str, Any]:
    return json.loads(json.dumps(padfree.plan(build(), input_size=SIZE).to_dict()))  # type: ignore[no-any-return]


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(format=True), "has format True"),
        (lambda plan: plan.update(format=3), "has format 3"),
        (lambda plan: plan.update(matches={}), r"matches is \{\}"),
        (lambda plan: plan["matches"][1].pop("block"), "has no 'block'"),
        (lambda plan: plan["matches"][1].update(blocks=""), "has an unknown 'blocks'"),
        (lambda plan: plan["matches"][1].update(domain=True), "domain of match is True"),
        (lambda plan: plan["matches"][1].update(size=[32, "32"]), "size of match is '32'"),
        (lambda plan: plan["matches"][1].update(detail=[]), r"the detail of `1.main.0` is \[\]"),
        (
            lambda plan: plan["matches"][1]["detail"].update(kind="Pool"),
            "is of kind 'Pool'; rule 'dense' has Downsampl",
        ),
        (lambda plan: plan["matches"][1]["detail"].pop("kind"), "KeyError: 'kind'"),
        (lambda plan: plan["matches"][1]["detail"].pop("largest"), "has no 'largest'"),
        (lambda plan: plan["matches"][1]["detail"].update(stride=2), "has an unknown 'stride'"),
        (lambda plan: plan["matches"][1]["detail"].update(kernel=3.0), "kernel of the detail of `1.main.0` is 3.0"),
        (lambda plan: plan["matches"][1]["detail"].update(largest=1), "largest of the detail of `1.main.0` is 1"),
        (lambda plan: plan["matches"][1]["detail"].update(channels=[8]), r"channels of .* is \[8\]"),
        (lambda plan: plan["matches"][1]["detail"]["shortcut"].update(project=1), "project of .* is 1"),
        (lambda plan: plan["matches"][1]["detail"]["shortcut"].pop("merge"), "has no 'merge'"),
        (lambda plan: plan["matches"].append(plan["matches"][1]), "the match of `1.main.0` by rule 'dense' twice"),
        (lambda plan: plan.update(skips=[{"name": "x"}]), "has no 'domain'"),
        (lambda plan: plan.update(earlier={"format": 2}), "KeyError"),
    ],
)
def test_a_damaged_plan_is_refused_with_what_is_wrong(change: Change, words: str) -> None:
    plan = written()
    change(plan)
    with pytest.raises(PlanError, match=words):
        padfree.Plan.from_dict(plan)


@pytest.mark.parametrize(
    "change",
    [
        lambda detail: detail.pop("project"),
        lambda detail: detail.update(project=2),
        lambda detail: detail.update(pool=[3]),
        lambda detail: detail.update(pool=3),
        lambda detail: detail.update(merge="22"),
        lambda detail: detail.update(stride=2),
    ],
)
def test_a_damaged_detail_of_format_1_is_refused(change: Change) -> None:
    plan = copy.deepcopy(FORMAT_1)
    change(plan["matches"][1]["detail"])
    with pytest.raises(PlanError, match="not a plan of padfree"):
        padfree.Plan.from_dict(plan)


@pytest.mark.parametrize("where", ["matches", "skips", "earlier"])
def test_far_too_much_is_refused_before_it_is_read(where: str) -> None:
    class Unread(list[Any]):
        """Its length may be asked for, its content not."""

        def __len__(self) -> int:
            return 100_000

        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    plan = written()
    if where == "earlier":
        plan = {**plan, "earlier": {**plan, "matches": Unread()}}
    else:
        plan[where] = Unread()
    with pytest.raises(PlanError, match=r"no network has more than 10000"):
        padfree.Plan.from_dict(plan)


def test_a_long_row_of_earlier_plans_is_refused() -> None:
    plan = {**written(), "matches": [], "skips": []}
    row = plan
    for _ in range(3_000):
        row = {**plan, "earlier": row}
    with pytest.raises(PlanError, match="more than 100 plans"):
        padfree.Plan.from_dict(row)


# -- what does not fit is refused when it is applied -------------------------------------------------------------


def changed(index: int, **fields: Any) -> padfree.Plan:
    plan = padfree.plan(build(), input_size=SIZE)
    matches = list(plan.matches)
    matches[index] = dataclasses.replace(matches[index], **fields)
    return dataclasses.replace(plan, matches=tuple(matches))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block": "2"}, r"its block of `1.main.0` is 2, and there it is 1"),
        ({"block": "nowhere"}, r"its block of `1.main.0` is nowhere"),
        ({"size": (31, 32)}, r"its size of `1.main.0` is \[31, 32\], and there it is \[32, 32\]"),
        ({"out_before": (15, 16)}, "its out_before of `1.main.0`"),
        ({"out_after": (16, 16)}, "its out_after of `1.main.0`"),
        ({"domain": 37}, "its domain of `1.main.0` is 37, and there it is 13"),
        ({"detail": Downsampling(4, 3, 1)}, "its detail of `1.main.0`"),
        ({"name": "1.main.9"}, "rule 'dense' does not find `1.main.9` there"),
        ({"rule": "depthwise"}, "rule 'depthwise' does not find `1.main.0` there"),
        ({"rule": "sparse"}, "uses rule 'sparse', and there are depthwise, .*; import the module"),
        (
            {"detail": Downsampling(8, 3, 0)},
            "`1.main.0` enters the same map and is not in the plan, or is another operation",
        ),
    ],
)
def test_a_plan_that_lies_is_refused(fields: dict[str, Any], words: str) -> None:
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(PlanError, match=words):
        changed(1, **fields).apply(model, inplace=True)
    assert [type(module) for module in model.modules()] == before


def test_half_a_domain_is_refused() -> None:
    plan = padfree.plan(build(), input_size=SIZE)
    half = dataclasses.replace(plan, matches=tuple(match for match in plan.matches if match.rule != "projection"))
    with pytest.raises(PlanError, match=r"cannot be carried out .*`1.main.0`: `1.shortcut.0` enters the same map"):
        half.apply(build())


def test_a_plan_made_by_hand_is_checked_too() -> None:
    plan = padfree.plan(build(), input_size=SIZE)
    for matches, words in ((plan.matches + plan.matches[:1], "twice"), (plan.matches * 30_000, "has 120000 matches")):
        with pytest.raises(PlanError, match=words):
            dataclasses.replace(plan, matches=matches).apply(build())


def test_a_rule_that_is_not_there_any_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written()
    others = {name: rule for name, rule in registered().items() if name != "dense"}
    monkeypatch.setattr("padfree.rules.base._RULES", others)  # an item deleted and put back would be asked last
    plan = padfree.Plan.from_dict(data)
    with pytest.raises(PlanError, match="uses rule 'dense', and there are depthwise"):
        plan.apply(build())


# -- how far it is from the call to the edit ---------------------------------------------------------------------


def test_from_convert_to_the_first_edit_are_five_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree.rewrite.surgeon import Surgeon

    found: list[list[str]] = []
    original = Surgeon.shortcut

    def seen(self: Surgeon, *args: Any) -> None:
        names = [frame.function for frame in inspect.stack()]
        found.append(names[: names.index("convert") + 1])
        original(self, *args)

    monkeypatch.setattr(Surgeon, "shortcut", seen)
    padfree.convert(build(), input_size=SIZE)
    assert found and max(map(len, found)) <= 5, found


# -- rules of users ----------------------------------------------------------------------------------------------


def test_a_rule_without_detail_classes_keeps_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registered(), "mine", Rule("mine", lambda sites, options: (), lambda match, edit: None))  # type: ignore[arg-type]
    match = {**FORMAT_1["matches"][1], "rule": "mine", "detail": {"op": 4, "names": ["a", "b"]}}
    for number in (1, 2):
        plan = padfree.Plan.from_dict({**FORMAT_1, "format": number, "matches": [match]})
        assert plan.matches[0].detail == {"op": 4, "names": ["a", "b"]} and plan.matches[0].operations == (4,)
    wrong = {**match, "detail": {"op": "4"}}
    with pytest.raises(PlanError, match=r"op of the detail of `1.main.0` is '4'"):
        padfree.Plan.from_dict({**FORMAT_1, "matches": [wrong]})


@pytest.mark.parametrize("kind", [dict, int, Detail, "Pool"])
def test_details_that_are_no_dataclasses_are_refused(kind: Any) -> None:
    with pytest.raises(padfree.PadfreeError, match="rule 'mine' has the detail"):
        padfree.register(Rule("mine", lambda sites, options: (), lambda match, edit: None, details=(kind,)))
    assert "mine" not in registered()
