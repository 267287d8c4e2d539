"""Convolutions that another layer can take the place of: what the rules that replace whole convolutions look for. Pure.

1. an `nn.Conv2d`, or a class derived from it whose forward does nothing but pad and convolve;
2. dense (groups = 1), with one of the wanted kernels;
3. its weight is a parameter of its own, which no other module has;
4. it is not the model itself, and runs in a forward in eval mode.

What is called several times, or registered under several names, is one layer before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from padfree.analysis.kinds import VIEWS
from padfree.analysis.sites import Sites
from padfree.record.recording import Call, Recording
from padfree.record.trees import Ref
from padfree.types import NO_DOMAIN, Detail, Match, Skip

Kernels = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Replacement(Detail):
    """What is replaced.

    Attributes:
        kernel: (k, l). channels: (M, N). params: parameters (before, after).
    """

    kernel: tuple[int, int]
    channels: tuple[int, int]
    params: tuple[int, int]


Found = TypeVar("Found", bound=Replacement)

_PADDING = VIEWS | {"constant_pad_nd", "reflection_pad2d", "replication_pad2d", "slice", "copy_", "new_empty", "empty"}


def dense_convs(sites: Sites, rule: str, kernels: Kernels) -> Iterator[tuple[str, nn.Conv2d] | Skip]:
    """Paths and modules of the convolutions that can be replaced, in the order of registration, and others as skips."""
    recording = sites.recording
    tied = _tied(recording.model)
    for path, module in recording.modules.items():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size in kernels:
            why = _trouble(recording, path, module) or tied.get(id(module.weight), "")
            yield Skip(path, why, rule) if why else (path, module)


def replacement(sites: Sites, rule: str, path: str, detail: Detail) -> Match:
    """The match of one of them, with the maps of its first call: they stay as they are."""
    call = sites.recording.calls_of[path][0]
    sizes = [sites.recording.values[value].shape[-2:] for value in (call.inputs[0], call.outputs[0])]
    return Match(rule, path, "", NO_DOMAIN, sizes[0], sizes[1], sizes[1], detail)


def again(sites: Sites, detail: type[Found], matches: Iterable[Match]) -> Iterator[tuple[Match, Found, nn.Conv2d]]:
    """The convolutions that a plan's matches name, with their details, where they are found."""
    there: dict[tuple[int, int], dict[str, nn.Conv2d]] = {}
    for match in matches:
        said = match.detail
        if not isinstance(said, detail):
            continue
        kernel = said.kernel
        if kernel not in there:
            found = dense_convs(sites, match.rule, (kernel,))
            there[kernel] = dict(item for item in found if not isinstance(item, Skip))
        if match.name in there[kernel]:
            yield match, said, there[kernel][match.name]


def _trouble(recording: Recording, path: str, conv: nn.Conv2d) -> str:
    if not path:
        return "the model is this convolution itself; put it into an nn.Sequential"
    calls = recording.calls_of.get(path, [])
    if not calls:
        return "no forward in eval mode calls it"
    if any(len(call.inputs) != 1 or len(call.outputs) != 1 for call in calls):
        return "it is called with more than a map"
    return next((why for call in calls if (why := _does_more(recording, path, conv, call))), "")


def _does_more(recording: Recording, path: str, conv: nn.Conv2d, call: Call) -> str:
    """What a call does besides padding and convolving with the module's own parameters, or ""."""
    ops = recording.ops[call.ops.start : call.ops.stop]
    convs = [op for op in ops if op.kind == "convolution"]
    if len(convs) != 1 or convs[0].outputs[:1] != call.outputs:
        return f"its forward ({type(conv).__name__}) does more than a convolution"
    weight = convs[0].args[0][1]
    if not isinstance(weight, Ref) or recording.values[weight.value].name != f"{path}.weight":
        return f"its weight is computed in its forward ({type(conv).__name__})"
    others = [op.kind for op in ops if op.kind != "convolution" and op.kind not in _PADDING]
    return f"its forward ({type(conv).__name__}) runs {others[0]} besides the convolution" if others else ""


def _tied(model: nn.Module) -> dict[int, str]:
    """By the `id` of a parameter that several modules have: why none of them is replaced."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    several = {key: paths for key, paths in owners.items() if len(paths) > 1}
    return {key: f"`{'` and `'.join(paths)}` share one weight, which would part" for key, paths in several.items()}
