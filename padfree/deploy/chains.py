"""Strided chains of a recording: what one call of `padfree::chain` can compute. Pure.

A chain is a depthwise convolution, the max-pool of the same map and their sum, with what may stand around it:

    [activation]  ->  depthwise conv  ->  [activation]  ->  + max-pool  ->  [1x1 conv  ->  [activation]]
                      depthwise conv  ->  + max-pool  ->  [batch norm]  ->  [activation]  ->  [1x1 conv ...]
                      depthwise conv  ->  [activation]  ->  cat max-pool  ->  1x1 conv  ->  [act.]  ->  [+ residual]
                      padding-free depthwise conv  ->  [activation]  ->  1x1 conv  ->  [activation]

Operations tell it, with their settings; whether a module or a function ran them makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from padfree.analysis.kinds import data_input, plain_kind
from padfree.deploy.operations import BATCH_NORMS, Operations
from padfree.indices import OpId, ValueId
from padfree.kernels import activation
from padfree.record.recorder import NO_OP, Op
from padfree.record.trees import Ref

_KERNELS = (3, 5)  # windows that the operator's C kernel knows, of the convolution and of the pool
_STRIDES = (1, 2)
_POOLS = ("max_pool2d_with_indices", "max_pool2d", "max_pool_values")


@dataclass(frozen=True)
class StridedChain:
    """One chain, by values and operations of a recording.

    Attributes:
        source, out: the value that it reads and the one that it makes.
        ops: its operations, in order.
        core: those of them that the chain cannot do without.
        conv: the depthwise convolution.
        norm, point: a batch norm of the sum, and the 1x1 convolution behind (-1: none).
        ahead, stride, padding, act, pool, pool_padding, merge, point_act, residual: of `padfree.kernels.chain_meaning`.
    """

    source: ValueId
    out: ValueId
    ops: tuple[OpId, ...]
    core: tuple[OpId, ...]
    conv: OpId
    norm: OpId = NO_OP
    point: OpId = NO_OP
    ahead: str = ""
    stride: int = 2
    padding: int = 0
    act: str = ""
    pool: int = 0
    pool_padding: int = 0
    merge: str = ""
    point_act: str = ""
    residual: str = ""


class Chains(Operations):
    """Finds the strided chains of one recording."""

    def forms(self) -> Iterator[list[StridedChain]]:
        """For each depthwise convolution that begins a chain, the chain's forms, those that take most in first."""
        for op in self.recording.ops:
            if op.kind == "convolution" and self._depthwise(op):
                found = list(self._grown(op))
                if found:
                    yield [form for grown in reversed(found) for form in (*self._with_ahead(grown), grown)]

    # -- the core -------------------------------------------------------------------------------

    def _depthwise(self, op: Op) -> bool:
        """Whether the operator takes this convolution: one channel a group, square, no dilation."""
        _, weight, _, stride, padding, dilation, transposed, _, groups = op.args[0]
        source, shape = self.recording.values[data_input(op)].shape, self.recording.values[weight.value].shape
        return (
            len(source) == 4
            and not transposed
            and groups == source[1] == shape[0] > 1
            and shape[2] == shape[3] in _KERNELS
            and len(set(stride)) == len(set(padding)) == 1
            and stride[0] in _STRIDES
            and set(dilation) == {1}
        )

    def _grown(self, conv: Op) -> Iterator[StridedChain]:
        """The chain of a convolution in growing forms."""
        source, stride, padding = data_input(conv), conv.args[0][3][0], conv.args[0][4][0]
        chain = StridedChain(source, conv.outputs[0], (conv.index,), (), conv.index, stride=stride, padding=padding)
        act, op = self._activated(chain.out)
        if op is not None:
            chain = replace(_more(chain, op), act=act)
        merged = self._merged(chain)
        if merged is None and stride == 2 and 2 * padding < self._kernel(chain) - 1:
            yield from self._tail(chain, needed=True)  # a reduction: without a pool beside it
        elif merged is not None and merged.merge == "cat":
            yield from self._tail(merged, needed=True)
        elif merged is not None:
            core = replace(merged, core=merged.ops)
            yield core
            grown = self._normed(core) if core.merge == "norm" else core
            if grown != core:
                yield grown
            yield from self._tail(grown)

    def _kernel(self, chain: StridedChain) -> int:
        weight: Ref = self.recording.ops[chain.conv].args[0][1]
        return self.recording.values[weight.value].shape[-1]

    def _merged(self, chain: StridedChain) -> StridedChain | None:
        """The chain with the max-pool of its source and what joins both; None where there is none."""
        join = self.sole(chain.out)
        if join is None:
            return None
        merge = ""
        if self.is_sum(join):
            merge = "sum" if chain.act else "norm"
            others = [value for value in join.inputs if value != chain.out]
        elif join.kind == "cat" and _axis(join) in (1, -3):
            parts = [ref.value for ref in join.args[0][0] if isinstance(ref, Ref)]
            merge, others = "cat", parts[1:]
            if len(parts) != 2 or parts[0] != chain.out:
                return None
        if not merge or len(others) != 1:
            return None
        pool = self.producer(others[0])
        window = None if pool is None else self._window(pool, chain)
        if pool is None or window is None:
            return None
        readers = set(self.readers(pool.outputs[0]))
        if pool.outputs[0] in self.recording.outputs or (merge != "cat" and readers != {join.index}):
            return None
        grown = _more(_more(chain, pool, out=False), join)
        return replace(grown, pool=window[0], pool_padding=window[1], merge=merge)

    def _window(self, pool: Op, chain: StridedChain) -> tuple[int, int] | None:
        """Kernel and padding of a max-pool beside the convolution, if both windows have the same centres."""
        if pool.kind not in _POOLS or data_input(pool) != chain.source:
            return None
        given: tuple[Any, ...] = pool.args[0][1:]
        defaults: tuple[Any, ...] = (3, (), 0, 1, False)
        kernel, stride, padding, dilation, ceil = (*given, *defaults[len(given) :])
        sides = [_sides(each) for each in (kernel, stride or kernel, padding, dilation)]
        if any(len(each) != 1 for each in sides) or ceil or any(map(self.readers, pool.outputs[1:])):
            return None
        side, step, pad, spread = (each.pop() for each in sides)
        centred = side - 2 * pad == self._kernel(chain) - 2 * chain.padding
        return (side, pad) if side in _KERNELS and step == chain.stride and spread == 1 and centred else None

    # -- what follows ---------------------------------------------------------------------------

    def _normed(self, chain: StridedChain) -> StridedChain:
        """With a batch norm of the sum and an activation, where they follow."""
        op = self.sole(chain.out)
        if op is not None and self.norm_tensors(op) is not None:
            chain = replace(_more(chain, op), norm=op.index)
        act, op = self._activated(chain.out)
        return chain if op is None else replace(_more(chain, op), act=act)

    def _tail(self, chain: StridedChain, needed: bool = False) -> Iterator[StridedChain]:
        """With the 1x1 convolution behind (part of the core where `needed`), its activation and a residual."""
        op = self.sole(chain.out)
        if op is None or not self._pointwise(op):
            return
        chain = replace(_more(chain, op), point=op.index)
        if needed:
            chain = replace(chain, core=chain.ops)
        if chain.merge != "cat" or self._maxima_free(chain):
            yield chain
        act, op = self._activated(chain.out)
        if op is not None:
            chain = replace(_more(chain, op), point_act=act)
            if chain.merge != "cat" or self._maxima_free(chain):
                yield chain
        op = self.sole(chain.out)
        if op is None or not self.is_sum(op) or chain.merge != "cat":
            return
        others = {value for value in op.inputs if value != chain.out}
        for residual, value in (("input", chain.source), ("maxima", self._maxima(chain))):
            if others == {value}:
                grown = replace(_more(chain, op), residual=residual)
                if self._maxima_free(grown):
                    yield grown

    def _pointwise(self, op: Op) -> bool:
        """Whether it is an ordinary 1x1 convolution."""
        if op.kind != "convolution":
            return False
        _, weight, _, stride, padding, _, transposed, _, groups = op.args[0]
        shape = self.recording.values[weight.value].shape
        plain = set(stride) == {1} and set(padding) == {0} and not transposed and groups == 1
        return plain and len(shape) == 4 and shape[2:] == (1, 1)

    def _maxima(self, chain: StridedChain) -> ValueId:
        pool = next(op for op in map(self.recording.ops.__getitem__, chain.ops) if op.kind in _POOLS)
        return pool.outputs[0]

    def _maxima_free(self, chain: StridedChain) -> bool:
        """Whether nothing but the chain reads its maxima."""
        return set(self.readers(self._maxima(chain))) <= set(chain.ops)

    # -- what stands ahead ----------------------------------------------------------------------

    def _with_ahead(self, chain: StridedChain) -> Iterator[StridedChain]:
        """The chain with an activation ahead, whose result nothing else reads."""
        op = self.producer(chain.source)
        act = "" if op is None else self._activation(op)
        if op is None or not act or chain.source in self.recording.outputs:
            return
        if not set(self.readers(chain.source)) <= set(chain.ops) or not self._is_plain(op):
            return
        yield replace(chain, source=op.inputs[0], ops=(op.index, *chain.ops), ahead=act)

    def _is_plain(self, op: Op) -> bool:
        """Whether an activation, if it works in place, changes a tensor that no view shows a part of."""
        if not op.kind.endswith("_"):
            return True
        maker = self.producer(op.inputs[0])
        others = [self.recording.ops[index] for index in self.readers(op.inputs[0]) if index != op.index]
        return maker is not None and maker.kind in ("convolution", *BATCH_NORMS) and not others

    # -- operations -----------------------------------------------------------------------------

    def _activated(self, value: ValueId) -> tuple[str, Op | None]:
        """The activation that alone reads a value."""
        op = self.sole(value)
        act = "" if op is None else self._activation(op)
        return (act, op) if act else ("", None)

    def _activation(self, op: Op) -> str:
        """An activation as the operator is told it, "" for any other operation."""
        (_, *given), named = op.args[0] or (None,), dict(op.args[1])
        kind = plain_kind(op)
        if len(op.inputs) != 1 or len(op.outputs) != 1 or any(isinstance(each, Ref) for each in given):
            return ""
        if kind in ("relu", "hardswish", "silu"):
            return activation(kind)
        if kind == "gelu":
            return activation("gelu_tanh" if "tanh" in (*given, *named.values()) else "gelu")
        if kind == "leaky_relu":
            return activation(kind, *(given or (0.01,)))
        if kind == "hardtanh":
            return activation(kind, *given, *(-1.0, 1.0)[len(given) :])
        if kind == "clamp":
            low, high = (*given, None, None)[:2]
            low, high = named.get("min", low), named.get("max", high)
            if low is not None and high is not None:
                return activation("hardtanh", low, high)
            return activation("relu") if low == 0 and high is None else ""
        return activation("relu") if kind == "clamp_min" and given == [0] else ""


def _more(chain: StridedChain, op: Op, out: bool = True) -> StridedChain:
    """The chain with one more operation, whose result is its own (`out`)."""
    ops = tuple(sorted((*chain.ops, op.index)))
    return replace(chain, ops=ops, out=op.outputs[0] if out else chain.out)


def _axis(op: Op) -> Any:
    return (*op.args[0], 0)[1]


def _sides(value: Any) -> set[OpId]:
    return set(value) if isinstance(value, (tuple, list)) else {value}
