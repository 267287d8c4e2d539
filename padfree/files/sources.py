"""Models by name: timm, torchvision, bsconv, or a factory of the user's own.

A `Source` is the recipe for an unconverted network. It is what a weight file remembers, so it holds
strings and numbers only. Libraries are imported when a model is created, not before. Nothing is
downloaded unless `create(pretrained=True)` asks for it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

from padfree.errors import PadfreeError

BY_NAME = "padfree_"  # what `padfree.timm` puts before timm's names for their padding-free forms
LIBRARIES = ("timm", "torchvision", "bsconv", "factory")

# a weight file may not make its reader download or open anything, or build on another device than the CPU
_FORBIDDEN = ("pretrained", "weights", "checkpoint", "cfg", "cache", "progress", "file", "url", "hub", "hf", "device")


_LIBRARY_NAME = r"[\w.-]+"  # timm takes "hf-hub:..." and "local-dir:..." for places to read networks from


class SourceError(PadfreeError):
    """A model name is unknown, its library cannot be imported, or it cannot be built."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        library: "timm", "torchvision", "bsconv" or "factory".
        name: the library's name for it, or `package.module:factory`.
        kwargs: keyword arguments of the builder, such as `num_classes` (numbers, strings, lists).
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise SourceError(f"no model library {self.library!r}; there are {', '.join(LIBRARIES)}")
        for key in _keys(self.kwargs):
            if any(part.startswith(_FORBIDDEN) for part in key.lower().split("_")):
                raise SourceError(f"a model source may not set {key!r}: it builds a network without weights")

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """(C, H, W) where the name tells it (bsconv's CIFAR networks: 3x32x32), else None."""
        return (3, 32, 32) if self.library == "bsconv" and self.name.startswith("cifar_") else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"library": self.library, "name": self.name, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, data: Any) -> Source:
        """Read what `to_dict` wrote, or a string "library:name".

        Raises:
            SourceError: it is neither.
        """
        if isinstance(data, Source):
            return data
        if isinstance(data, str):
            library, colon, name = data.partition(":")
            data = {"library": library if colon else "factory", "name": name if colon else data}
            if colon and library not in LIBRARIES:  # "package.module:factory" without its prefix
                data = {"library": "factory", "name": f"{library}:{name}"}
        match data:
            case {"library": str(library), "name": str(name), **rest} if set(rest) <= {"kwargs"}:
                kwargs = rest.get("kwargs", {})
                if isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs):
                    return cls(library, name, dict(kwargs))
        raise SourceError(f'{data!r} is not a model source; write "timm:NAME" or {{"library", "name", "kwargs"}}')

    def create(self, pretrained: bool = False) -> nn.Module:
        """Build the network.

        Args:
            pretrained: download and load the library's weights (timm and torchvision only).

        Raises:
            SourceError: the library or the name is unknown, or the builder fails.
        """
        builders = {"timm": _timm, "torchvision": _torchvision, "bsconv": _bsconv, "factory": _factory}
        return builders[self.library](self.name, dict(self.kwargs), pretrained)


def _timm(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    timm = _import("timm")
    if not re.fullmatch(_LIBRARY_NAME, name) or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    with _building("timm", name):
        return _module(timm.create_model(name, pretrained=pretrained, **kwargs), name)


def _torchvision(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    models = _import("torchvision.models")
    names = models.list_models()
    if name.lower() not in names:
        raise _unknown("torchvision", name, names)
    builder = models.get_model_builder(name)
    accepted = inspect.signature(inspect.unwrap(builder)).parameters
    kwargs["weights"] = "DEFAULT" if pretrained else None
    if "weights_backbone" in accepted and not pretrained:
        kwargs["weights_backbone"] = None
    if name.lower() in ("googlenet", "inception_v3") and not pretrained:
        kwargs.setdefault("init_weights", True)  # the default, and silent only when it is said
    with _building("torchvision", name):
        return _module(builder(**kwargs), name)


def _bsconv(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        raise SourceError("bsconv publishes no pretrained weights")
    package = _import("bsconv.pytorch", "bsconv")
    kwargs.setdefault("num_classes", 100 if name.startswith("cifar_") else 1000)
    with _building("bsconv", name):
        try:
            return _module(package.get_model(name, **kwargs), name)
        except ValueError as error:
            raise _unknown("bsconv", name, bsconv_names()) from error


def _factory(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        raise SourceError(f"pretrained weights are for timm and torchvision; let {name} load its own")
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise SourceError(f"{name!r} is not a factory; write package.module:factory")
    with _working_directory():
        try:
            target: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
            raise SourceError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(target, part):
            raise _unknown(module_name, path, dir(target), "factory")
        target = getattr(target, part)
    if isinstance(target, nn.Module):
        raise SourceError(f"{name} is a model, not a function that makes one")
    if not callable(target):
        raise SourceError(f"{name} is a {type(target).__name__}, not a function that makes a model")
    with _building("factory", name):
        return _module(target(**kwargs), name)


def bsconv_names() -> list[str]:
    """Architectures that bsconv documents (its parser takes other widths and depths as well)."""
    widths = {"v1": ("w1", "w3d4", "w1d2", "w1d4"), "v2": ("w1", "w3d4", "w1d2", "w1d4")}
    widths |= dict.fromkeys(("v3_small", "v3_large"), ("w1", "w3d4", "w1d2", "w7d20"))
    mobile = [
        f"{data}mobilenet{version}_{width}{variant}"
        for data, version in itertools.product(("", "cifar_"), widths)
        for width in widths[version]
        for variant in ("", "_bsconvu" if version == "v1" else "_bsconvs_p1d6")
    ]
    bases = [f"{pre}resnet{depth}" for pre in ("", "pre") for depth in (10, 18, 26, 34, 68, 102)]
    bases += [f"cifar_{pre}resnet{depth}" for pre in ("", "pre") for depth in (20, 56, 110, 302, 602)]
    bases += [f"cifar_wrn{size}" for size in ("16_4", "16_8", "28_3", "28_10", "40_3", "40_8")]
    residual = [base + variant for base in bases for variant in ("", "_bsconvu", "_bsconvs_p1d4")]
    return sorted(mobile + residual)


def _import(name: str, extra: str = "") -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        hint = f'; pip install ".[{extra}]" in the source folder of padfree' if extra else ""
        raise SourceError(f"cannot import {name}: {error}{hint}") from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise SourceError(
            f"cannot import {name}: {error}; torch and torchvision come from different builds: "
            "install both again from one place (README, Installation)"
        ) from error


@contextlib.contextmanager
def _building(library: str, name: str) -> Iterator[None]:
    """Whatever a builder raises becomes a SourceError; its warnings stay quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PadfreeError:
        raise
    except (Exception, SystemExit) as error:
        raise SourceError(f"{library} cannot build {name!r}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """As `python -m` does, look for modules in the working directory too."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _keys(value: Any) -> Iterator[str]:
    """The keys of a mapping and of all mappings in it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _keys(item)


def _module(built: Any, name: str) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise SourceError(f"{name} made a {type(built).__name__}, not an nn.Module")
    return built


def _unknown(library: str, name: str, names: list[str], kind: str = "model") -> SourceError:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return SourceError(f"{library} has no {kind} {name!r}{hint}")
