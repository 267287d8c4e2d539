"""The words of the design as frozen data: options, matches, skips and plans.

Everything here holds names (paths of `named_modules()`), strings and integers only, so it
prints, compares, serialises to JSON and applies to any copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.indices import DomainId, OpId

PLAN_FORMAT = 2
NO_DOMAIN = DomainId(-1)
Init = Literal["fresh", "preserve", "auto"]
INITS: tuple[Init, ...] = ("auto", "preserve", "fresh")


@dataclass(frozen=True)
class Options:
    """How the rules rewrite; the paper says which family was published with which.

    Attributes:
        merge: where the pool shortcut is added: after the "activation", the "norm" or the "conv"
            of the strided conv's chain, or at the chain's end where it ends earlier.
        pool: "3x3" (stride 2, no padding, whatever the conv's kernel) or "kernel" (the conv's own kernel
            and reduced padding; GhostNet).
        projection: what a strided 1x1 shortcut becomes: "depthwise" or "dense" (WRN-40-3).
        stem_residual: add the stem's output back after the hybrid tail (ResNets and WRNs).
        allow_resize: accept pads, crops, interpolations and rolls that the original did not make, and returned
            maps that lose the image's sides.
    """

    merge: Literal["activation", "norm", "conv"] = "activation"
    pool: Literal["3x3", "kernel"] = "3x3"
    projection: Literal["depthwise", "dense"] = "depthwise"
    stem_residual: bool = False
    allow_resize: bool = False

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "merge": ("activation", "norm", "conv"),
            "pool": ("3x3", "kernel"),
            "projection": ("depthwise", "dense"),
            "stem_residual": (True, False),
            "allow_resize": (True, False),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if not any(value is item or (value == item and type(value) is type(item)) for item in allowed):
                raise PadfreeError(f"Options.{name} is {value!r}; it takes one of {allowed}")


class Detail:
    """What a rule needs to know of a place, over what every match says.

    A rule's own is a frozen dataclass of integers, flags, strings, tuples and dataclasses of them, or None for what is
    absent. The rule names it in `Rule.details`, so that plans can be read back.
    """

    @property
    def operations(self) -> tuple[OpId, ...]:
        """The strided operations that the match accounts for."""
        return ()

    @property
    def unchanged(self) -> bool:
        """Whether they write the padding-free size as they stand: nothing is done to them."""
        return False

    @property
    def words(self) -> str:
        """What is done there, for people, where the sizes of maps do not say it."""
        return ""


@dataclass(frozen=True)
class StridedDetail(Detail):
    """Of a place at one recorded operation.

    Attributes:
        op: the operation that shrinks the map (a stem's conv: that the tail follows).
    """

    op: OpId

    @property
    def operations(self) -> tuple[OpId, ...]:
        """The strided operations that the match accounts for."""
        return (self.op,)


@dataclass(frozen=True)
class Match:
    """One place a rule will rewrite.

    Attributes:
        rule: the rule's name.
        name: path of the module rewritten (the strided conv, pool or stem conv).
        block: path of the module whose forward is re-written for it ("" if none is needed).
        domain: index of the resolution domain it enters (-1 for a stem, which shrinks nothing).
        size: (H, W) of the map it reads, pixels.
        out_before, out_after: (H, W) it writes, before and after.
        detail: what its rule needs to know; where the rule declares no class for it, a mapping of integers, strings and
            lists of them, in which "op" is the operation that shrinks the map.
    """

    rule: str
    name: str
    block: str
    domain: DomainId
    size: tuple[int, ...]
    out_before: tuple[int, ...]
    out_after: tuple[int, ...]
    detail: Detail | Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def operations(self) -> tuple[OpId, ...]:
        """The strided operations that it accounts for; the first is the one that it is named after."""
        if isinstance(self.detail, Detail):
            return self.detail.operations
        return (self.detail["op"],) if "op" in self.detail else ()

    @property
    def key(self) -> tuple[str, str, tuple[OpId, ...]]:
        """What tells matches apart."""
        return (self.rule, self.name, self.operations[:1])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        if isinstance(self.detail, Detail):
            plain["detail"] = {"kind": type(self.detail).__name__, **plain["detail"]}
        return plain

    def __str__(self) -> str:
        sizes = f"{size_text(self.size)} -> {size_text(self.out_before)} becomes {size_text(self.out_after)}"
        if words(self):
            sizes = words(self)
        elif self.rule == "stem":
            sizes = f"hybrid tail on {size_text(self.out_before)}"
        return f"{self.rule:<10} {self.name}: {sizes}"


def words(match: Match) -> str:
    """What is done at a place, where the sizes of maps do not say it."""
    return match.detail.words if isinstance(match.detail, Detail) else ""


@dataclass(frozen=True)
class Skip:
    """One place left alone, with the reason and the values that caused it.

    `in_scope` is False where the method defines no rewrite in the first place: a conv that is padding-free
    already, another stride than 2, a patchify stem, a conv that only subsamples keys and values.
    """

    name: str
    reason: str
    rule: str = ""
    domain: DomainId = NO_DOMAIN
    in_scope: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{'skip':<10} {self.name}: {self.reason}"


@dataclass(frozen=True)
class Returned:
    """A map that the model returns: its whole shape, before and after.

    Attributes:
        name: where it lies in what the model returns: "out", "1", "features.0"; "" if it is all of it.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'output':<10} {self.name + ': ' if self.name else ''}{self.sizes(' becomes ')}"

    def sizes(self, between: str) -> str:
        """Its sides before and after, without batch and channels; once where they stay."""
        before, after = (size_text(shape[2:]) for shape in (self.before, self.after))
        return before + between + after if before != after else before

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"name": self.name, "before": list(self.before), "after": list(self.after)}


@dataclass(frozen=True)
class PlanData:
    """What will be done to a model: the data of a plan (`padfree.Plan` adds `apply`).

    Attributes:
        model: class name of the model planned for.
        input_size: (C, H, W) it was recorded at.
        options: the options it was made with.
        matches: what will be rewritten.
        skips: what is left alone, and why.
        earlier: the plan that was applied to the model before (it had been converted in part).
        outputs: the maps that the model returns; empty in plans of earlier versions.
        init: how the new layers begin: "fresh" (torch's initial values, as in the paper) or "preserve" (values at which
            the network computes what it did before, as far as there are such without data).
    """

    model: str
    input_size: tuple[int, ...]
    options: Options
    matches: tuple[Match, ...]
    skips: tuple[Skip, ...]
    earlier: PlanData | None = None
    outputs: tuple[Returned, ...] = ()
    init: Init = "fresh"

    def steps(self) -> list[PlanData]:
        """The plans that are carried out one after another: those of before, the earliest first, and this one."""
        found: list[PlanData] = [self]
        while found[-1].earlier is not None:
            found.append(found[-1].earlier)
        return found[::-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `padfree.Plan.from_dict` reads it back equal."""
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "input_size": list(self.input_size),
            "options": dataclasses.asdict(self.options),
            "matches": [match.to_dict() for match in self.matches],
            "skips": [skip.to_dict() for skip in self.skips],
            "earlier": None if self.earlier is None else self.earlier.to_dict(),
            "outputs": [output.to_dict() for output in self.outputs],
            "init": self.init,
        }

    def __str__(self) -> str:
        size = size_text(self.input_size)
        counts = f"{len(self.matches)} matches, {len(self.skips)} skips, init {self.init}"
        lines = [f"plan for {self.model} at {size}: {counts}"]
        lines += [f"  {match}" for match in self.matches]
        lines += [f"  {item}" for item in (*self.skips, *self.outputs)]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


KEPT = "padfree_kept"
"""Plain attribute of a child that cannot be set anew: why (`rewrite.kept`)."""

NEW = "padfree_"

FUSED = "padfree_fused"
"""Plain attribute of a fused network: the (C, H, W) that it was fused at."""
