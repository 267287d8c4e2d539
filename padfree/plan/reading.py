"""Plans as files say them: read strictly, since anybody may have written one."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from padfree.errors import PadfreeError, PlanError
from padfree.plan import format1
from padfree.rules.base import registered
from padfree.types import PLAN_FORMAT, Detail, Init, Match, Options, Returned, Skip

_MOST = 10_000  # matches and skips of a plan and those before it: many times those of the largest networks
_MOST_PLANS = 100  # one after another; a network is converted in part a few times at most


def read(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan, from what `PlanData.to_dict` wrote, this version's or the one before; `earlier` as it is.

    A match of a rule that is not registered keeps a mapping for its detail: `Plan.apply` then says which rule lacks.

    Raises:
        PlanError: a field is missing, unknown or of the wrong kind, a match comes twice, or there are far too many.
    """
    try:
        _check_length(data)
        found = data["format"]
        if found not in (1, PLAN_FORMAT) or type(found) is not int:
            raise PlanError(f"the plan has format {found!r}; this padfree reads 1 to {PLAN_FORMAT}")
        old = found == 1
        fields = {
            "model": _typed(str, data["model"], "model"),
            "input_size": _typed(tuple[int, ...], data["input_size"], "input_size"),
            "options": Options(**data["options"]),
            "matches": tuple(_match(item, old) for item in data["matches"]),
            "skips": tuple(_built(Skip, item, "skip", partly=old) for item in data["skips"]),
            "outputs": tuple(_built(Returned, item, "output", partly=False) for item in data.get("outputs", ())),
            "init": _init(data.get("init", "fresh")),  # all that earlier versions knew
        }
    except PadfreeError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"not a plan of padfree: {type(error).__name__}: {error}") from error
    check_matches(fields["matches"])
    return fields


def _init(value: Any) -> Init:
    if value not in ("fresh", "preserve"):
        raise PlanError(f"init of the plan is {value!r}; it is 'fresh' or 'preserve'")
    return "preserve" if value == "preserve" else "fresh"


def check_matches(matches: Sequence[Match]) -> None:
    """Refuse a plan that says the same twice, or too much to be one.

    Raises:
        PlanError: with the match, or the number.
    """
    if len(matches) > _MOST:
        raise PlanError(f"the plan has {len(matches)} matches; no network has more than {_MOST}")
    twice = [key for key, count in Counter(match.key for match in matches).items() if count > 1]
    if twice:
        raise PlanError(f"the plan has the match of `{twice[0][1]}` by rule {twice[0][0]!r} twice")


def _check_length(data: Mapping[str, Any]) -> None:
    count, plans, current = 0, 0, data
    while isinstance(current, Mapping):
        for name in ("matches", "skips"):
            if not isinstance(current[name], (list, tuple)):
                raise TypeError(f"{name} is {current[name]!r}")
        count += len(current["matches"]) + len(current["skips"]) + len(current.get("outputs", ()))
        if count > _MOST:
            raise PlanError(f"the plan has {count} matches and skips; no network has more than {_MOST}")
        plans += 1
        if plans > _MOST_PLANS:
            raise PlanError(f"more than {_MOST_PLANS} plans one before the other")
        current = current.get("earlier")  # type: ignore[assignment]


def _match(item: Mapping[str, Any], old: bool) -> Match:
    fields = dict(item)
    detail = fields.pop("detail", {}) if old else fields.pop("detail")
    rule, name = fields.get("rule"), fields.get("name")
    if type(detail) is not dict:
        raise TypeError(f"the detail of `{name}` is {detail!r}")
    if old and isinstance(rule, str):
        detail = format1.upgraded(rule, detail)
    match: Match = _built(Match, {**fields, "detail": {}}, "match", partly=False)
    return dataclasses.replace(match, detail=_detail(match, detail))


def _detail(match: Match, detail: dict[str, Any]) -> Detail | dict[str, Any]:
    rule = registered().get(match.rule)
    where = f"the detail of `{match.name}`"
    if rule is None or not rule.details:
        _typed(int, detail.get("op", 0), f"op of {where}")
        return detail
    kinds = {kind.__name__: kind for kind in rule.details}
    fields = dict(detail)
    kind = fields.pop("kind")
    if kind not in kinds:
        raise TypeError(f"{where} is of kind {kind!r}; rule {match.rule!r} has {', '.join(kinds)}")
    found: Detail = _built(kinds[kind], fields, where, partly=False)
    return found


def _built(cls: type[Any], data: Any, where: str, *, partly: bool) -> Any:
    """A dataclass from a dictionary; `partly`: fields that have a default may be missing.

    Raises:
        TypeError: a field is missing, unknown or of the wrong kind.
    """
    if type(data) is not dict:
        raise TypeError(f"{where} is {data!r}")
    hints = _hints(cls)
    unknown = data.keys() - hints.keys()
    missing = [] if partly else sorted(hints.keys() - data.keys())
    if unknown or missing:
        raise TypeError(f"{where} has no {missing[0]!r}" if missing else f"{where} has an unknown {min(unknown)!r}")
    return cls(**{name: _typed(hints[name], value, f"{name} of {where}") for name, value in data.items()})


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _hints(cls: type[Any]) -> dict[str, Any]:
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _HINTS[cls]


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as its field's type says it: lists become tuples, dictionaries dataclasses.

    Raises:
        TypeError: it is of another kind.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = getattr(option, "__supertype__", option)  # of a NewType
        if typing.get_origin(kind) is tuple and type(value) in (list, tuple):
            parts = typing.get_args(kind)
            parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
            if len(parts) == len(value):
                return tuple(_typed(part, item, where) for part, item in zip(parts, value, strict=True))
        elif dataclasses.is_dataclass(kind) and type(value) is dict:
            return _built(typing.cast(type[Any], kind), value, where, partly=False)
        elif type(value) is kind or (typing.get_origin(kind) is Mapping and type(value) is dict):
            return value
    raise TypeError(f"{where} is {value!r}")
