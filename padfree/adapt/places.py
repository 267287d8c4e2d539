"""Where a converted network has max-pools that it was not trained with, and what stands around each.

Read off a recording: a place is known by what flows where, not by the classes of modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from padfree.analysis.convolution import Conv
from padfree.analysis.flow import Flow
from padfree.analysis.kinds import MAX_POOLS, NONLINEAR, NORMS, VIEWS, data_input, plain_kind
from padfree.analysis.sites import Sites
from padfree.indices import ValueId
from padfree.layers.preserve import running_norm
from padfree.record.recorder import Op
from padfree.record.recording import Recording
from padfree.rewrite.forward import is_rewritten

_REPEATS = frozenset({"repeat_interleave", "index_select", "expand", "repeat", "index"}) | VIEWS


@dataclass(frozen=True)
class Place:
    """A max-pool beside a strided convolution, both reading one map, and their sum.

    Attributes:
        pool: path of the module whose forward calls the pool, and which of its pools it is.
        conv: path of the strided convolution.
        alone: whether it is the only convolution of its site, so that its kernel can take over a part of the pool.
        merge: what the pool is added to: the "conv", the "norm" behind it, or the "activation".
        repeat: how often each pooled channel comes.
        norm: path of the convolution's norm, if that has running statistics, else "".
        point: path of the 1x1 convolution that alone reads the sum, whatever stands between, else "".
        point_norm: path of its norm, if that has running statistics, else "".
        feeds: path of the norm whose ReLU gives the map that the two read, and nothing else does, else "".
        missing: why there is no `point`.
    """

    pool: tuple[str, int]
    conv: str
    alone: bool
    merge: str
    repeat: int
    norm: str
    point: str
    point_norm: str
    feeds: str
    missing: str = ""


@dataclass(frozen=True)
class Layer:
    """A convolution and the norm behind it, by path; "" for a norm without running statistics, and for none.

    `added` says that what the norm (or the convolution) gives is added to something that is there before the
    convolution runs, and read by nothing else.
    """

    conv: str
    norm: str
    added: bool = False


class Places:
    """What a recording of a converted network says of its max-pools, convolutions and norms."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.flow = Flow(recording)
        self.sites = Sites(self.flow)
        self.found = tuple(self._find())

    def _find(self) -> Iterator[Place]:
        modules = self.recording.modules
        count: dict[str, int] = {}
        for op in self.flow.ops:
            path = self.recording.calls[op.call].path if op.call >= 0 else ""
            if op.kind not in MAX_POOLS or not is_rewritten(modules[path]):
                continue
            ordinal = count[path] = count.get(path, -1) + 1
            place = self._place(op, (path, ordinal))
            if place is not None:
                yield place

    def _place(self, op: Op, pool: tuple[str, int]) -> Place | None:
        """The place of a pool; None where it is not added to what a strided convolution makes of the same map."""
        flow = self.flow
        source, added = data_input(op), op.outputs[0]
        total = None
        while (reader := flow.sole_consumer(added)) is not None:
            if plain_kind(reader) == "add" and len(reader.inputs) == 2:
                total = reader.outputs[0]
                break
            if plain_kind(reader) not in _REPEATS:
                return None
            added = reader.outputs[0]
        if total is None or reader is None:
            return None
        other = next(value for value in reader.inputs if value != added)
        for conv in self.sites.convs.values():
            if conv.stride != (2, 2) or conv.op > reader.index or not flow.reaches(other, conv.out)[0]:
                continue
            site = self.sites.site(conv)
            if site.source != source or not site.convs:
                continue
            chain = flow.chain(site.chain.conv)
            at = {chain.conv: "conv", chain.norm: "norm"}
            point, missing = self._point(total)
            return Place(
                pool=pool,
                conv=site.largest.path,
                alone=len(site.convs) == 1 and not site.points and not site.paired and site.largest.is_module,
                merge=at.get(other, "activation"),
                repeat=flow.values[added].shape[1] // flow.values[op.outputs[0]].shape[1],
                norm=self._norm(total if other == chain.conv else chain.conv),
                point="" if point is None else point.path,
                point_norm="" if point is None else self._norm(point.out),
                feeds=self._feeds(source, other),
                missing=missing,
            )
        return None

    def _norm(self, value: ValueId) -> str:
        """Path of the norm that alone reads a value, if it has running statistics and runs once."""
        op = self.flow.sole_consumer(value)
        return "" if op is None or op.call < 0 else self._running(self.recording.calls[op.call].path)

    def _running(self, path: str) -> str:
        """The path, if a norm with running statistics lies there that runs once, else ""."""
        module, runs = self.recording.modules[path], len(self.recording.calls_of.get(path, ()))
        return path if runs == 1 and running_norm(module) is module else ""

    def _point(self, total: ValueId) -> tuple[Conv | None, str]:
        """The 1x1 convolution that alone reads a sum, behind whatever does not leave its map; or why there is none."""
        flow, derived = self.flow, {total}
        if flow.size(total) == (1, 1):
            return None, "its map has one pixel, on images of this size"
        for op in flow.ops[flow.values[total].producer + 1 :]:
            if derived.isdisjoint(op.inputs):
                continue
            conv = self.sites.convs.get(op.index)
            if conv is not None and flow.size(conv.out) == flow.size(total):
                plain = conv.pointwise and conv.stride == (1, 1) and conv.groups == 1 and conv.is_module
                if not plain:
                    return None, f"`{conv.path}`, which reads it next, is no plain 1x1 convolution"
                if len(self.recording.calls_of[conv.path]) != 1:
                    return None, f"`{conv.path}` runs more than once"
                others = [reader for value in derived for reader in flow.consumers(value) if reader > op.index]
                if others or flow.consumers(conv.source) != [op.index] or derived & set(self.recording.outputs):
                    return None, f"`{conv.path}` is not the only one to read it"
                return conv, ""
            if conv is not None and flow.size(conv.out) != (1, 1):
                return None, f"`{conv.path}`, which reads it next, has another stride"
            derived.update(op.outputs)
        return None, "no convolution reads it"

    def _feeds(self, source: ValueId, other: ValueId) -> str:
        """Path of the norm -> ReLU that makes a map for one strided convolution and its pool alone."""
        flow = self.flow
        op = flow.producer(source)
        if op is None or not _is_relu(op) or source in self.recording.outputs:
            return ""
        norm = flow.producer(op.inputs[0])
        if norm is None or norm.call < 0 or len(flow.consumers(op.inputs[0])) != 1:
            return ""
        readers = [flow.ops[index] for index in flow.consumers(source)]
        convs = [reader for reader in readers if reader.index in self.sites.convs]
        pools = [reader for reader in readers if reader.kind in MAX_POOLS]
        if len(convs) != 1 or len(pools) != 1 or len(readers) != 2:
            return ""
        if not flow.reaches(other, convs[0].outputs[0])[0]:
            return ""
        return self._running(self.recording.calls[norm.call].path)

    def feeding(self, tail: str) -> str:
        """Path of the layer whose bias is added before the activation that a stem's tail alone reads, else ""."""
        calls = self.recording.calls_of.get(f"{tail}.conv_dw", ())
        if len(calls) != 1:
            return ""
        value = calls[0].inputs[0]
        readers = (self.flow.ops[index].call for index in self.flow.consumers(value))
        inside = all(any(call.path == tail for call in self.recording.ancestors(reader)) for reader in readers)
        if value in self.recording.outputs or not inside:
            return ""
        act = self.flow.producer(value)
        if act is None or plain_kind(act) not in NONLINEAR or len(act.inputs) != 1:
            return ""
        read = act.inputs[0]
        layer = self.flow.producer(read)
        if layer is None or self.flow.consumers(read) != [act.index] or read in self.recording.outputs:
            return ""
        if layer.kind not in NORMS and layer.index not in self.sites.convs:
            return ""
        path = self.recording.calls[layer.call].path
        return path if len(self.recording.calls_of[path]) == 1 else ""

    def layers(self) -> dict[str, Layer]:
        """The convolutions that run once, as modules, outside new layers, with their norms."""
        found: dict[str, Layer] = {}
        for conv in self.sites.convs.values():
            if conv.is_module and len(self.recording.calls_of[conv.path]) == 1 and self.flow.is_map(conv.out):
                norm = self._norm(conv.out)
                found[conv.path] = Layer(conv.path, norm, self._added(conv, norm))
        return found

    def _added(self, conv: Conv, norm: str) -> bool:
        value = self.recording.calls_of[norm][0].outputs[0] if norm else conv.out
        op = self.flow.sole_consumer(value)
        if op is None or plain_kind(op) != "add" or len(op.inputs) != 2 or len(op.args[0]) != 2 or op.args[1]:
            return False
        (other,) = (self.flow.values[source] for source in op.inputs if source != value)
        return other.producer < conv.op and other.shape == self.flow.values[value].shape

    def size_of(self, path: str) -> tuple[int, int]:
        """(H, W) of what a convolution writes."""
        call = self.recording.calls_of[path][0]
        shape = self.recording.values[call.outputs[0]].shape
        return (shape[-2], shape[-1])


def _is_relu(op: Op) -> bool:
    """Whether an operation is max(x, 0), or min(max(x, 0), a bound)."""
    given = (*op.args[0][1:], *(value for _, value in op.args[1]))
    kind = plain_kind(op)
    if kind == "hardtanh":
        return bool(given) and given[0] == 0
    return kind == "relu" or (kind in ("clamp_min", "clamp") and bool(given) and given[0] == 0)
