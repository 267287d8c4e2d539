"""Which groups of matches can be converted together: tried on weightless copies until they verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from padfree.analysis.sites import Sites
from padfree.errors import PadfreeError, Refusal
from padfree.plan.groups import Group
from padfree.plan.sizes import sizes_after
from padfree.record.copies import full_copy
from padfree.record.trees import first_line
from padfree.rewrite.operations import Operation, perform
from padfree.rewrite.surgeon import Surgeon, TraceCache
from padfree.rules.base import Rule
from padfree.rules.base import rules as get_rules
from padfree.types import Match, Options, Returned, Skip
from padfree.verify.resizing import returned
from padfree.verify.verify import Original, verify

_PASSES = 3  # how often groups that failed are tried again beside those that were kept since


class Trials:
    """Trials of one recorded model; blocks are traced once for all of them.

    Args:
        sites: the recorded model.
        options: how the rules rewrite.
        selected: the rules in use; default: all.
        run: runs a copy that operations were carried out on for real, and says why it fails ("": it does not);
            None: meta tensors are enough.
    """

    def __init__(
        self,
        sites: Sites,
        options: Options,
        selected: Iterable[Rule] | None = None,
        run: Callable[[tuple[Operation, ...]], str] | None = None,
    ) -> None:
        self.sites = sites
        self.options = options
        self.selected = get_rules() if selected is None else tuple(selected)
        self._traced: TraceCache = {}
        self._original = Original(sites.recording)
        self._run = run
        self._returned: dict[tuple[Group, ...], tuple[Returned, ...]] = {(): returned(sites.recording)}

    def settle(self, groups: list[Group]) -> tuple[list[Group], tuple[Operation, ...], list[Skip]]:
        """The largest set of groups found that verifies and runs, its operations, and the rest as skips.

        All of them; else all that can be operated on at all; else one after another from the input on,
        those that failed being tried again beside what was kept after them.
        """
        kept, operations, skips = self._settle(groups)
        if self._run is None or not kept or not self._run(operations):
            return kept, operations, skips
        reasons: dict[Group, str] = {}
        runs, operations = self._grow(kept, reasons, self._run)
        return runs, operations, skips + self._skips([g for g in kept if g not in runs], reasons, set())

    def outputs(self, groups: list[Group]) -> tuple[Returned, ...]:
        """The maps that the model returns, before and after the conversion of groups that verified."""
        return self._returned[tuple(groups)]

    def _settle(self, groups: list[Group]) -> tuple[list[Group], tuple[Operation, ...], list[Skip]]:
        operations, _ = self.attempt(groups)
        if operations is not None:
            return groups, operations, []
        reasons = {group: why for group in groups if (why := self._untraceable(group.matches))}
        untraceable = set(reasons)
        sound = [group for group in groups if group not in untraceable]
        operations, _ = self.attempt(sound) if reasons else (None, "")
        if operations is not None:
            return sound, operations, self._skips(groups, reasons, untraceable)
        kept, operations = self._grow(sound, reasons)
        return kept, operations, self._skips([group for group in groups if group not in kept], reasons, untraceable)

    def _skips(self, groups: list[Group], reasons: dict[Group, str], untraceable: set[Group]) -> list[Skip]:
        """Each match of the groups that were given up, with the reason, and whose it is where that is another one."""
        found: list[Skip] = []
        for group in groups:
            if group not in reasons:
                continue
            matches = group.matches if group in untraceable else ()
            own = {match: why for match in matches if (why := self._untraceable((match,)))}
            first = next(iter(own.items()), None)
            for match in group.matches:
                why = own.get(match, reasons[group])
                if first is not None and match not in own:
                    why = f"`{first[0].name}` enters the same map and cannot be converted: {first[1]}"
                found.append(Skip(match.name, why, match.rule, group.domain))
        return found

    def _grow(
        self,
        groups: list[Group],
        reasons: dict[Group, str],
        run: Callable[[tuple[Operation, ...]], str] = lambda operations: "",
    ) -> tuple[list[Group], tuple[Operation, ...]]:
        kept: list[Group] = []
        best: tuple[Operation, ...] = ()
        waiting = groups
        for _ in range(_PASSES):
            failed: list[Group] = []
            for group in waiting:
                trial = sorted([*kept, group], key=lambda g: (g.domain, g.name))
                operations, why = self.attempt(trial)
                why = why or run(operations or ())
                if operations is None or why:
                    reasons[group] = why
                    failed.append(group)
                else:
                    kept, best = trial, operations
            if not failed or len(failed) == len(waiting):
                break
            waiting = failed
        return kept, best

    def _untraceable(self, matches: tuple[Match, ...]) -> str:
        try:
            self.operations([Group(matches[0].domain, matches)])
        except PadfreeError as refusal:
            return str(refusal)
        return ""

    def attempt(self, groups: list[Group]) -> tuple[tuple[Operation, ...] | None, str]:
        """The operations that convert these groups if the result verifies; else None and the reason."""
        if not groups:
            return (), ""
        try:
            operations = self.operations(groups)
            self._returned[tuple(groups)] = self._verify(operations)
        except PadfreeError as refusal:
            return None, str(refusal)
        return operations, ""

    def operations(self, groups: list[Group]) -> tuple[Operation, ...]:
        """What carries these groups' matches out.

        Raises:
            Refusal: a block cannot be given another forward.
        """
        surgeon = Surgeon(self.sites, self.options, self._traced)
        by_name = {rule.name: rule for rule in self.selected}
        for match in (*(match for group in groups for match in group.matches), *self.following(groups)):
            rule = by_name.get(match.rule) or get_rules([match.rule])[0]
            rule.rewrite(match, surgeon)
        return surgeon.operations()

    def following(self, groups: list[Group]) -> list[Match]:
        """Matches of layers whose own size must follow their map's once these groups are converted."""
        sizes = sizes_after(self.sites, groups)
        rules = [rule for rule in self.selected if rule.follow is not None]
        return [match for rule in rules if rule.follow for match in rule.follow(self.sites, self.options, sizes)]

    def _verify(self, operations: tuple[Operation, ...]) -> tuple[Returned, ...]:
        recording = self.sites.recording
        try:
            trial = perform(full_copy(recording.model), operations)
        except PadfreeError:
            raise
        except Exception as error:  # the user's own classes are copied and assigned to here
            raise Refusal(f"it cannot be carried out: {type(error).__name__}: {first_line(error)}") from error
        after = verify(self._original, trial, operations, allow_resize=self.options.allow_resize)
        return returned(recording, after)
