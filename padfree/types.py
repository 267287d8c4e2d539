"""The words of the design as frozen data: options, matches, skips and plans.

Everything here holds names (paths of `named_modules()`), strings and integers only, so it
prints, compares, serialises to JSON and applies to any copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from padfree.errors import PadfreeError, PlanError

PLAN_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """How the rules rewrite; paper.md says which family was published with which.

    Attributes:
        merge: where the pool shortcut is added: after the "activation", the "norm" or the "conv"
            of the strided conv's chain, or at the chain's end where it ends earlier.
        pool: "3x3" (stride 2, no padding, beside every kernel) or "kernel" (the conv's own kernel
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
        detail: rule-specific integers, strings and lists of them.
    """

    rule: str
    name: str
    block: str
    domain: int
    size: tuple[int, ...]
    out_before: tuple[int, ...]
    out_after: tuple[int, ...]
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def __str__(self) -> str:
        sizes = f"{_size(self.size)} -> {_size(self.out_before)} becomes {_size(self.out_after)}"
        if self.rule == "stem":
            sizes = f"hybrid tail on {_size(self.out_before)}"
        return f"{self.rule:<10} {self.name}: {sizes}"


@dataclass(frozen=True)
class Skip:
    """One place left alone, with the reason and the values that caused it.

    `in_scope` is False where the method defines no rewrite in the first place: a conv that is padding-free
    already, another stride than 2, a patchify stem, a conv that only subsamples keys and values.
    """

    name: str
    reason: str
    rule: str = ""
    domain: int = -1
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
        before, after = (_size(shape[2:]) for shape in (self.before, self.after))
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
    """

    model: str
    input_size: tuple[int, ...]
    options: Options
    matches: tuple[Match, ...]
    skips: tuple[Skip, ...]
    earlier: PlanData | None = None
    outputs: tuple[Returned, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back equal."""
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "input_size": list(self.input_size),
            "options": dataclasses.asdict(self.options),
            "matches": [match.to_dict() for match in self.matches],
            "skips": [skip.to_dict() for skip in self.skips],
            "earlier": None if self.earlier is None else self.earlier.to_dict(),
            "outputs": [output.to_dict() for output in self.outputs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanData:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: a field is missing, unknown or of the wrong kind.
        """
        try:
            if data["format"] != PLAN_FORMAT:
                raise PlanError(f"the plan has format {data['format']!r}; this padfree reads {PLAN_FORMAT}")
            return cls(
                model=_checked("model", data["model"]),
                input_size=_checked("input_size", data["input_size"]),
                options=Options(**data["options"]),
                matches=tuple(Match(**_fields(item)) for item in data["matches"]),
                skips=tuple(Skip(**_fields(item)) for item in data["skips"]),
                earlier=None if data.get("earlier") is None else cls.from_dict(data["earlier"]),
                outputs=tuple(Returned(**_fields(item)) for item in data.get("outputs", ())),
            )
        except PadfreeError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"not a plan of padfree: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        lines = [f"plan for {self.model} at {size}: {len(self.matches)} matches, {len(self.skips)} skips"]
        lines += [f"  {match}" for match in self.matches]
        lines += [f"  {item}" for item in (*self.skips, *self.outputs)]
        return "\n".join(lines)


_SIZES = ("input_size", "size", "out_before", "out_after", "before", "after")
_KINDS = {"domain": (int,), "op": (int,), "in_scope": (bool,), "detail": (dict,)} | dict.fromkeys(_SIZES, (list, tuple))


def _fields(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _checked(key, value) for key, value in item.items()}


def _checked(key: str, value: Any) -> Any:
    """The value of a field; those that `_KINDS` does not name are strings.

    Raises:
        TypeError: it is of the wrong kind.
    """
    right = type(value) in _KINDS.get(key, (str,))
    if right and key in _SIZES:
        right = all(type(side) is int for side in value)
    if not right:
        raise TypeError(f"{key} is {value!r}")
    if key == "detail":
        _checked("op", value.get("op", 0))
    return tuple(value) if key in _SIZES else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


NEW = "padfree_"
