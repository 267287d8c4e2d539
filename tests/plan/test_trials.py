"""Which groups can be converted together: all, all that can be traced, or one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from padfree.errors import Refusal
from padfree.indices import DomainId, OpId
from padfree.plan.groups import Group, find
from padfree.plan.patterns import Named
from padfree.plan.trials import Trials
from padfree.rules._toys import depthwise, unit
from padfree.rules.base import Rule, rules
from padfree.types import Match, Options, Skip, StridedDetail
from tests.recordings import sites_of


def group(domain: int, *names: str) -> Group:
    """Matches of one domain."""
    here, detail = DomainId(domain), StridedDetail(OpId(0))
    return Group(here, tuple(Match("toy", name, "", here, (9, 9), (5, 5), (4, 4), detail) for name in names))


class Scripted(Trials):
    """Trials whose outcome a function of the names says: a reason, or "" (its operations are the names)."""

    def __init__(self, verdict: Callable[[set[str]], str], untraceable: dict[str, str] | None = None) -> None:
        self.verdict, self.bad, self.tried = verdict, untraceable or {}, []

    def attempt(self, groups: list[Group], *, verified: bool = True) -> Any:
        if not groups:
            return (), ""
        names = [match.name for found in groups for match in found.matches]
        why = next((self.bad[name] for name in names if name in self.bad), "")
        if verified:
            self.tried.append("".join(names))
            why = why or self.verdict(set(names))
        return (None, why) if why else (tuple(names), "")


def settled(trials: Trials, *groups: Group) -> tuple[str, Any, dict[str, str]]:
    kept, operations, skips = trials.settle(list(groups))
    assert all(skip.rule == "toy" and skip.domain >= 0 for skip in skips)
    return "".join(found.name for found in kept), operations, {skip.name: skip.reason for skip in skips}


def fine(names: set[str]) -> str:
    return ""


A, B, C, D = (group(index, name) for index, name in enumerate("abcd"))


def test_what_cannot_be_traced_is_left_out_first() -> None:
    trials = Scripted(fine, {"b": "no trace"})
    assert settled(trials, A, B, C) == ("ac", ("a", "c"), {"b": "no trace"})
    assert trials.tried == ["ac"]  # one trial of all that is sound


def test_when_nothing_can_be_traced() -> None:
    assert settled(Scripted(fine, {"a": "one", "b": "two"}), A, B) == ("", (), {"a": "one", "b": "two"})


def test_they_grow_one_by_one_in_the_order_given() -> None:
    trials = Scripted(lambda names: "c breaks" if "c" in names else "")
    assert settled(trials, A, B, C, D) == ("abd", ("a", "b", "d"), {"c": "c breaks"})
    assert trials.tried == ["a", "ab", "abc", "abd", "abcd"]  # c once more, with what came after it


def test_what_failed_is_tried_again_with_what_was_kept_since() -> None:
    def verdict(names: set[str]) -> str:
        return "a needs c" if "a" in names and "c" not in names else ""

    assert settled(Scripted(verdict), A, B, C) == ("abc", ("a", "b", "c"), {})  # in the order of their domains


def test_two_that_exclude_each_other() -> None:
    def verdict(names: set[str]) -> str:
        return "a and b" if {"a", "b"} <= names else ""

    assert settled(Scripted(verdict), A, B, C) == ("ac", ("a", "c"), {"b": "a and b"})
    assert settled(Scripted(verdict), B, A, C) == ("bc", ("b", "c"), {"a": "a and b"})


def test_two_that_only_work_together_are_not_found() -> None:
    """What is tried grows by one group at a time; the reason is that of each alone."""

    def verdict(names: set[str]) -> str:
        return "one without the other" if len(names & {"a", "b"}) == 1 else ""

    assert settled(Scripted(verdict), A, B, C)[::2] == ("c", dict.fromkeys("ab", "one without the other"))


def test_nothing_that_verifies() -> None:
    trials = Scripted(lambda names: f"{len(names)} of them")
    assert settled(trials, A, B) == ("", (), {"a": "1 of them", "b": "1 of them"})
    assert trials.tried == ["a", "b"]  # the second pass would try the same again


def test_a_chain_of_needs_takes_as_many_passes() -> None:
    needs = {"a": "b", "b": "c", "c": "d"}

    def verdict(names: set[str]) -> str:
        return next((f"{one} needs {other}" for one, other in needs.items() if one in names and other not in names), "")

    assert settled(Scripted(verdict), A, B, C, D)[::2] == ("bcd", {"a": "a needs b"})  # three passes, and no more


def test_a_match_says_whose_fault_it_is() -> None:
    trials = Scripted(fine, {"y": "it is a function"})
    kept, _, whys = settled(trials, group(1, "x", "y", "z"), group(2, "a"))
    other = "`y` enters the same map and cannot be converted: it is a function"
    assert kept == "a"
    assert whys == {"x": other, "y": "it is a function", "z": other}


def test_no_groups() -> None:
    assert Scripted(fine).settle([]) == ([], (), [])


# -- of a recorded network --------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """A unit whose forward asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if len(str(y.shape[-1] + 0)) > 3 or not isinstance(x, Tensor):
            y = y * 2
        return self.act(self.norm(y))


class FixedHead(nn.Module):
    """A linear layer over a map of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def trials_of(forward: Any, **children: nn.Module) -> tuple[Trials, list[Group]]:
    sites = sites_of(lambda net, x: forward(net, net.stem(x)), (3, 32, 32), stem=unit(3, 8), **children)
    used = rules(("depthwise",))
    groups, _ = find(sites, used, Options(), Named())
    return Trials(sites, Options(), used), groups


def test_all_at_once() -> None:
    trials, groups = trials_of(lambda net, x: net.b(net.a(x)), a=depthwise(8), b=depthwise(8))
    assert [found.name for found in groups] == ["a.0", "b.0"]
    operations, why = trials.attempt(groups)
    assert operations and why == ""
    assert len({operation.path for operation in operations}) >= 2
    assert trials.attempt([]) == ((), "")


def test_one_of_two_fits_a_head_of_one_size() -> None:
    trials, groups = trials_of(lambda net, x: net.head(net.b(net.a(x))), a=depthwise(8), b=depthwise(8),
                               head=FixedHead())  # fmt: skip
    operations, why = trials.attempt(groups)
    assert operations is None and "head.linear" in why
    assert trials.attempt(groups, verified=False)[0]  # it can be carried out; what comes out cannot be used
    kept, operations, skips = trials.settle(groups)
    assert [found.name for found in kept] == ["a.0"] and operations  # b makes 8 pixels of 15 as of 16
    assert [skip.name for skip in skips] == ["b.0"] and "head.linear" in skips[0].reason


def test_a_branch_of_one_size_stops_its_own_domain_only() -> None:
    halved = nn.Sequential(depthwise(8), nn.MaxPool2d(2))
    trials, groups = trials_of(lambda net, x: (net.b(x), net.head(net.c(x))), b=depthwise(8), c=halved,
                               head=FixedHead())  # fmt: skip
    kept, operations, skips = trials.settle(groups)
    assert [found.name for found in kept] == ["b.0"] and operations
    assert [skip.name for skip in skips] == ["c.0.0"] and "head.linear" in skips[0].reason


def test_a_rule_that_refuses_and_one_that_cannot_be_carried_out() -> None:
    sites = sites_of(lambda net, x: net.a(net.stem(x)), (3, 32, 32), stem=unit(3, 8), a=depthwise(8))

    def refuse(match: Match, editor: Any) -> None:
        raise Refusal(f"not {match.name}")

    def break_it(match: Match, editor: Any) -> None:
        editor.assign("a.0", stride=None)

    (found,), _ = find(sites, rules(("depthwise",)), Options(), Named())
    for rewrite, words in ((refuse, "not a.0"), (break_it, "a.0")):
        trials = Trials(sites, Options(), [Rule("depthwise", lambda *_: (), rewrite)])
        operations, why = trials.attempt([found])
        assert operations is None and words in why
        assert trials.settle([found])[2] == [Skip("a.0", why, "depthwise", found.domain)]


def test_the_recorded_model_is_left_as_it_was() -> None:
    trials, groups = trials_of(lambda net, x: net.a(x), a=depthwise(8))
    model = trials.sites.recording.model
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    for _ in range(2):
        assert trials.attempt(groups)[0]
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert model.a[0].padding == (1, 1)


@pytest.mark.parametrize("verified", [False, True])
def test_following_rules_are_asked_for_the_sizes_to_come(verified: bool) -> None:
    sites = sites_of(lambda net, x: net.a(net.stem(x)), (3, 32, 32), stem=unit(3, 8), a=depthwise(8))
    (found,), _ = find(sites, rules(("depthwise",)), Options(), Named())
    asked: list[dict[Any, tuple[int, int]]] = []

    def follow(sites: Any, options: Options, sizes: Any) -> list[Match]:
        asked.append(dict(sizes))
        return []

    (depth,) = rules(("depthwise",))
    watching = Rule("watching", lambda *_: (), depth.rewrite, follow=follow)
    assert Trials(sites, Options(), [depth, watching]).attempt([found], verified=verified)[0]
    (sizes,) = asked
    assert sizes[found.domain] == (15, 15)
