"""Where a stem's tail goes: outside norms and convolutions, at one path in networks made of the same layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from padfree.analysis.chain import Chain
from padfree.analysis.convolution import Conv
from padfree.analysis.kinds import NORMS
from padfree.analysis.sites import Sites
from padfree.errors import Refusal
from padfree.indices import ValueId
from padfree.rules._downsampling import added, block_for

LAYERS = NORMS | {"convolution"}


Placer = Callable[[Sites, Conv, Chain, ValueId, tuple[str, ...]], tuple[str, str | None]]
"""Where a tail behind this value goes: the block whose forward calls it, or the module whose place it takes."""


def placed(
    sites: Sites, conv: Conv, chain: Chain, value: ValueId, other_than: tuple[str, ...], place: int = 0
) -> tuple[str, str | None]:
    """The first of the possible places, or number `place`.

    Raises:
        Refusal: there are fewer.
    """
    found = list(dict.fromkeys(_places(sites, conv, chain, value, other_than)))
    if place >= len(found):
        raise Refusal("there is no other place for a hybrid tail")
    return found[place]


def _places(
    sites: Sites, conv: Conv, chain: Chain, value: ValueId, other_than: tuple[str, ...]
) -> Iterator[tuple[str, str | None]]:
    """The entry of what reads the stem; its activation's place; a block around it; a Sequential; the root."""
    if reader := _reader(sites, value):
        yield reader, None
    if chain.act_path and replaceable(sites, chain.act_path) and not _inside_layer(sites, chain.act_path):
        yield "", chain.act_path
    around = block_for(sites, conv.op, value, owner=conv.path, child=True)
    if around.path and not _inside_layer(sites, around.path, itself=True):
        yield around.path, None
    for path in (_returning(sites, value, other_than, layers=False), _reader(sites, value, container=True), ""):
        if path or not around.path:
            yield path, None


def placed_earlier(
    sites: Sites, conv: Conv, chain: Chain, value: ValueId, other_than: tuple[str, ...]
) -> tuple[str, str | None]:
    """As plans of format 1 have it: the activation's place, also where that lies in a norm."""
    if chain.act_path and replaceable(sites, chain.act_path):
        return "", chain.act_path
    around = block_for(sites, conv.op, value, owner=conv.path, child=True)
    return around.path or _returning(sites, value, other_than, layers=True), None


def _reader(sites: Sites, value: ValueId, *, container: bool = False) -> str:
    """The outermost module with a forward of its own and layers below it that alone reads a value; "" for none.

    It is called once, and is no `container`, which others flatten or iterate, or else is one.
    """
    flow, recording = sites.flow, sites.recording
    readers = flow.consumers(value)
    first = flow.ops[readers[0]] if readers else None
    for call in reversed(list(recording.ancestors(first.call))) if first is not None else ():
        module = recording.modules[call.path]
        if value not in call.inputs or not call.path or (type(module).forward is nn.Sequential.forward) != container:
            continue
        alone = all(reader in call.ops for reader in readers) and call.inputs == (value,)
        inner = any(recording.calls[flow.ops[index].call].path != call.path for index in call.ops)
        once = len(recording.calls_of[call.path]) == 1 and not added(sites, call.path)
        return call.path if alone and inner and once and not _inside_layer(sites, call.path, itself=True) else ""
    return ""


def _inside_layer(sites: Sites, path: str, *, itself: bool = False) -> bool:
    """Whether a module lies inside (or `itself` is) one whose own forward normalises or convolves: a norm or conv."""
    flow, recording = sites.flow, sites.recording
    around = recording.ancestors(recording.calls_of[path][0].index)
    return any(
        flow.ops[index].kind in LAYERS and flow.ops[index].call == call.index
        for call in around
        if itself or call.path != path
        for index in call.ops
        if call.path
    )


def _returning(sites: Sites, value: ValueId, other_than: tuple[str, ...], *, layers: bool) -> str:
    """The innermost module that returns a value; `layers`: a norm or convolution may be one too."""
    recording = sites.recording
    producer = sites.flow.producer(value)
    for call in () if producer is None else recording.ancestors(producer.call):
        if isinstance(recording.modules[call.path], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            continue  # `convert_sync_batchnorm` would put another in its place, without the tail
        if not layers and call.path and _inside_layer(sites, call.path, itself=True):
            continue
        if (
            call.path
            and call.path not in other_than
            and call.outputs == (value,)
            and len(recording.calls_of[call.path]) == 1
        ):
            return call.path
    return ""


def replaceable(sites: Sites, path: str) -> bool:
    """Whether a module is parameter-free, not the root, registered once and called once."""
    recording = sites.recording
    module = recording.modules[path]
    names = [name for name, other in recording.model.named_modules(remove_duplicate=False) if other is module]
    once = len(recording.calls_of[path]) == 1 and len(names) == 1
    return bool(path) and once and not list(module.parameters()) and not list(module.buffers())
