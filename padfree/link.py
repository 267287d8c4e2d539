"""Ties a traced graph to the recording: the self-check, then graph nodes by recorded value and operation.

The unedited graph must issue, in eval and in train mode, exactly the operations, arguments and dataflow that the
original forward issues: equal streams mean equal values, gradients and buffers.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn

from padfree.errors import Refusal
from padfree.record import Call, Recording
from padfree.recorder import Op, Recorder, Value, collect, first_line, geometry_key, storage


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


class _LinkingInterpreter(fx.Interpreter):
    """Runs a graph under a recorder and notes which node issued each operation and made each value."""

    def __init__(self, module: nn.Module, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.recorder = recorder
        self.node_of_value: dict[int, fx.Node] = {}
        self.node_of_op: list[fx.Node] = []
        self.results: dict[fx.Node, tuple[tuple[Any, ...], int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        self.node_of_op += [n] * (len(self.recorder.ops) - len(self.node_of_op))
        if isinstance(result, torch.Tensor) and n.op != "output":
            value = self.recorder.value(result)
            self.node_of_value.setdefault(value, n)
            self.results[n] = (geometry_key(result), value)
        return result


def link(
    recording: Recording, call: Call, graph: fx.Graph, where: str
) -> tuple[dict[int, fx.Node], dict[int, fx.Node]]:
    """Self-check in both modes; then nodes by recorded value and by recorded operation."""
    module = recording.modules[call.path]
    names = {storage(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    for training in (True, False):
        _set_training(module, training)
        try:
            arguments = _repeat_batch(call.arguments) if training else call.arguments
            original, ops_before = _run_original(module, arguments, names)
            traced, ops_after, interpreter = _run_graph(module, graph, arguments, names, call, where)
            if _restore_in_place(ops_before, ops_after, interpreter.node_of_op):
                traced, ops_after, interpreter = _run_graph(module, graph, arguments, names, call, where)
        except Refusal:
            raise
        except Exception as error:
            if training and original_fails(module, call, names):
                continue
            raise Refusal(f"the traced forward of {where} fails: {first_line(error)}") from error
        finally:
            _set_training(module, False)
        alike = [op.kind for op in ops_before] == [op.kind for op in ops_after]
        if alike and [op.grad for op in ops_before] != [op.grad for op in ops_after]:
            raise Refusal(f"the forward of {where} switches gradients on or off, which a generated forward would lose")
        if original != traced or ops_before != ops_after:
            mode = "train" if training else "eval"
            raise Refusal(f"the traced forward of {where} does not do what the original does in {mode} mode")
    recorded = recording.ops[call.ops.start : call.ops.stop]
    if [op.kind for op in recorded] != [op.kind for op in ops_after]:
        raise Refusal(f"the forward of {where} does not do the same twice")
    to_global = _value_table(call, recorded, ops_after)
    _follow_in_place(graph, interpreter)
    nodes = {to_global[value]: node for value, node in interpreter.node_of_value.items() if value in to_global}
    anchors = {recorded[i].index: node for i, node in enumerate(interpreter.node_of_op)}
    return nodes, anchors


def _follow_in_place(graph: fx.Graph, interpreter: _LinkingInterpreter) -> None:
    """Let what reads a tensor after an in-place operation on it read that operation's result, the same tensor.

    After `F.relu_(y)` whose result is dropped, `y` means the activation; an edit behind it must reach `y`.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    latest: dict[tuple[Any, ...], fx.Node] = {}
    for node, (key, value) in interpreter.results.items():
        earlier = latest.get(key)
        if earlier is not None and interpreter.results[earlier][1] != value:
            for user in [user for user in earlier.users if place[user] > place[node]]:
                user.replace_input_with(earlier, node)
        latest[key] = node


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


def original_fails(module: nn.Module, call: Call, names: dict[int, str]) -> bool:
    """Whether the original itself cannot run in train mode on the recorded shapes."""
    _set_training(module, True)
    try:
        _run_original(module, _repeat_batch(call.arguments), names)
    except Exception:
        return True
    finally:
        _set_training(module, False)
    return False


def _run_original(module: nn.Module, arguments: Any, names: dict[int, str]) -> tuple[list[Value], list[Op]]:
    recorder = _recorder(arguments, names)
    args, kwargs = arguments
    lists = [item for item in (*args, *kwargs.values()) if isinstance(item, list)]
    before = [list(item) for item in lists]
    with torch.random.fork_rng(devices=[]), recorder:
        type(module).forward(module, *args, **kwargs)
    if any(a is not b for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=False)):
        raise Refusal(f"the forward of `{type(module).__name__}` changes a list it is given")
    return recorder.values, recorder.ops


def _run_graph(
    module: nn.Module, graph: fx.Graph, arguments: Any, names: dict[int, str], call: Call, where: str
) -> tuple[list[Value], list[Op], _LinkingInterpreter]:
    recorder = _recorder(arguments, names)
    replaced = Call(call.index, call.path, call.parent, call.inputs, call.outputs, call.ops, arguments)
    values = list(bind(module, replaced, where).values())
    interpreter = _LinkingInterpreter(module, graph, recorder)
    with torch.random.fork_rng(devices=[]), recorder:
        interpreter.run(*values, enable_io_processing=False)
    return recorder.values, recorder.ops, interpreter


def _recorder(arguments: Any, names: dict[int, str]) -> Recorder:
    recorder = Recorder(names)
    tensors: list[torch.Tensor] = []
    collect(arguments, tensors)
    for tensor in tensors:
        recorder.enter(tensor)
    return recorder


def _value_table(call: Call, recorded: tuple[Op, ...], local: list[Op]) -> dict[int, int]:
    table = dict(enumerate(call.inputs))
    for ours, theirs in zip(local, recorded, strict=True):
        table.update(zip(ours.outputs, theirs.outputs, strict=True))
    return table


def _repeat_batch(tree: Any) -> Any:
    """The arguments with batches of one doubled: batch norms in train mode need two values a channel."""
    if isinstance(tree, torch.Tensor):
        alone = tree.dim() > 1 and tree.shape[0] == 1
        return tree.expand(2, *tree.shape[1:]).clone() if alone else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_repeat_batch(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _repeat_batch(item) for key, item in tree.items()}
    return tree


def _set_training(module: nn.Module, training: bool) -> None:
    for child in module.modules():
        child.training = training
