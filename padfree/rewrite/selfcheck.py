"""Ties a traced graph to the recording: the self-check, then graph nodes by recorded value and operation.

The unedited graph must issue, in eval and in train mode, exactly the operations, arguments and dataflow that the
original forward issues: equal streams mean equal values, gradients and buffers.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.record.recorder import Op, Recorder, Value
from padfree.record.recording import Call, Recording
from padfree.record.trees import collect, containers_copied, first_line, freeze, geometry_key, repeat_batch, storage
from padfree.rewrite.in_place import follow_in_place, seen_elsewhere
from padfree.rewrite.modes import Setting, setting


def bind(module: nn.Module, call: Call, where: str) -> dict[str, Any]:
    """The arguments of a recorded call by parameter name, defaults included.

    Raises:
        Refusal: the forward takes *args or **kwargs.
    """
    signature = inspect.signature(type(module).forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise Refusal(f"the forward of {where} takes *args or **kwargs")
    args, kwargs = call.arguments
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def holds_tensor(tree: Any) -> bool:
    """Whether there is a tensor in nested tuples, lists and mappings."""
    tensors: list[torch.Tensor] = []
    collect((tree,), tensors)
    return bool(tensors)


@dataclass(frozen=True)
class _Stream:
    """What a forward did: values, operations, and what it left in the lists and dictionaries it was given."""

    values: list[Value]
    ops: list[Op]
    left: tuple[Any, ...]
    result: Any


class _LinkingInterpreter(fx.Interpreter):
    """Runs a graph under a recorder and notes which node issued each operation and made each value."""

    def __init__(self, module: nn.Module, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.recorder = recorder
        self.nodes_of_value: dict[ValueId, list[fx.Node]] = {}
        self.node_of_op: list[fx.Node] = []
        self.results: dict[fx.Node, tuple[tuple[Any, ...], int]] = {}
        self.writes: list[tuple[fx.Node, tuple[Any, ...]]] = []  # nodes that write in place, and into what

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        before = len(self.recorder.writes)
        result = super().run_node(n)
        self.writes += [(n, key) for key in self.recorder.writes[before:]]
        self.node_of_op += [n] * (len(self.recorder.ops) - len(self.node_of_op))
        if isinstance(result, torch.Tensor) and n.op not in ("get_attr", "output"):
            value = self.recorder.value(result)
            self.nodes_of_value.setdefault(value, []).append(n)
            self.results[n] = (geometry_key(result), value)
        return result


def link(
    recording: Recording, call: Call, graph: fx.Graph, where: str, flags: Setting
) -> tuple[dict[ValueId, list[fx.Node]], dict[OpId, fx.Node]]:
    """Self-check with `flags` set and all else in either mode; then nodes by recorded value and by operation.

    Several nodes hold one value where a module passes it on in eval mode (dropout). For a body that is not the
    recorded one, the tables are empty.
    """
    module = recording.modules[call.path]
    names = {storage(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    traced, interpreter = None, None
    for others in (True, False):
        done = _checked(recording, call, graph, where, names, flags, others)
        traced, interpreter = done or (traced, interpreter)
    if interpreter is not None:
        follow_in_place(graph, interpreter.results)
        if seen_elsewhere(graph, interpreter.results, interpreter.writes):
            raise Refusal(f"the forward of {where} writes in place into a tensor that it reads by another view of it")
    if traced is None or interpreter is None or any(flags.values()):
        return {}, {}
    recorded = recording.ops[call.ops.start : call.ops.stop]
    if [op.kind for op in recorded] != [op.kind for op in traced.ops]:
        raise Refusal(f"the forward of {where} does not do the same twice")
    to_global = _value_table(call, recorded, traced.ops)
    nodes = {to_global[value]: found for value, found in interpreter.nodes_of_value.items() if value in to_global}
    anchors = {recorded[i].index: node for i, node in enumerate(interpreter.node_of_op)}
    return nodes, anchors


def _checked(
    recording: Recording, call: Call, graph: fx.Graph, where: str, names: dict[int, str], flags: Setting, others: bool
) -> tuple[_Stream, _LinkingInterpreter] | None:
    """What the graph does, which is what the original does; None where the original cannot run in train mode."""
    module = recording.modules[call.path]
    training = others or any(flags.values())
    with setting(module, flags, others):
        arguments = repeat_batch(call.arguments) if training else call.arguments
        try:
            original = _run_original(module, arguments, names)
            traced, interpreter = _run_graph(module, graph, arguments, names, call, where)
            if _restore_in_place(original.ops, traced.ops, interpreter.node_of_op):
                traced, interpreter = _run_graph(module, graph, arguments, names, call, where)
        except Refusal:
            raise
        except Exception as error:
            if training and _original_fails(module, arguments, names):
                return None
            raise Refusal(f"the traced forward of {where} fails: {first_line(error)}") from error
    if original.result != traced.result:
        raise Refusal(
            f"the forward of {where} returns {_named(original.result)}, and a generated one would return "
            f"{_named(traced.result)}"
        )
    alike = [op.kind for op in original.ops] == [op.kind for op in traced.ops]
    if alike and [op.grad for op in original.ops] != [op.grad for op in traced.ops]:
        raise Refusal(f"the forward of {where} switches gradients on or off, which a generated forward would lose")
    if original != traced:
        mode = "train" if training else "eval"
        raise Refusal(f"the traced forward of {where} does not do what the original does in {mode} mode")
    return traced, interpreter


_IN_PLACE = {
    operator.add: operator.iadd,
    operator.sub: operator.isub,
    operator.mul: operator.imul,
    operator.truediv: operator.itruediv,
}


def _restore_in_place(original: list[Op], traced: list[Op], nodes: list[fx.Node]) -> bool:
    """Give `x += y` back its in-place form, which torch.fx traces as `x + y`; whether there was one."""
    restored = False
    for before, after, node in zip(original, traced, nodes, strict=False):
        if before.kind == f"{after.kind}_" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
            restored = True
    return restored


def _original_fails(module: nn.Module, arguments: Any, names: dict[int, str]) -> bool:
    """Whether the original itself cannot run so."""
    try:
        _run_original(module, arguments, names)
    except Exception:  # the user's own code, which may raise anything
        return True
    return False


def _run_original(module: nn.Module, arguments: Any, names: dict[int, str]) -> _Stream:
    recorder = _recorder(arguments, names)
    args, kwargs = arguments = containers_copied(arguments)
    with torch.random.fork_rng(devices=[]), recorder:
        result = type(module).forward(module, *args, **kwargs)
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return _Stream(recorder.values, recorder.ops, _left_in(list(bound.values())[1:], recorder), _containers(result))


def _run_graph(
    module: nn.Module, graph: fx.Graph, arguments: Any, names: dict[int, str], call: Call, where: str
) -> tuple[_Stream, _LinkingInterpreter]:
    recorder = _recorder(arguments, names)
    replaced = replace(call, arguments=containers_copied(arguments))
    values = list(bind(module, replaced, where).values())
    interpreter = _LinkingInterpreter(module, graph, recorder)
    with torch.random.fork_rng(devices=[]), recorder:
        result = interpreter.run(*values, enable_io_processing=False)
    return _Stream(recorder.values, recorder.ops, _left_in(values, recorder), _containers(result)), interpreter


def _containers(tree: Any) -> Any:
    """The types of nested containers in a result, with their keys; what they hold is compared as values."""
    kind = _PLAIN.get(type(tree), type(tree))
    if isinstance(tree, dict):
        return (kind, tuple((key, _containers(item)) for key, item in tree.items()))
    if isinstance(tree, (list, tuple)):
        return (kind, tuple(_containers(item) for item in tree))
    return kind if dataclasses.is_dataclass(tree) else None


_PLAIN: dict[type, type] = {immutable_dict: dict, immutable_list: list}  # what an interpreter makes of them


def _named(containers: Any) -> str:
    kind = containers[0] if isinstance(containers, tuple) else containers
    return "another nesting" if kind is None else f"a {kind.__name__}"


def _left_in(values: list[Any], recorder: Recorder) -> tuple[Any, ...]:
    """What the lists and dictionaries among the arguments hold after the forward, which may have changed them."""
    return tuple(freeze(value, recorder.value) for value in values if type(value) in (list, dict))


def _recorder(arguments: Any, names: dict[int, str]) -> Recorder:
    recorder = Recorder(names)
    tensors: list[torch.Tensor] = []
    collect(arguments, tensors)
    for tensor in tensors:
        recorder.enter(tensor)
    return recorder


def _value_table(call: Call, recorded: tuple[Op, ...], local: list[Op]) -> dict[ValueId, ValueId]:
    table = {ValueId(index): value for index, value in enumerate(call.inputs)}
    for ours, theirs in zip(local, recorded, strict=True):
        table.update(zip(ours.outputs, theirs.outputs, strict=True))
    return table
