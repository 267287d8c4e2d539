"""What a conversion saves and adds, place by place.

A place is what shrinks together: the matches that enter one map, or a stem with its tail. All layers that write that
map, or one of its size behind it, lie there, up to the next place. Layers that both networks have cost less there, as
their maps are smaller; other layers are new, or gone. All places and the rest of the network add up to the counts of
the whole networks, before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from padfree.analysis.kinds import AVG_POOLS, MAX_POOLS
from padfree.analysis.maps import Maps
from padfree.record.recorder import Op
from padfree.record.recording import Recording, path_of
from padfree.report.costs import NOTHING, Cost
from padfree.types import NO_DOMAIN, Match, PlanData

Group = tuple[Match, ...]
_REST = -1  # where no place is
STRIDED = frozenset({"convolution", "_convolution", *MAX_POOLS, *AVG_POOLS})  # operations that may shrink a map


@dataclass(frozen=True)
class Place:
    """One place of a conversion.

    Attributes:
        name: the module that leads it, and how many are rewritten with it; "" for the rest of the network.
        rules: what rewrote it.
        before: what the original's layers cost that lie there.
        maps: by how much those of them that stay cost more (less: negative) on the maps that they have now.
        layers: what new layers cost there, less what layers cost that are gone. (Pools and sums that a forward got are
            no layers: the numbers that they write count as its own, in `maps`.)
    """

    name: str
    rules: tuple[str, ...]
    before: Cost
    maps: Cost
    layers: Cost

    @property
    def after(self) -> Cost:
        """What the converted network's layers cost there."""
        return self.before + self.maps + self.layers


@dataclass(frozen=True)
class Side:
    """One of the two networks: itself, its recording, and what each module costs (`padfree.report.costs`)."""

    model: nn.Module
    recording: Recording
    costs: Mapping[str, Cost]


def together(matches: Sequence[Match]) -> list[Group]:
    """Matches by place: those that enter one map are one place, and so is each stem."""
    groups: dict[object, list[Match]] = {}
    for match in matches:
        groups.setdefault(match.domain if match.domain != NO_DOMAIN else match.key, []).append(match)
    return [tuple(group) for group in groups.values()]


def place_name(group: Group) -> str:
    """A place in a table: the module that leads it, and how many are rewritten with it."""
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{group[0].name or 'its own forward'}{more}"


def places(original: Side, converted: Side, plan: PlanData) -> tuple[Place, ...]:
    """The places of a plan and of those before it, and last the rest of the network.

    Args:
        original: the network before conversion.
        converted: the network after it.
        plan: what was done.
    """
    groups = [group for step in plan.steps() for group in together(step.matches)]
    before, after = (_lying(side.recording, groups) for side in (original, converted))
    own = _own(original.model), _own(converted.model)
    rows = [[NOTHING, NOTHING, NOTHING] for _ in (*groups, None)]
    for path in dict.fromkeys((*original.costs, *converted.costs)):
        old, new = original.costs.get(path, NOTHING), converted.costs.get(path, NOTHING)
        at, sure = before.get(path, (_REST, True)) if path in own[0] else after.get(path, (_REST, True))
        if old == new and not sure:
            at = _REST  # it lies behind the last place, and is as it was
        stays = path in own[0] and own[0][path] == own[1].get(path)
        change = (new - old, NOTHING) if stays else (NOTHING, new - old)
        rows[at] = [total + part for total, part in zip(rows[at], (old, *change), strict=True)]
    names = [(place_name(group), tuple(dict.fromkeys(match.rule for match in group))) for group in groups]
    return tuple(Place(*name, *row) for name, row in zip([*names, ("", ())], rows, strict=True))


def _own(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of each module's own parameters, by path."""
    return {
        path: [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False)]
        for path, module in model.named_modules()
    }


def _lying(recording: Recording, groups: Sequence[Group]) -> dict[str, tuple[int, bool]]:
    """The place of each module that runs, and whether that is known; else it is the last place before it."""
    maps = Maps(recording)
    domains: dict[int, int] = {}
    for number, group in enumerate(groups):
        for match in group:
            if match.domain != NO_DOMAIN:
                for op in _strided(recording, match):
                    domains.setdefault(maps.domain(op.outputs[0]), number)
    apart = {match.name: number for number, group in enumerate(groups) for match in group if match.domain == NO_DOMAIN}
    found: dict[str, tuple[int, bool]] = {}
    last = _REST
    for op in recording.ops:
        path = path_of(recording, op)
        written = [
            domains[maps.domain(value)] for value in op.outputs if maps.placed(value) and maps.domain(value) in domains
        ]
        alone = next((number for name, number in apart.items() if f"{path}.".startswith(f"{name}.")), None)
        if alone is not None:
            last = alone
        elif written:
            last = written[0]
        if written or alone is not None:
            if not found.get(path, (_REST, False))[1]:
                found[path] = (last, True)
        else:
            found.setdefault(path, (last, False))
    return found


def _strided(recording: Recording, match: Match) -> list[Op]:
    """The operations that shrink the map of a match: of those of its module that shrink one, the planned ones."""
    issued = [op for op in recording.ops if op.kind in STRIDED and path_of(recording, op) == match.name]
    shrinking = [op for op in issued if _shrinks(recording, op)]
    return [op for op in shrinking if op.index in match.operations] or shrinking


def _shrinks(recording: Recording, op: Op) -> bool:
    read, written = (recording.values[index].shape for index in (op.inputs[0], op.outputs[0]))
    return len(read) == len(written) == 4 and any(a < b for a, b in zip(written[2:], read[2:], strict=True))
