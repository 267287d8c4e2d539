"""Plans of format 1, whose matches carried dictionaries: their details as format 2 writes them."""

from __future__ import annotations

from typing import Any


def upgraded(rule: str, detail: dict[str, Any]) -> dict[str, Any]:
    """The detail of a match in format 2; nothing is checked that reading it will check.

    Raises:
        KeyError: a field is missing.
    """
    found = _UPGRADES.get(rule)
    return detail if found is None else found(dict(detail))


def _downsampling(detail: dict[str, Any]) -> dict[str, Any]:
    shortcut = None
    if "merge" in detail:
        kernel, padding = detail.pop("pool")
        shortcut = {name: detail.pop(name) for name in ("source", "anchor", "merge", "repeat", "project")}
        shortcut |= {"kernel": kernel, "padding": padding, "project": _flag(shortcut["project"])}
    absent: dict[str, Any] = {"channels": None, "points": [], "points_block": None, "unfuse": None}
    largest = detail.pop("lead", None)
    return {"kind": "Downsampling", "largest": largest, **absent, **detail, "shortcut": shortcut}


def _projection(detail: dict[str, Any]) -> dict[str, Any]:
    if "blur" in detail:
        return {"kind": "Blur", "padding": detail.pop("blur"), **detail}
    if "dense" not in detail:
        return {"kind": "Pool", "kept": _flag(detail.pop("kept", 0)), **detail}
    detail |= {"dense": _flag(detail["dense"]), "norm": detail["norm"] or None}
    return {"kind": "Projection", "own_norm": None, **detail}


def _stem(detail: dict[str, Any]) -> dict[str, Any]:
    absent: dict[str, Any] = {"settings": [], "place": None, "end": None, "pool": None}
    flags = {name: _flag(detail[name]) for name in ("preact", "norm_last", "absorbs")}
    paths = {name: detail[name] or None for name in ("norm", "act", "function")}
    return {"kind": "Stem", **absent, **detail, **flags, **paths}


def _parc(detail: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "Resize", **detail}


def _flag(value: Any) -> Any:
    """0 and 1, as format 1 wrote flags; anything else stays as it is, and is refused where it is read."""
    return bool(value) if type(value) is int and value in (0, 1) else value


_UPGRADES = {
    "depthwise": _downsampling,
    "dense": _downsampling,
    "projection": _projection,
    "stem": _stem,
    "parc": _parc,
}
