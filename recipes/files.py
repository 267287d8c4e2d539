"""Recipe files: finding, reading, changing and writing them."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing

from .faults import faults
from .recipe import Recipe

LIBRARY = Path(__file__).parent / "library"


class RecipeError(PadfreeError):
    """A recipe is not there, is no YAML, or says something that a recipe cannot say."""


def names() -> tuple[str, ...]:
    """All recipes that come with the package, as `<table>/<model>`."""
    found = (path.relative_to(LIBRARY).with_suffix("") for path in LIBRARY.glob("*/*.yaml"))
    return tuple(sorted(path.as_posix() for path in found))


def descriptions() -> dict[str, str]:
    """All recipes that come with the package, by name, and what each is about."""
    return {name: str(_read(LIBRARY / f"{name}.yaml").get("about", "")) for name in names()}


def load(name: str | os.PathLike[str], changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name: a name from `names()`, or the path of a YAML file.
        changes: `key=value` settings that replace what the file says, such as `optimizer.lr=0.01`;
            values are YAML.

    Raises:
        RecipeError: there is no such recipe, or it is wrong; every fault is named, with file and key.
    """
    path = find(name)
    data = _read(path)
    for change in changes:
        data = _changed(data, change)
    where = f"{os.fspath(name)} with {' '.join(changes)}" if changes else os.fspath(name)
    if "name" in data:
        raise RecipeError(f"{where}: name: a recipe is named by its file; leave this key out")
    recipe_name = str(name) if str(name) in names() else str(path)
    try:
        return Recipe.model_validate({**data, "name": recipe_name})
    except ValidationError as error:
        found = faults(error, data, [change.partition("=")[0] for change in changes])
        number = f"{len(found)} fault" + ("s" if len(found) > 1 else "")
        raise RecipeError(f"{where}: {number}: {'; '.join(found)}") from None


def find(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        RecipeError: neither a recipe nor a file.
    """
    if os.fspath(name) in names():
        return LIBRARY / f"{os.fspath(name)}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    near = difflib.get_close_matches(os.fspath(name), names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`padfree-recipes list` shows the names"
    raise RecipeError(f"no recipe and no file {os.fspath(name)!r}; {hint}")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back equal (but for its name)."""
    data = recipe.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, width=100, allow_unicode=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        FileError: it cannot be written; what was there before is there still.
    """
    with replacing(check_target(path)) as part:
        part.write_text(text, encoding="utf-8")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a key given twice is a fault.

    Raises:
        RecipeError: the file cannot be read or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    return _parse(text, f"{path}: not YAML")


def _parse(text: str, fault: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # the constructors of dates, numbers and binaries raise kinds of their own
        raise RecipeError(f"{fault}: {' '.join(str(error).split()) or type(error).__name__}") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, which says so when a mapping gives a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key, _ in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", own[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, and this is {type(data).__name__}")
    return data


def _changed(data: dict[str, Any], change: str) -> dict[str, Any]:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"{change!r} is no setting; write key=value, such as optimizer.lr=0.01")
    value = _parse(text, f"{change!r}: the value is not YAML")
    changed = copy.deepcopy(data)
    *parents, last = key.split(".")
    place: Any = changed
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"{change!r}: {'.'.join(parents)} is a value, not a group of keys")
    place[last] = value
    return changed
