"""What is wrong with a recipe, by the keys that its author wrote, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .recipe import Recipe

_SHOWN = 8  # settings that are listed
_QUOTED = re.compile("'([^']+)'")  # pydantic tells choices in words


def faults(error: ValidationError, data: Mapping[str, Any], typed: Iterable[str]) -> list[str]:
    """Each fault in a line's worth of words: key, what is wrong, what is there.

    Args:
        error: of validating `data` as a recipe.
        data: what the file says, with the changes.
        typed: keys that were changed, as they were given.
    """
    known = list(_known(Recipe, data))
    items = error.errors(include_url=False)
    inner = {item["loc"][:-depth] for item in items for depth in range(1, len(item["loc"]))}
    # a tuple is too short for pydantic where a wrong item was left out, which is told already
    items = [item for item in items if item["type"] != "too_short" or item["loc"] not in inner]
    return [_fault(item, data, known, tuple(typed)) for item in items]


def _fault(item: Any, data: Mapping[str, Any], known: Sequence[str], typed: Sequence[str]) -> str:
    key = _key(item, data)
    context = item.get("ctx", {})
    if item["type"] == "extra_forbidden":
        longer = next((given for given in typed if given.startswith(f"{key}.")), key)  # optimiser.lr=0.1
        return f"{longer}: {_unknown(longer, known)}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key = f"{key}.{context['discriminator'].strip(chr(39))}"
        expected = _QUOTED.findall(context.get("expected_tags", ""))
        return f"{key}: is not there" if not expected else f"{key}: {_choice(context['tag'], expected)}"
    given = item.get("input")
    if item["type"] == "literal_error" and isinstance(given, str):
        return f"{key}: {_choice(given, _QUOTED.findall(context['expected']))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = f" (it is {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{key or 'the recipe'}: {message}{shown}"


def _key(item: Any, data: Any) -> str:
    """The dotted key of a fault, without names that only the checker knows, such as the chosen form of a section."""
    parts: list[str] = []
    last = len(item["loc"]) - 1
    for index, part in enumerate(item["loc"]):
        there = part in data if isinstance(data, Mapping) else isinstance(data, list) and part in range(len(data))
        if there or (item["type"] == "missing" and index == last):
            parts.append(str(part))
            data = data[part] if there else None
    return ".".join(parts)


def _unknown(key: str, known: Sequence[str]) -> str:
    """What to say about a key that no recipe has."""
    parent, _, name = key.rpartition(".")
    beside = [other for other in known if other.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(name, [other.rpartition(".")[2] for other in beside], n=1, cutoff=0.7)
    near = [other for other in beside if other.rpartition(".")[2] in near]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not near:  # a right name without its section, or in another one
        names = difflib.get_close_matches(name, [other.rpartition(".")[2] for other in known], n=1, cutoff=0.75)
        near = [other for other in known if other.rpartition(".")[2] in names]
    if near and near[0] != key:
        return f"did you mean {near[0]}?"
    return f"no such setting; there are {', '.join(beside[:_SHOWN])}{', ...' if len(beside) > _SHOWN else ''}"


def _choice(given: object, expected: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(given), expected, n=1)
    return f"no {given!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(expected)}")


def _known(section: type[BaseModel], data: Any, prefix: str = "") -> Iterator[str]:
    """All keys that a recipe like this one may have, with dots."""
    for name, field in section.model_fields.items():
        if not prefix and name == "name":
            continue  # not in the file
        yield prefix + name
        inner = data.get(name) if isinstance(data, Mapping) else None
        for part in _sections(field.annotation):
            named = part.model_fields.get("name")
            tags = [tag for tag in get_args(named.annotation) if isinstance(tag, str)] if named else []
            chosen = inner.get("name") if isinstance(inner, Mapping) else None
            if not tags or not isinstance(chosen, str) or chosen in tags:
                yield from _known(part, inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold; those in mappings and tuples have no keys of their own."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) in (dict, tuple, list, Literal):
        return []
    return [part for item in get_args(annotation) for part in _sections(item)]
