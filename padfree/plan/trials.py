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
from padfree.types import NO_DOMAIN, Match, Options, Returned, Skip
from padfree.verify.resizing import returned
from padfree.verify.verify import Original, verify

_PASSES = 3  # how often groups that failed are tried again with those that were kept since


class Trials:
    """Trials of one recorded model; blocks are traced once for all of them.

    Args:
        sites: the recorded model.
        options: how the rules rewrite.
        rules: those in use.
        run: runs a copy that operations were carried out on for real, and says why it fails ("": it does not);
            None: meta tensors are enough.
    """

    _run: Callable[[tuple[Operation, ...]], str] | None = None

    def __init__(
        self,
        sites: Sites,
        options: Options,
        rules: Iterable[Rule],
        run: Callable[[tuple[Operation, ...]], str] | None = None,
    ) -> None:
        self.sites = sites
        self.options = options
        self._rules = {rule.name: rule for rule in rules}
        self._traced: TraceCache = {}
        self._original = Original(sites.recording)
        self._run = run
        self._returned: dict[tuple[Group, ...], tuple[Returned, ...]] = {(): returned(sites.recording)}

    def placed(self, groups: list[Group]) -> list[Group]:
        """The groups, with matches of one module's own at the first of their rule's places that can be operated on."""
        return [self._placed(group) if group.domain == NO_DOMAIN else group for group in groups]

    def _placed(self, group: Group) -> Group:
        (match,) = group.matches
        alternatives = self._rules[match.rule].alternatives
        if alternatives is None or not self._untraceable(group.matches):
            return group
        others = (other for other in alternatives(self.sites, self.options) if other.key == match.key)
        found = next((other for other in others if not self._untraceable((other,))), match)
        return Group(group.domain, (found,))

    def settle(self, groups: list[Group]) -> tuple[list[Group], tuple[Operation, ...], list[Skip]]:
        """The largest set of groups found that verifies and runs, its operations, and the others as skips.

        For groups that cannot be converted all together: all that can be operated on at all; else one after another
        from the input on, those that failed being tried again with what was kept after them.
        """
        kept, operations, skips = self._settle(groups)
        if not kept or not self.fails(operations):
            return kept, operations, skips
        reasons: dict[Group, str] = {}
        runs, operations = self._grow(kept, reasons, self.fails)
        return runs, operations, skips + self._skips([g for g in kept if g not in runs], reasons, set())

    def fails(self, operations: tuple[Operation, ...]) -> str:
        """Why a copy that these were carried out on does not run on real tensors; "" where it does, or is not tried."""
        return "" if self._run is None or not operations else self._run(operations)

    def outputs(self, groups: list[Group]) -> tuple[Returned, ...]:
        """The maps that the model returns, before and after the conversion of groups that verified."""
        return self._returned[tuple(groups)]

    def _settle(self, groups: list[Group]) -> tuple[list[Group], tuple[Operation, ...], list[Skip]]:
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
        return self.attempt([Group(matches[0].domain, matches)], verified=False)[1]

    def attempt(self, groups: list[Group], *, verified: bool = True) -> tuple[tuple[Operation, ...] | None, str]:
        """The operations that convert these groups, if the result verifies; else None and the reason.

        With `verified=False` the operations are only made, not tried.
        """
        if not groups:
            return (), ""
        surgeon = Surgeon(self.sites, self.options, self._traced)
        try:
            for match in (*(match for group in groups for match in group.matches), *self.following(groups)):
                self._rules[match.rule].rewrite(match, surgeon)
            operations = surgeon.operations()
            if verified:
                self._returned[tuple(groups)] = self._verify(operations)
        except PadfreeError as refusal:
            return None, str(refusal)
        return operations, ""

    def following(self, groups: list[Group]) -> list[Match]:
        """Matches of layers whose own size must follow their map's once these groups are converted."""
        sizes = sizes_after(self.sites, groups)
        rules = self._rules.values()
        return [
            match for rule in rules if rule.follow is not None for match in rule.follow(self.sites, self.options, sizes)
        ]

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
